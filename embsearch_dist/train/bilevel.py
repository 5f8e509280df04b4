"""Bi-level training: a second set of parameters that learns from held-out rows, in steps of its own.

The trainer does, after every ``every``-th ordinary step, one *outer* step: the loss of a held-out batch goes back to
the model's ``outer_parameters`` and to nothing else. Tables and head are read there without a graph (the tables'
fused optimizers write in backward, so no gradient may come near them), and ordinary steps read the outer
parameters without one. A first-order approximation, as in DARTS (Liu et al. 2019, section 2.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.train.task import Task


class BilevelTask(Task, Protocol):
    """What the trainer asks of a task whose model has outer parameters."""

    warmup: int
    """Ordinary steps at the start in which nothing is selected yet; evaluations up to there are not counted."""
    outer_lr: float
    """Learning rate of the outer parameters (Adam)."""

    def outer_loss(self, step: int) -> torch.Tensor | None:
        """Mean loss of this rank's held-out rows after ``step`` ordinary steps; None when no outer step is due.

        Runs while head and tables are frozen; calls the model's bare head (DDP would wait for its gradients).
        """


class HeldOut:
    """The k-th outer step's batch, a function of k alone: a continued run sees what the unbroken one saw."""

    def __init__(self, stream: BatchStream, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self._next, self._batches = -1, iter(())  # type: tuple[int, Iterator[Batch]]

    def batch(self, k: int) -> Batch:
        """Batches come in shuffled epochs; another one than the next is found by seeking."""
        epoch, place = divmod(k, self.stream.batches_per_epoch)
        if k != self._next or place == 0:
            self._batches = self.stream.epoch(epoch, start_batch=place)
        self._next = k + 1
        return next(self._batches).to(self.device)

    def close(self) -> None:
        """Stop reading ahead: a thread must not outlive the training."""
        self._next, self._batches = -1, iter(())


def frozen(parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """No gradient for these parameters inside."""
    return requiring_gradient(parameters, False)


@contextlib.contextmanager
def requiring_gradient(parameters: Sequence[nn.Parameter], required: bool = True) -> Iterator[None]:
    """A gradient for these parameters inside, or none, whatever they had; behind it as before."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(required)
    try:
        yield
    finally:
        for p, wanted in zip(parameters, before, strict=True):
            p.requires_grad_(wanted)
