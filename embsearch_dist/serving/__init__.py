"""From a trained model to predictions elsewhere: a model directory that stands alone, programs, scoring, a server.

Nothing here needs TorchRec or a process group, but for :mod:`embsearch_dist.serving.export`, which reads checkpoints.
"""
