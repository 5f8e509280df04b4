"""Data without polars: small prepared sets with a planted signal, and batches that never saw a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.dataset import WINDOW_ROWS, BatchMaker
from embsearch_dist.data.planted.criteo_like import CATEGORIES
from embsearch_dist.data.store.bags import Bags
from embsearch_dist.data.store.shards import Rows, ShardWriter, column_types
from embsearch_dist.schema import Field, Schema

DENSE = 13  # numeric columns of Criteo
ROW_GROUP = 500


def small_schema() -> Schema:
    """Four fields of one id, a list that is averaged, and a dense column."""
    fields = (Field("left", 12), Field("big", 3600), Field("right", 7), Field("idle", 40))
    return Schema("made_up", (*fields, Field("tags", 30, "mean", mean_length=1.5)), ("x",))


def criteo_schema(cap: int = 0) -> Schema:
    """Criteo's 26 categories, each of at most ``cap`` values (0: all 33.8M together), and its 13 numbers."""
    sizes = [min(c.published, cap) if cap else c.published for c in CATEGORIES]
    fields = tuple(Field(c.name, n) for c, n in zip(CATEGORIES, sizes, strict=True))
    return Schema("criteo_sizes", fields, tuple(f"I{i + 1}" for i in range(DENSE)))


def random_rows(schema: Schema, count: int, seed: int) -> Rows:
    """Ids with log-uniform ranks (Zipf's law), lists of 0 to 3, dense columns from N(0, 1), a quarter of ones."""
    dice, bags = np.random.default_rng(seed), []
    ids = [_ids(dice, f.cardinality, count) for f in schema.fields if not f.is_list]
    for field in (f for f in schema.fields if f.is_list):
        offsets = np.concatenate([[0], dice.integers(0, 4, count).cumsum()])
        weights = dice.random(offsets[-1]).astype(np.float32) if field.weighted else None
        bags.append(Bags(_ids(dice, field.cardinality, offsets[-1]), offsets, weights))
    dense = dice.standard_normal((count, len(schema.dense))).astype(np.float32)
    return Rows(np.stack(ids), dense, (dice.random(count) < 0.25).astype(np.float32), tuple(bags))


def make_prepared(folder: Path, schema: Schema, rows: dict[str, int], seed: int = 0) -> Path:
    """Write a prepared data set as launch/prepare.py does, without vocabulary; returns ``folder``.

    The label depends on the first and the third field together and on the first dense column.

    Args:
        rows: of each split.
    """
    dice = np.random.default_rng(seed)
    first, third = (schema.cardinalities[k] for k in (0, 2))
    effect = dice.standard_normal((first, 2)) @ dice.standard_normal((2, third))
    types = column_types(schema.fields, schema.dense)
    for number, (split, count) in enumerate(rows.items()):
        made = random_rows(schema, count, seed + 1 + number)
        logit = 2 * effect[made.ids[0], made.ids[2]] + made.dense[:, 0]
        label = (dice.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32)
        singles, lists = iter(made.ids), iter(made.bags)
        columns = [next(lists) if f.is_list else next(singles) for f in schema.fields]
        (folder / split).mkdir(parents=True)
        size = max(ROW_GROUP, count // 16)
        writer = ShardWriter(folder / split / "part-00000.parquet", pa.schema(list(types.items())), size)
        writer.write([label, *columns, *made.dense.T])
        writer.close()
    Schema(schema.dataset, schema.fields, schema.dense, rows).save(folder)
    return folder


class Resident:
    """Stands in for a :class:`embsearch_dist.data.load.dataset.BatchStream`: random batches that lie on the device.

    Args:
        size: rows of a batch.
        count: how many different batches there are; they come again and again.
    """

    def __init__(self, schema: Schema, size: int, count: int, device: torch.device, seed: int = 0) -> None:
        maker = BatchMaker(schema)
        made = (maker(random_rows(schema, size, seed + k), Position(0, k + 1)) for k in range(count))
        self.batches = [batch.to(device) for batch in made]
        self.schema, self.global_batch, self.seed, self.window_rows = schema, size, 0, WINDOW_ROWS
        self.batches_per_epoch, self.rows, self.left_out, self.rows_left_out = 1 << 30, 1 << 40, (), 0

    def epoch(self, epoch: int, start_batch: int | None = None) -> Iterator[Batch]:
        """Without end."""
        k = start_batch or 0
        while True:
            b = self.batches[k % len(self.batches)]
            k += 1
            yield Batch(b.dense, b.sparse, b.label, Position(epoch, k))

    def weight(self, batch: Batch) -> float:
        """All ranks have as many rows."""
        return 1.0


def _ids(dice: np.random.Generator, cardinality: int, count: int) -> np.ndarray:
    ranks = np.exp(dice.random(count) * np.log(cardinality + 1)) - 1
    return ranks.astype(np.int64).clip(0, cardinality - 1).astype(np.int32)
