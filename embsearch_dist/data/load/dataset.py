"""Prepared shards -> batches: shuffled by (seed, epoch), cut the same for any number of ranks, resumable.

The order of samples: row groups are permuted by (seed, epoch) and consecutive ones joined to windows of
about ``window_rows`` rows; rows are shuffled inside a window; global batches are cut across the stream of
windows. Rank ``r`` takes its contiguous slice of every global batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.feeding import Feeder, Lane, one_ahead
from embsearch_dist.data.load.making import BatchMaker
from embsearch_dist.data.store.shards import LeftOut, RowGroup, Rows, Shards, SplitRows
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema

T = TypeVar("T")
WINDOW_ROWS = 1 << 20


def open_split(prepared_dir: Path | str, split: str) -> Shards:
    """The shards of a split, with the schema found beside them.

    Raises:
        UserError: see :class:`Shards` and :meth:`embsearch_dist.schema.Schema.load`.
    """
    return Shards(prepared_dir, Schema.load(prepared_dir), split)


def read_rows(
    prepared_dir: Path | str, schema: Schema, split: str, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A whole split, or its first ``limit`` rows, in stored order: ids ``[F, N]`` int32, dense
    ``[N, n_dense]`` float32, label ``[N]`` float32. Raises what :meth:`Shards.read` raises, and for list fields."""
    lists = [f.name for f in schema.fields if f.is_list]
    if lists:
        raise UserError(f"field {lists[0]!r} has no single id a row. Read such data with Shards.read or BatchStream")
    shards = Shards(prepared_dir, schema, split)
    rows = shards.read(shards.groups, limit)
    return torch.from_numpy(rows.ids), torch.from_numpy(rows.dense), torch.from_numpy(rows.label)


