"""Thresholds on single entries, their settings, and how they are trained with the tables."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.methods.allocating import BudgetOptions
from embsearch_dist.methods.masked import MaskedStage, MaskedTask
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor

GRANULARITIES = ("field_dim", "field", "dim", "global")


@dataclass
class PEPConfig(BudgetOptions):
    """PEP: thresholds on single entries, learned with the tables."""

    width: int = option(32, "width of every field of the model that is pruned", low=1)
    granularity: str = option(
        "field_dim", "a threshold for each: field_dim (field and column) | field | dim | global", choices=GRANULARITIES
    )
    start: float = option(-7.0, "s at the start; the threshold is sigmoid(s). -15 as published for MovieLens")
    lr: float = option(1e-2, "learning rate of s", above=0)
    keep: float = option(0.9, "without a budget: share of the summed column shares that is kept", above=0, high=1)
    tickets: bool = option(False, "train each mask again from the initial tables; figures in search/ticket-NAME.json")
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))

    @property
    def candidates(self) -> list[int]:
        """All widths that a choice of columns can give."""
        return list(range(self.width + 1))


class SoftThreshold(nn.Module):
    """``sign(v) * relu(|v| - sigmoid(s))`` of ``v [B, F, w]``."""

    def __init__(self, fields: int, width: int, granularity: str, start: float) -> None:
        super().__init__()
        rows, columns = "field" in granularity, "dim" in granularity
        self.s = nn.Parameter(torch.full((fields if rows else 1, width if columns else 1), start))
        self.shape = (fields, width)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return v.sign() * torch.relu(v.abs() - self.s.sigmoid())

    def per_entry(self) -> torch.Tensor:
        """s ``[F, w]``."""
        return self.s.detach().expand(self.shape)


class ThresholdTask(MaskedTask):
    """Trains tables, head and thresholds together; their mean is logged."""

    mask: SoftThreshold

    def after_step(self, step: int, monitor: Monitor) -> None:
        if step % self.run.config.search.training.log_every == 0:
            monitor.scalars(step, {"threshold": float(self.mask.s.detach().sigmoid().mean())})


class ThresholdStage(MaskedStage):
    """Trains the thresholds under ``checkpoints/thresholds``."""

    name = "thresholds"
    own = ("granularity", "start", "lr")

    def task(self, run: Run) -> MaskedTask:
        search: PEPConfig = run.config.search
        mask = SoftThreshold(len(run.schema.fields), search.width, search.granularity, search.start)
        return ThresholdTask(run, mask, self.settings(run), search.lr)
