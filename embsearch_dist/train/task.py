"""What the training loop asks of the thing it trains."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.models.model import CTRModel
from embsearch_dist.train.monitor import Monitor


class Task(Protocol):
    """What is trained. The trainer knows nothing else of a method."""

    @property
    def model(self) -> CTRModel:
        """Tables and head."""

    @property
    def settings(self) -> dict[str, Any]:
        """What model and training depend on, flat and JSON-able; a checkpoint made with others is refused."""

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """Mean loss of this rank's batch; ``step`` counts the steps already done."""

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits ``[B]`` in evaluation mode."""

    def after_step(self, step: int, monitor: Monitor) -> None:
        """Called once the parameters are updated; ``step`` counts this one too."""

    def after_skip(self) -> None:
        """Called instead when the batch was skipped: drop what ``loss`` has noted of it."""

    def state(self) -> dict[str, Any]:
        """JSON-able state beside the parameters (samplers, counters)."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""


@runtime_checkable
class Judge(Protocol):
    """A task that has its own way of measuring what it trains."""

    def judge(self) -> dict[str, float] | None:
        """Metrics in evaluation mode, ``auc`` and ``logloss`` among them, the same on every rank; None: those of
        ``predict`` on the validation rows are meant."""