class BatchStream:
    """This rank's batches of one split.

    Training (``shuffle=True``): the last incomplete global batch of an epoch is dropped; a split
    smaller than one global batch gives one batch of all its rows. Evaluation (``shuffle=False``): all rows
    in stored order; the last global batch is shared as evenly as possible, and a rest of fewer rows than
    ranks joins the batch before it, because TorchRec cannot look up an empty batch. So all ranks yield the
    same number of batches and none is empty.

    Args:
        rows_of: a prepared data set, or the split of a data source.
        schema: its schema (or one that fits it).
        split: ``train``, ``validation`` or ``test``.
        global_batch: samples of a batch over all ranks.
        rank, world_size: whose share this is.
        shuffle: a new order every epoch, from ``seed`` and the epoch alone.
        window_rows: rows held and shuffled at a time. It is part of the order: keep it to resume.
        prefetch: batches read ahead by a thread; 0 reads in the caller.
        start: where :meth:`epoch` begins in that epoch when it is not told.
        left_out: row groups that cannot be read: they are no part of the order. The same on every rank.
        device: where the batches are wanted. They are copied to a CUDA device beside training, one ahead, see
            :mod:`embsearch_dist.data.load.feeding`; for any other they stay on the CPU.

    Raises:
        UserError: nonsensical sizes, more ranks than rows, and whatever :class:`Shards` finds.
    """

    def __init__(
        self,
        rows_of: Path | str | SplitRows,
        schema: Schema,
        split: str,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_rows: int = WINDOW_ROWS,
        prefetch: int = 2,
        start: Position | None = None,
        left_out: Sequence[LeftOut] = (),
        device: torch.device | None = None,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size} ranks does not exist. Ranks count from 0")
        if global_batch < world_size:
            raise UserError(f"a global batch of {global_batch} is too small for {world_size} ranks. Raise it")
        if window_rows < 1 or prefetch < 0 or seed < 0:
            raise UserError(f"window_rows {window_rows}, prefetch {prefetch}, seed {seed}: too small. Raise them")
        self.shards: SplitRows
        self.shards = Shards(rows_of, schema, split, left_out) if isinstance(rows_of, str | Path) else rows_of
        self.splits = [split]
        if self.shards.rows < world_size:
            raise UserError(
                f"split {split!r} has {self.shards.rows} rows for {world_size} ranks. Use fewer ranks or more data"
            )
        self.schema, self.global_batch, self.rank, self.world_size = schema, global_batch, rank, world_size
        self.shuffle, self.seed, self.window_rows, self.prefetch = shuffle, seed, window_rows, prefetch
        self.start = start
        self.left_out = tuple(left_out)
        self._make = BatchMaker(schema)
        self._kept: Rows | None = None
        self._feeder: Feeder | None = None
        if device is not None and device.type == "cuda":
            self._feeder = Feeder(BatchMaker(schema), Lane(device))

    @property
    def rows(self) -> int:
        """Rows of the split that are read, over all ranks."""
        return self.shards.rows

    @property
    def rows_left_out(self) -> int:
        """Rows of the split that are not read, because they cannot be."""
        return max(0, sum(self.schema.rows.get(s, self.rows) for s in self.splits) - self.rows)

    def extend(self, other: BatchStream) -> None:
        """From now on the epochs hold the rows of another split too. Before the first epoch, and on every rank."""
        self.shards.groups += other.shards.groups
        self.shards.rows += other.rows
        self.splits += other.splits
        self.left_out += other.left_out

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one epoch; every rank yields this many."""
        whole, rest = divmod(self.rows, self.global_batch)
        if whole == 0:
            return 1
        return whole + (1 if not self.shuffle and rest >= self.world_size else 0)

    def epoch(self, epoch: int, start_batch: int | None = None) -> Iterator[Batch]:
        """Batches of one epoch from ``start_batch`` on, found by seeking: nothing before is read.

        Raises:
            UserError: a start beyond the epoch; what :meth:`Shards.read` finds, at the batch concerned.
        """
        if start_batch is None:
            start_batch = self.start.batch if self.start is not None and self.start.epoch == epoch else 0
        if self.left_out:
            # The epoch may have become shorter since the position was saved; then it is over.
            start_batch = min(start_batch, self.batches_per_epoch)
        if epoch < 0 or not 0 <= start_batch <= self.batches_per_epoch:
            raise UserError(
                f"cannot start at epoch {epoch}, batch {start_batch}: an epoch has {self.batches_per_epoch} batches. "
                "The checkpoint is of other data or another batch size"
            )
        batches = self._batches(epoch, start_batch)
        if self._feeder is None:
            return self._ahead(batches)
        return one_ahead(self._ahead(map(self._feeder.pack, batches)), self._feeder.send, self._feeder.receive)

    def _ahead(self, batches: Iterator[T]) -> Iterator[T]:
        return _read_ahead(batches, self.prefetch) if self.prefetch else batches

    def windows(self, epoch: int) -> list[list[RowGroup]]:
        """The row groups of each window of an epoch."""
        groups = self.shards.groups
        if self.shuffle:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, 0])).permutation(len(groups))
            groups = [groups[i] for i in order]
        windows: list[list[RowGroup]] = []
        filled = self.window_rows
        for group in groups:
            if filled + group.rows > self.window_rows:
                windows.append([])
                filled = 0
            windows[-1].append(group)
            filled += group.rows
        # Stored order inside a window: faster to read, and the rows are shuffled anyway.
        return [sorted(w, key=lambda g: (g.path, g.index)) for w in windows]

    def _window(self, groups: list[RowGroup], only: bool) -> Rows:
        if not only:
            return self.shards.read(groups)
        if self._kept is None:
            self._kept = self.shards.read(groups)
        return self._kept

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        windows = self.windows(epoch)
        window_start = 0
        batch, last = first, self.batches_per_epoch
        parts: list[Rows] = []
        for w, groups in enumerate(windows):
            n = sum(g.rows for g in groups)
            window_stop = window_start + n
            # Only windows that hold rows of a batch still to come are read.
            if batch < last and window_stop > batch * self.global_batch:
                rows = self._window(groups, len(windows) == 1)
                order: np.ndarray | None = None
                if self.shuffle:
                    seeds = np.random.SeedSequence([self.seed, epoch, 1 + w])
                    order = np.random.Generator(np.random.Philox(seeds)).permutation(n)
                while batch < last:
                    low, high = self.share(batch)
                    inside = slice(max(low - window_start, 0), max(min(high, window_stop) - window_start, 0))
                    if inside.stop > inside.start or not parts:
                        parts.append(rows.take(inside if order is None else order[inside]))
                    if self._bounds(batch)[1] > window_stop:
                        break
                    batch += 1
                    yield self._make(Rows.join(parts), Position(epoch, batch))
                    parts = []
                del rows  # so that two windows are never held at once
            window_start = window_stop

    def _bounds(self, batch: int) -> tuple[int, int]:
        """Rows of the epoch's order that make a global batch."""
        start = batch * self.global_batch
        stop = start + self.global_batch
        if batch == self.batches_per_epoch - 1 and (not self.shuffle or stop > self.rows):
            stop = self.rows
        return start, stop

    def share(self, batch: int) -> tuple[int, int]:
        """Rows ``low..high`` of the epoch's order (the stored one without ``shuffle``) that make this rank's share of
        a global batch."""
        start, stop = self._bounds(batch)
        size = stop - start
        return start + self.rank * size // self.world_size, start + (self.rank + 1) * size // self.world_size

    def weight(self, batch: Batch) -> float:
        """What the mean over this rank's rows counts in the mean over ranks, which then is that of the global batch: 1
        where all ranks have as many rows."""
        k = batch.position.batch - 1
        start, stop = self._bounds(k)
        low, high = self.share(k)
        return (high - low) * self.world_size / (stop - start)


def _read_ahead(batches: Iterator[T], depth: int) -> Iterator[T]:
    """The same batches, made by a thread that stays ``depth`` ahead; its exceptions surface here, and
    closing this generator early stops the thread."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as e:
            put(e)

    def consume() -> Iterator[T]:
        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    return consume()
