"""Training steps through the public Trainer, watched from outside: no step of our own that could differ from it."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embsearch_dist.config.sections import Config, TrainConfig
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer
from tools.gpucheck.lab import Lab

NEVER = 1 << 30


class Enough(Exception):
    """Leaves the trainer between two steps, so that it neither evaluates nor saves."""


class Watched:
    """A task that tells when a step is done; everything else is the task's own."""

    def __init__(self, task: Any, done: Callable[[int], None]) -> None:
        self._task, self._done = task, done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def after_step(self, step: int, monitor: Monitor) -> None:
        self._task.after_step(step, monitor)
        self._done(step)


def train(
    task: Any, config: Config, stream: Any, context: Context, folder: Path, done: Callable[[int], None], **train: Any
) -> None:
    """Train until ``done(step)``, called after each step, raises :class:`Enough`, or ``steps`` are over.

    Args:
        stream: of training batches; there is no validation.
        folder: for checkpoints and metrics, if there are any.
        train: of :class:`embsearch_dist.config.sections.TrainConfig`.
    """
    settings = TrainConfig(**{"batch_size": stream.global_batch, "steps": NEVER, "log_every": NEVER} | train)
    with Monitor(folder, "check", 0, quiet=True) as monitor:
        root = folder / "checkpoints"
        watched = Watched(task, done)
        trainer = Trainer(watched, settings, config.optim, stream, None, context, monitor, root)
        with contextlib.suppress(Enough):
            trainer.fit()


def step_times(lab: Lab, task: Any, config: Config, stream: Any, context: Context, steps: int) -> list[float]:
    """Seconds of ``steps`` training steps, after three that warm up."""
    marks = lab.marks()

    def done(step: int) -> None:
        if step >= 3:
            marks.mark()
        if step >= 3 + steps:
            raise Enough

    train(task, config, stream, context, lab.folder / "steps", done)
    return marks.seconds()


def in_turns(sides: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each side. They take turns, so that what disturbs one disturbs all."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name] += side()
    return {name: statistics.median(times) for name, times in found.items()}
