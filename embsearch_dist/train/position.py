"""Where a training stands, and the learning rates that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from embsearch_dist.config.sections import TrainConfig


@dataclass
class Progress:
    """Where training stands: all of it is in every checkpoint.

    Attributes:
        best, best_logloss, best_step: of the evaluation whose weights are kept, the start of a training that begins
            with an earlier model among them (step 0); None before there is one.
        peak: metric and negative logloss of the best evaluation since the first step. Patience is counted from it, as
            an earlier model may lose for a while before training on makes it better.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_logloss: float | None = None
    best_step: int | None = None
    peak: list[float] | None = None
    bad_evals: int = 0
    lr_factor: float = 1.0
    stopped: str = ""
    seconds: float = 0.0
    skipped: int = 0  # batches without an update, because something was not finite
    evaluate: bool = False  # a signal came just before an evaluation, which is still due
    loss_sum: float = 0.0  # since the last line of the log
    loss_count: int = 0

    def __post_init__(self) -> None:
        if self.best is None and self.best_step == 0:  # how older checkpoints say that there is none
            self.best_step = None
        if self.peak is None and self.best is not None and self.best_step:
            self.peak = self._least()

    def count(self, metric: float, logloss: float) -> bool:
        """Take an evaluation into account; whether its weights are the best so far.

        Of equal metrics the lower logloss is the better one. What is not a number is never the best.

        Args:
            metric: of what selects; greater is better.
        """
        found, number = [metric, -logloss], math.isfinite(metric) and math.isfinite(logloss)
        better = number and (self.best is None or found > self._least())
        if better:
            self.best, self.best_logloss, self.best_step = metric, logloss, self.step
        if number and self.step and (self.peak is None or found > self.peak):
            self.peak, self.bad_evals = found, 0
        elif self.step:
            self.bad_evals += 1
        return better

    def no_best(self) -> None:
        """Forget the best evaluation: its weights are lost."""
        self.best, self.best_logloss, self.best_step, self.peak = None, None, None, None

    def _least(self) -> list[float]:
        """What has to be beaten; older checkpoints do not tell the logloss, and equal is not better then."""
        assert self.best is not None
        return [self.best, 0.0 if self.best_logloss is None else -self.best_logloss]


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """Factor on the learning rates of step ``step`` of ``total``, both counted from 0."""
    rising = int(config.warmup * total)
    if step < rising:
        return (step + 1) / rising
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
