"""Times of work on any device. A GPU works behind the program's back: without this one would time its launches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def now(device: torch.device | str = "cpu") -> float:
    """Seconds of the host's clock, once everything that was started on ``device`` is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Marks:
    """Marks between pieces of work; on a GPU events in its own stream, so that marking stops nothing.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._marks: list[Any] = []

    def mark(self) -> None:
        """The work that was started up to here is one piece, what comes is the next."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each piece between two marks; waits for the last one."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.device.type != "cuda":
            return [b - a for a, b in pairs]
        if self._marks:
            self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def timed(work: Callable[[], object], device: torch.device | str, repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warmup`` calls that do not count."""
    for _ in range(warmup):
        work()
    marks = Marks(device)
    marks.mark()
    for _ in range(repeats):
        work()
        marks.mark()
    return marks.seconds()
