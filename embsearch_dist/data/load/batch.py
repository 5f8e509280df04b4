"""One mini-batch as every model of the project sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Position:
    """How far into the data a batch reaches; it rides on the batch so that a checkpoint taken after
    training on it never runs ahead of training, however far a loader has prefetched.

    ``batch`` counts the global batches of ``epoch`` that are done once this one is trained on.
    """

    epoch: int
    batch: int


@dataclass(frozen=True)
class Batch:
    """This rank's share of one global batch.

    Attributes:
        dense: ``[B, n_dense]`` float32 (``n_dense`` may be 0).
        sparse: one key per field, in schema order; ids int32, each ``0 <= id < cardinality``, one for each sample
            or of a list any number. Weights (float32) if any field is weighted; those of the others are ones.
        label: ``[B]`` float32, 0 or 1.
        position: see :class:`Position`.
    """

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    label: torch.Tensor
    position: Position

    @property
    def size(self) -> int:
        return self.label.numel()

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; the batch itself when it is there already."""
        if self.label.device == device:
            return self
        return Batch(
            self.dense.to(device, non_blocking=True),
            self.sparse.to(device, non_blocking=True),
            self.label.to(device, non_blocking=True),
            self.position,
        )
