"""Where a training stands, and the learning rates that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from embsearch_dist.config.sections import TrainConfig


@dataclass
class Progress:
    """Where training stands: all of it is in every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_logloss: float | None = None
    best_step: int = 0
    bad_evals: int = 0
    lr_factor: float = 1.0
    stopped: str = ""
    seconds: float = 0.0
    skipped: int = 0  # batches without an update, because something was not finite
    evaluate: bool = False  # a signal came just before an evaluation, which is still due
    loss_sum: float = 0.0  # since the last line of the log
    loss_count: int = 0


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """Factor on the learning rates of step ``step`` of ``total``, both counted from 0."""
    rising = int(config.warmup * total)
    if step < rising:
        return (step + 1) / rising
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
