"""Entry scripts, and the TorchX components that start them."""
