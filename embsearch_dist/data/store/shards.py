"""Parquet shards of one split: written with row groups of one size, read row group by row group, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.data.store.bags import Bags
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Field, Schema


def column_types(fields: Sequence[Field], dense: Sequence[str]) -> dict[str, pa.DataType]:
    """The columns of a shard in their order: a list and its weights are two, and as long in every row."""
    types: dict[str, pa.DataType] = {"label": pa.float32()}
    for field in fields:
        types[field.name] = pa.list_(pa.int32()) if field.is_list else pa.int32()
        if field.weighted:
            types[field.weights_column] = pa.list_(pa.float32())
    return types | dict.fromkeys(dense, pa.float32())


class ShardWriter:
    """Writes one ``part-NNNNN.parquet`` with row groups of exactly one size (but the last).

    The bytes depend on the rows alone, not on how they come in: they are gathered to whole row groups.
    """

    def __init__(self, path: Path, schema: pa.Schema, row_group_rows: int) -> None:
        self.schema, self.rows = schema, 0
        self._group: list[np.ndarray | list[Bags]] = []
        self._size, self._filled = row_group_rows, 0
        # Checksums tell a damaged page from a whole one; statistics would never be read.
        self._file = pq.ParquetWriter(path, schema, compression="lz4", write_statistics=False, write_page_checksum=True)

    def write(self, columns: Sequence[np.ndarray | Bags]) -> None:
        """Append rows; one array per column of the schema, all of one length (bags: ids and weights in one)."""
        start, rows = 0, len(columns[0])
        if not self._group:
            self._group = [[] if isinstance(c, Bags) else np.empty(self._size, c.dtype) for c in columns]
        while start < rows:
            n = min(rows - start, self._size - self._filled)
            for group, column in zip(self._group, columns, strict=True):
                if isinstance(column, Bags):
                    group.append(column.take(slice(start, start + n)))  # type: ignore[union-attr]
                else:
                    group[self._filled : self._filled + n] = column[start : start + n]  # type: ignore[call-overload]
            start, self._filled = start + n, self._filled + n
            if self._filled == self._size:
                self._flush()
        self.rows += rows

    def close(self) -> None:
        try:
            if self._filled:
                self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        arrays: list[pa.Array] = []
        for group in self._group:
            if isinstance(group, list):
                bags = Bags.join(group)
                offsets = pa.array(bags.offsets, pa.int32())
                parts = [bags.ids, *([] if bags.weights is None else [bags.weights])]
                arrays += [pa.ListArray.from_arrays(offsets, pa.array(part)) for part in parts]
                group.clear()
            else:
                arrays.append(pa.array(group[: self._filled]))
        self._file.write_table(pa.Table.from_arrays(arrays, schema=self.schema), row_group_size=self._filled)
        self._filled = 0


@dataclass(frozen=True)
class RowGroup:
    """One row group of one shard: the unit of reading."""

    path: Path
    index: int
    rows: int


@dataclass(frozen=True)
class Rows:
    """Columns of some rows.

    Attributes:
        ids: ``[F, N]`` int32, feature-major, in schema order: of the F fields with one id a row.
        dense: ``[N, n_dense]`` float32.
        label: ``[N]`` float32.
        bags: of the list fields, in schema order.
    """

    ids: np.ndarray
    dense: np.ndarray
    label: np.ndarray
    bags: tuple[Bags, ...] = ()

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray | slice) -> Rows:
        """The given rows, copied."""
        bags = tuple(b.take(rows) for b in self.bags)
        if isinstance(rows, slice):
            return Rows(self.ids[:, rows].copy(), self.dense[rows].copy(), self.label[rows].copy(), bags)
        # mode="clip": three times as fast as checking bounds that a permutation cannot leave.
        ids, dense = self.ids.take(rows, axis=1, mode="clip"), self.dense.take(rows, axis=0, mode="clip")
        return Rows(ids, dense, self.label.take(rows, mode="clip"), bags)

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        if len(parts) == 1:
            return parts[0]
        return Rows(
            np.concatenate([p.ids for p in parts], axis=1),
            np.concatenate([p.dense for p in parts]),
            np.concatenate([p.label for p in parts]),
            tuple(Bags.join(same) for same in zip(*(p.bags for p in parts), strict=True)),
        )


@dataclass(frozen=True)
class LeftOut:
    """A row group that is not read, because it cannot be, or all those of a file whose footer is damaged.

    :mod:`embsearch_dist.data.store.unreadable` finds them.

    Attributes:
        name: of the shard file, e.g. ``part-00000.parquet``.
        group: index of the row group; None for the whole file.
        rows: how many rows are lost; None when nothing tells.
        count: how many row groups that are.
        why: what is wrong, for people.
    """

    name: str
    group: int | None
    rows: int | None
    count: int
    why: str


class SplitRows(Protocol):
    """One split in pieces that can be read in any order: :class:`Shards`, or of a data source."""

    schema: Schema
    split: str
    directory: Path
    groups: list[RowGroup]
    rows: int

    def read(self, groups: list[RowGroup], limit: int | None = None) -> Rows:
        """Rows of the given pieces in the given order, at most ``limit``; checked."""
        ...


class Shards:
    """The Parquet shards of one split. Opening reads their footers only.

    Args:
        prepared_dir: a prepared data set.
        schema: its schema (or one that fits it).
        split: ``train``, ``validation`` or ``test``.
        left_out: row groups and files to pass over; every other one has to be there.

    Raises:
        UserError: unknown split, no or unreadable shards, or shards that do not fit the schema.
    """

    def __init__(self, prepared_dir: Path | str, schema: Schema, split: str, left_out: Sequence[LeftOut] = ()) -> None:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}. Use one of {', '.join(SPLITS)}")
        self.directory, self.schema, self.split = Path(prepared_dir) / split, schema, split
        self.groups: list[RowGroup] = []
        paths = sorted(self.directory.glob("part-*.parquet"))
        if not paths:
            raise UserError(f"{self.directory}: no part-*.parquet there. Prepare the data again")
        gone = {(entry.name, entry.group) for entry in left_out}
        for path in paths:
            if (path.name, None) not in gone:
                self.groups += [g for g in row_groups(path, schema) if (path.name, g.index) not in gone]
        self.groups = [g for g in self.groups if g.rows]
        self.rows = sum(g.rows for g in self.groups)
        lost = [entry.rows for entry in left_out]
        known = self.rows + sum(n for n in lost if n is not None)
        if split in schema.rows and (known > schema.rows[split] or (None not in lost and known != schema.rows[split])):
            raise UserError(
                f"{self.directory}: {known} rows in the shards, {schema.rows[split]} in schema.json. "
                "A shard is missing or not of this data set; prepare the data again"
            )
        if self.rows == 0:
            what = "no row group can be read" if left_out else "the split has no rows"
            raise UserError(f"{self.directory}: {what}. Prepare the data again")

    def read(self, groups: list[RowGroup], limit: int | None = None) -> Rows:
        """:func:`read_groups` with the schema of this split."""
        return read_groups(self.schema, groups, limit)


def row_groups(path: Path, schema: Schema) -> list[RowGroup]:
    """The row groups of a shard file, from its footer.

    Raises:
        UserError: there is no whole footer, or its columns do not fit the schema.
    """
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as e:
        raise _not_whole(path, e) from e
    wanted = column_types(schema.fields, schema.dense)
    found = {f.name: f.type for f in footer.schema.to_arrow_schema()}
    for name, kind in wanted.items():
        if found.get(name) != kind:
            what = f"has type {found[name]}" if name in found else "is missing"
            raise UserError(f"{path}: column {name!r} {what}, expected {kind}. Prepare the data again")
    return [RowGroup(path, i, footer.row_group(i).num_rows) for i in range(footer.num_row_groups)]


def read_groups(schema: Schema, groups: Sequence[RowGroup], limit: int | None = None) -> Rows:
    """Rows of the given row groups in the given order, at most ``limit``; checked.

    Raises:
        UserError: an unreadable row group, an id outside its field's vocabulary, a label that is
            neither 0 nor 1, a null, a dense value or weight that is not finite, or weights that do not fit
            their ids; names file, row group and value.
    """
    total = sum(g.rows for g in groups)
    total = total if limit is None else min(total, limit)
    rows = Rows(
        np.empty((sum(not f.is_list for f in schema.fields), total), np.int32),
        np.empty((total, len(schema.dense)), np.float32),
        np.empty(total, np.float32),
    )
    bags: list[list[Bags]] = [[] for f in schema.fields if f.is_list]
    start, opened, file = 0, None, None
    try:
        for group in groups:
            if start >= total:
                break
            if opened != group.path:
                if file is not None:
                    file.close()
                file, opened = _open(group.path), group.path
            start = _fill(schema, rows, bags, start, group, file)
    finally:
        if file is not None:
            file.close()
    return replace(rows, bags=tuple(Bags.join(parts) for parts in bags)) if bags else rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as e:
        raise _not_whole(path, e) from e


def _fill(schema: Schema, rows: Rows, bags: list[list[Bags]], start: int, group: RowGroup, file: pq.ParquetFile) -> int:
    """Read a row group to the place ``start``; its lists are appended to ``bags``."""
    where = f"{group.path}, row group {group.index}"
    names = list(column_types(schema.fields, schema.dense))
    try:
        table = file.read_row_group(group.index, columns=names, use_threads=False)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{where}: cannot be read ({_one_line(e)}). Prepare the data again") from e
    if table.num_rows != group.rows:
        raise UserError(f"{where}: {table.num_rows} rows, its footer says {group.rows}. Prepare the data again")
    stop = min(start + table.num_rows, len(rows))

    def whole(name: str, values: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
        if values.null_count:
            raise UserError(f"{where}: column {name!r} has {values.null_count} nulls. Prepare the data again")
        return values

    def column(name: str) -> np.ndarray:
        return whole(name, table[name]).to_numpy()[: stop - start]

    def lists(name: str) -> tuple[np.ndarray, np.ndarray]:
        """Elements and offsets."""
        column = whole(name, table[name]).slice(0, stop - start).combine_chunks()
        elements = whole(name, column.flatten())
        offsets = column.offsets.to_numpy().astype(np.int64)
        return elements.to_numpy(), offsets - offsets[0]

    label = column("label")
    bad = label[(label != 0) & (label != 1)]
    if len(bad):
        raise UserError(f"{where}: {len(bad)} labels are neither 0 nor 1, the first is {bad[0]:g}. Prepare again")
    rows.label[start:stop] = label
    single, several = iter(rows.ids), iter(bags)
    for known in schema.fields:
        if known.is_list:
            ids, offsets = lists(known.name)
            weights = None
            if known.weighted:
                weights, others = lists(known.weights_column)
                if not np.array_equal(offsets, others) or not np.isfinite(weights).all():
                    raise UserError(
                        f"{where}: column {known.weights_column!r} has not one finite weight for each id. "
                        "Prepare the data again"
                    )
            next(several).append(Bags(ids, offsets, weights))
        else:
            ids = column(known.name)
            next(single)[start:stop] = ids
        if len(ids) and (ids.min() < 0 or ids.max() >= known.cardinality):
            bad = ids[(ids < 0) | (ids >= known.cardinality)]
            raise UserError(
                f"{where}: field {known.name!r} has {len(bad)} ids outside 0..{known.cardinality - 1}, "
                f"the first is {bad[0]}. The shard is not of this schema; prepare the data again"
            )
    for i, name in enumerate(schema.dense):
        values = column(name)
        if not np.isfinite(values).all():
            raise UserError(f"{where}: dense column {name!r} has values that are not finite. Prepare again")
        rows.dense[start:stop, i] = values
    return stop


def _not_whole(path: Path, e: Exception) -> UserError:
    return UserError(f"{path}: not a whole Parquet file ({_one_line(e)}). Prepare the data again")


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200]
