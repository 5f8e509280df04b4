"""Tables over ranks: plans, TorchRec's sharded collections, their optimizer, and sums over them."""
