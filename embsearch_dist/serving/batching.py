"""Requests that wait together are predicted together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from embsearch_dist.serving.tables import Bag, Ids


class Overloaded(Exception):
    """More rows wait than are allowed to."""


@dataclass
class _Waiting:
    ids: Ids
    answer: asyncio.Future[torch.Tensor]


class Batcher:
    """Runs a model on what has come in while it was busy.

    A request that finds the model idle is answered at once; with ``delay_s`` it waits so long for company.

    Args:
        predict: logits ``[B]`` of some rows; called in a thread of its own, one batch at a time.
        max_rows: of one batch; a request of more rows makes a batch of its own.
        max_waiting: rows that may wait; a request of more rows is taken when none waits.
        seen: told the rows of each batch.
    """

    def __init__(
        self,
        predict: Callable[[Ids], torch.Tensor],
        max_rows: int,
        max_waiting: int,
        delay_s: float = 0.0,
        seen: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.predict, self.max_rows, self.max_waiting = predict, max_rows, max_waiting
        self.delay_s, self.seen = delay_s, seen
        self._queue: list[_Waiting] = []
        self._rows = 0
        self._there = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, "model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """End; what still waits is not answered."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._pool.shutdown(wait=True)

    async def __call__(self, ids: Ids) -> torch.Tensor:
        """Logits ``[B]``.

        Raises:
            Overloaded: too many rows wait already.
        """
        if self._rows and self._rows + ids.rows > self.max_waiting:
            raise Overloaded(f"{self._rows:,} rows wait already")
        waiting = _Waiting(ids, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._rows += ids.rows
        self._there.set()
        return await waiting.answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._there.wait()
            if self.delay_s and self._rows < self.max_rows:
                await asyncio.sleep(self.delay_s)
            batch = self._take()
            try:
                ids = joined([w.ids for w in batch])  # may find no memory
                self.seen(ids.rows)
                logits = await loop.run_in_executor(self._pool, self.predict, ids)
            except Exception as e:  # the requests of this batch fail, the server goes on
                for waiting in batch:
                    _set(waiting.answer, e)
                continue
            for waiting, part in zip(batch, logits.split([w.ids.rows for w in batch]), strict=True):
                _set(waiting.answer, part)

    def _take(self) -> list[_Waiting]:
        """The requests of the next batch, oldest first."""
        rows, count = 0, 0
        while count < len(self._queue) and (not count or rows + self._queue[count].ids.rows <= self.max_rows):
            rows, count = rows + self._queue[count].ids.rows, count + 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        self._rows -= rows
        if not self._queue:
            self._there.clear()
        return batch


def _set(answer: asyncio.Future[torch.Tensor], value: Any) -> None:
    if answer.done():  # whoever asked has gone
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)


def joined(parts: Sequence[Ids]) -> Ids:
    """The rows of several, one after the other; lists are bags."""
    if len(parts) == 1:
        return parts[0]
    single = {n: torch.cat([p.single[n] for p in parts]) for n in parts[0].single}
    lists = {n: _bags([p.lists[n] for p in parts]) for n in parts[0].lists}
    return Ids(single, lists, torch.cat([p.dense for p in parts]))


def _bags(parts: Sequence[Any]) -> Bag:
    weights = None if parts[0].weights is None else torch.cat([p.weights for p in parts])
    lengths = torch.cat([p.lengths for p in parts])
    return Bag(torch.cat([p.ids for p in parts]), functional.pad(lengths.cumsum(0), (1, 0)), weights)
