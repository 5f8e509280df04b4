"""Rows of a split drawn at random, for what is scored again and again on the same rows."""

from __future__ import annotations

import numpy as np

from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.making import BatchMaker
from embsearch_dist.data.store.shards import Rows, SplitRows
from embsearch_dist.errors import UserError


def random_batches(
    shards: SplitRows, count: int, batch_rows: int, seed: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This rank's share of ``count`` rows drawn without repetition from all rows of a split.

    The sample depends on ``seed`` and the split alone, not on the number of ranks; it is the whole split when
    ``count`` is at least its size. Rank r holds the r-th part of it by stored order, so the ranks together read each
    row group about once. Inside a rank the rows are shuffled: any part of them is a random part.

    Args:
        shards: the split.
        count: rows over all ranks.
        batch_rows: rows of a batch over all ranks, at most.

    Returns:
        Equally many batches on every rank, none empty.

    Raises:
        UserError: fewer rows than ranks, and what reading finds.
    """
    count = min(count, shards.rows)
    if count < world_size:
        raise UserError(f"a sample of {count} rows is too small for {world_size} ranks. Use fewer ranks or more rows")
    picked = np.sort(np.random.default_rng([seed, 0]).permutation(shards.rows)[:count])
    own = picked[rank * count // world_size : (rank + 1) * count // world_size]
    rows = _read(shards, own)
    order = np.random.default_rng([seed, 1 + rank]).permutation(len(own))
    make, batches = BatchMaker(shards.schema), -(-count // max(batch_rows, world_size))
    # Shares differ by a row, so that the smallest has enough for all batches.
    batches = min(batches, count // world_size)
    parts = np.array_split(order, batches)
    return [make(rows.take(part), Position(0, k + 1)) for k, part in enumerate(parts)]


def _read(shards: SplitRows, wanted: np.ndarray) -> Rows:
    """The rows with these ascending numbers in stored order; one row group is in memory beside them."""
    parts, start = [], 0
    for group in shards.groups:
        low, high = np.searchsorted(wanted, [start, start + group.rows])
        if high > low:
            parts.append(shards.read([group]).take(wanted[low:high] - start))
        start += group.rows
    return Rows.join(parts)
