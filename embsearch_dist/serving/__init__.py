"""From a trained model to predictions elsewhere: a model directory that stands alone, programs, scoring, a server.

Nothing here needs TorchRec or a process group but what makes the directory (``collect``, ``trained``, ``export``).
"""

OWN = "own"  # in place of a format's name: rows come in that of the training data
