"""A pretend CUDA device, for a machine without one: what the project does on CUDA, tested with CPU builds.

    install()                         once, early: torch.cuda.is_available() is now True
    with watching() as counts: ...    counts.kernels, .operators, .syncs, .copies, .syncs_and_copies; print(counts)
    python -m tools.pretend SCRIPT [ARGUMENTS]     an entry script as a user starts it, on that device
    python -m tools.pretend.count                  what a training step of every method asks of the device

Tensors on it say ``cuda:0``, hold real numbers and refuse to mix with CPU tensors as a card would. TorchRec and FBGEMM
are the real ones; of FBGEMM only the CUDA look-up is written again (:mod:`tools.pretend.lookup`). Streams and events
order nothing, since every operator is done when it returns: races between streams stay unseen, and so do speed and the
random numbers of a card. The device is process-wide and cannot be taken off again.
"""

from tools.pretend.counts import Counts, watching
from tools.pretend.runtime import install, installed

__all__ = ["Counts", "install", "installed", "watching"]
