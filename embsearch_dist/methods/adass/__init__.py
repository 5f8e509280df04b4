"""AdaS&S (Wei et al. 2023): adaptive sampling trains a supernet, a policy searches it, a budget bounds it."""
