"""Thresholds on single entries, and how they are trained with the tables."""

from __future__ import annotations

import torch
from torch import nn

from embsearch_dist.methods.masked import MaskedStage, MaskedTask
from embsearch_dist.methods.pep.config import PEPConfig
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


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
