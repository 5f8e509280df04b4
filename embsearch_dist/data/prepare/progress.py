"""Long work of a team: progress with the time left, and threads that stop when they should."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import polars as pl

from embsearch_dist.data.prepare.team import Stopped, Team

T = TypeVar("T")


def threads() -> int:
    """How many threads work in this process: those of polars (``POLARS_MAX_THREADS``), at most 8.

    Each holds a block of input or a shard in memory, so more cores are better used by more processes.
    """
    return min(pl.thread_pool_size(), 8)


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line now and then, with the time left.

    All processes add to it and rank 0 shows the sum. Adding is also where work ends early: when another
    process has failed, or another thread of this one (the ``with`` block was left).
    """

    every_s = 5.0
    look_s = 0.5

    def __init__(self, what: str, total: int, unit: str, quiet: bool, team: Team | None = None) -> None:
        self.what, self.total, self.unit, self.team = what, max(total, 1), unit, team or Team()
        self.quiet = quiet or self.team.rank > 0
        self.start = self.said = self.looked = time.monotonic()
        self._new = self._new_found = 0
        self._shown = 0
        self._lock, self._over = threading.Lock(), False
        self.bar = None
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=what, unit=unit[0].upper(), unit_scale=True, leave=False)

    def add(self, n: int, found: bool = False) -> None:
        """Count ``n`` more as done; ``found``: they were done before, so they say nothing about the speed.

        Raises:
            Stopped: there is no use in going on.
            UserError: another process found something wrong.
        """
        if self._over:
            raise Stopped("another thread has ended this work")
        with self._lock:
            self._new += n
            self._new_found += n if found else 0
            now = time.monotonic()
            if now - self.looked < self.look_s:
                return
            self.looked = now
            self.team.look()
            done = self.team.add(f"{self.what}/done", self._new)
            before = self.team.add(f"{self.what}/found", self._new_found)
            self._new = self._new_found = 0
            self._show(now, done, before)

    def _show(self, now: float, done: int, found: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self._shown)
            self._shown = done
        elif not self.quiet and now - self.said >= self.every_s:
            self.said = now
            left = (now - self.start) * max(self.total - done, 0) / max(done - found, 1)
            share = min(done / self.total, 1.0)
            print(f"{self.what}: {share:4.0%} of {self.total:,} {self.unit}, about {left:,.0f} s left", file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        if self.bar is not None:
            self.bar.close()


def in_order(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Results of jobs that run on threads, in the order of the jobs; few are begun before they are asked for."""
    n = threads()
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(n) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > n:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for job_left in waiting:
                job_left.cancel()


def on_threads(team: Team, bar: Progress, tasks: Sequence[T], work: Callable[[T], None]) -> None:
    """Do all tasks of a stage, each once among the threads of all processes. ``work`` should add to ``bar``."""

    def some() -> None:
        for task in team.claim(bar.what, tasks):
            work(task)

    with ThreadPoolExecutor(threads()) as pool, bar:  # the bar ends first, and with it what still runs
        futures = [pool.submit(some) for _ in range(min(threads(), max(len(tasks), 1)))]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
    team.barrier(bar.what)
