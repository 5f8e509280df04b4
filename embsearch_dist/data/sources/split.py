"""One split of a data source as the loader reads it: pieces of rows, each checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embsearch_dist.data.load.classes import Classes
from embsearch_dist.data.sources.source import DataSource
from embsearch_dist.data.store.bags import Bags, offsets_of
from embsearch_dist.data.store.shards import RowGroup, Rows
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Field, Schema

PIECE_ROWS = 1 << 16  # as many as a row group of a shard has; the order of samples depends on it
NUMBERS = "iub"  # kinds of numpy that hold whole numbers


class SourceSplit:
    """What :class:`embsearch_dist.data.store.shards.Shards` is to files: pieces that can be read in any order.

    Raises:
        UserError: unknown split, or one without rows.
    """

    def __init__(self, source: DataSource, schema: Schema, split: str) -> None:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}. Use one of {', '.join(SPLITS)}")
        self.source, self.schema, self.split, self.directory = source, schema, split, Path(split)
        self.rows = row_count(source, split)
        starts = range(0, self.rows, PIECE_ROWS)
        self.groups = [RowGroup(Path(split), k, min(PIECE_ROWS, self.rows - at)) for k, at in enumerate(starts)]

    def read(self, groups: Sequence[RowGroup], limit: int | None = None) -> Rows:
        """Rows of the given pieces in the given order, at most ``limit``.

        Raises:
            UserError: see :func:`rows_of`.
        """
        total = sum(g.rows for g in groups)
        left = total if limit is None else min(total, limit)
        parts = []
        for split, start, stop in _ranges(groups):
            stop = min(stop, start + left)
            if stop > start:
                parts.append(read_range(self.source, self.schema, split, start, stop))
            left -= stop - start
        return Rows.join(parts)

    def classes(self) -> Classes:
        """Rows and clicks; reads all of the split."""
        clicks = 0
        for start in range(0, self.rows, PIECE_ROWS):
            stop = min(start + PIECE_ROWS, self.rows)
            table, where = self.source.read(self.split, start, stop), said(self.source, self.split, start, stop)
            clicks += round(float(_numbers(table, "label", stop - start, where).sum()))
        return Classes(self.split, self.rows, clicks)


def row_count(source: DataSource, split: str) -> int:
    """Rows of a split.

    Raises:
        UserError: the source does not say a whole number above 0.
    """
    rows = source.rows(split)
    if not isinstance(rows, int | np.integer) or isinstance(rows, bool) or rows < 1:
        raise UserError(f"{named(source)}: rows({split!r}) must be a whole number of at least 1, got {rows!r}")
    return int(rows)


def named(source: DataSource) -> str:
    """A source in a message."""
    return f"data source {source.schema.dataset!r}"


def read_range(source: DataSource, schema: Schema, split: str, start: int, stop: int) -> Rows:
    """Rows ``start`` to ``stop - 1`` of a split, checked."""
    return rows_of(schema, source.read(split, start, stop), stop - start, said(source, split, start, stop))


def said(source: DataSource, split: str, start: int, stop: int) -> str:
    """Some rows in a message."""
    return f"{named(source)}, {split} rows {start:,} to {stop - 1:,}"


def _ranges(groups: Sequence[RowGroup]) -> list[tuple[str, int, int]]:
    """(split, start, stop) of the pieces; neighbours are one range."""
    found: list[tuple[str, int, int]] = []
    for group in groups:
        split, start = group.path.name, group.index * PIECE_ROWS
        if found and found[-1][0] == split and found[-1][2] == start:
            found[-1] = (split, found[-1][1], start + group.rows)
        else:
            found.append((split, start, start + group.rows))
    return found


def rows_of(schema: Schema, table: Any, count: int, where: str) -> Rows:
    """What a source has read, as the loader takes it.

    Args:
        table: see :meth:`DataSource.read`.
        count: rows that were asked for.
        where: in front of messages.

    Raises:
        UserError: a column is missing or of another length, an id outside its field, a label that is neither 0 nor 1,
            or a number that is not finite; names column, rows and value.
    """
    label = _numbers(table, "label", count, where)
    bad = label[(label != 0) & (label != 1)]
    if len(bad):
        raise UserError(f"{where}: {len(bad)} labels are neither 0 nor 1, the first is {bad[0]:g}")
    single = [f for f in schema.fields if not f.is_list]
    ids = np.empty((len(single), count), np.int32)
    for row, field in zip(ids, single, strict=True):
        row[:] = _checked(_column(table, field.name, count, where), field, where)
    dense = np.empty((count, len(schema.dense)), np.float32)
    for k, name in enumerate(schema.dense):
        dense[:, k] = _numbers(table, name, count, where)
    bags = tuple(_bags(table, field, count, where) for field in schema.fields if field.is_list)
    return Rows(ids, dense, label.astype(np.float32), bags)


def _cells(table: Any, name: str, where: str) -> Any:
    try:
        return table[name]
    except (KeyError, IndexError, ValueError, pl.exceptions.ColumnNotFoundError) as e:
        raise UserError(f"{where}: column {name!r} is missing") from e


def _column(table: Any, name: str, count: int, where: str) -> np.ndarray:
    values = np.asarray(_cells(table, name, where))
    if values.shape != (count,):
        raise UserError(f"{where}: column {name!r} has the shape {list(values.shape)}, {count} rows were asked for")
    return values


def _numbers(table: Any, name: str, count: int, where: str) -> np.ndarray:
    values = _column(table, name, count, where)
    try:
        values = values.astype(np.float32)
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: column {name!r} does not hold numbers ({e})") from e
    if not np.isfinite(values).all():
        raise UserError(f"{where}: column {name!r} has missing values or values that are not finite")
    return values


def _checked(ids: np.ndarray, field: Field, where: str) -> np.ndarray:
    if len(ids) and ids.dtype.kind not in NUMBERS:
        raise UserError(f"{where}: field {field.name!r} must hold whole numbers without gaps, got {ids.dtype}")
    bad = ids[(ids < 0) | (ids >= field.cardinality)]
    if len(bad):
        raise UserError(
            f"{where}: field {field.name!r} has {len(bad)} ids outside 0..{field.cardinality - 1}, "
            f"the first is {bad[0]}"
        )
    return ids


def _bags(table: Any, field: Field, count: int, where: str) -> Bags:
    ids, lengths = _lists(table, field.name, count, where)
    weights = None
    if field.weighted:
        weights, others = _lists(table, field.weights_column, count, where)
        weights = weights.astype(np.float32)
        if not np.array_equal(lengths, others) or not np.isfinite(weights).all():
            raise UserError(f"{where}: column {field.weights_column!r} has not one finite weight for each id")
    return Bags(_checked(ids, field, where).astype(np.int32), offsets_of(lengths), weights)


def _lists(table: Any, name: str, count: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Elements of all rows one after the other, and how many each row has."""
    try:
        column = pl.Series(name, _cells(table, name, where))
        if len(column) and not isinstance(column.dtype, pl.List | pl.Array):
            raise TypeError(f"type {column.dtype}")
        lengths = column.list.len() if isinstance(column.dtype, pl.List) else column.arr.len()
    except (TypeError, ValueError, AttributeError, pl.exceptions.PolarsError) as e:
        raise UserError(f"{where}: column {name!r} does not hold a list a row ({e})") from e
    if len(column) != count or column.null_count():
        raise UserError(f"{where}: column {name!r} must hold {count} lists, got {len(column) - column.null_count()}")
    flat = column.filter(lengths > 0).explode()
    if flat.null_count():
        raise UserError(f"{where}: column {name!r} has missing values in its lists")
    return flat.to_numpy() if len(flat) else np.zeros(0, np.int32), lengths.to_numpy().astype(np.int64)
