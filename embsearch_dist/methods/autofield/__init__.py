"""AutoField (Wang et al. 2022): which fields are kept, by a gate per field that held-out rows train.

*AutoField: Automating Feature Selection in Deep Recommender Systems*, WWW 2022 (arXiv 2204.09078).
Field m has two logits, for *keep* and for *drop*; its embedding is multiplied by the relaxed probability w_m of *keep*
(`gated/relaxed.py`), and after the search the K fields of the highest probability are trained from scratch. Ordinary
batches train tables and head, every ``outer.every``-th a validation batch the logits (first-order DARTS).

Where this departs:

* Under a budget the kept fields are those with the largest sum of probabilities among all sets that the budget holds
  (exact knapsack), at one width: where all fields cost alike that is the paper's top K, and K need not be known.
* The temperature falls by ordinary steps, and there is no noise at evaluation: in the published code every forward pass
  cools it, evaluation included, and Gumbel noise is on when figures are taken.
* K is an option; the published code keeps 11 fields whatever their number.
* All ranks and all rows of a batch share the noise of a step.
"""
