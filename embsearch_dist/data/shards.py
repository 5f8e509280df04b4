"""Parquet shards of one split: written with row groups of one size, read row group by row group, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Schema


class ShardWriter:
    """Writes one ``part-NNNNN.parquet`` with row groups of exactly one size (but the last).

    The bytes depend on the rows alone, not on how they come in: they are gathered to whole row groups.
    """

    def __init__(self, path: Path, schema: pa.Schema, row_group_rows: int) -> None:
        self.schema, self.rows = schema, 0
        self._group = [np.empty(row_group_rows, f.type.to_pandas_dtype()) for f in schema]
        self._size, self._filled = row_group_rows, 0
        # Checksums tell a damaged page from a whole one; statistics would never be read.
        self._file = pq.ParquetWriter(path, schema, compression="lz4", write_statistics=False, write_page_checksum=True)

    def write(self, columns: Sequence[np.ndarray]) -> None:
        """Append rows; one array per column of the schema, all of one length."""
        start, rows = 0, len(columns[0])
        while start < rows:
            n = min(rows - start, self._size - self._filled)
            for group, column in zip(self._group, columns, strict=True):
                group[self._filled : self._filled + n] = column[start : start + n]
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
        arrays = [pa.array(group[: self._filled], f.type) for group, f in zip(self._group, self.schema)]
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
        ids: ``[F, N]`` int32, feature-major, in schema order.
        dense: ``[N, n_dense]`` float32.
        label: ``[N]`` float32.
    """

    ids: np.ndarray
    dense: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray | slice) -> Rows:
        """The given rows, copied."""
        if isinstance(rows, slice):
            return Rows(self.ids[:, rows].copy(), self.dense[rows].copy(), self.label[rows].copy())
        # mode="clip": three times as fast as checking bounds that a permutation cannot leave.
        ids, dense = self.ids.take(rows, axis=1, mode="clip"), self.dense.take(rows, axis=0, mode="clip")
        return Rows(ids, dense, self.label.take(rows, mode="clip"))

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        if len(parts) == 1:
            return parts[0]
        return Rows(
            np.concatenate([p.ids for p in parts], axis=1),
            np.concatenate([p.dense for p in parts]),
            np.concatenate([p.label for p in parts]),
        )


class Shards:
    """The Parquet shards of one split. Opening reads their footers only.

    Raises:
        UserError: unknown split, no or unreadable shards, or shards that do not fit the schema.
    """

    def __init__(self, prepared_dir: Path | str, schema: Schema, split: str) -> None:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}. Use one of {', '.join(SPLITS)}")
        self.directory, self.schema, self.split = Path(prepared_dir) / split, schema, split
        self.groups: list[RowGroup] = []
        paths = sorted(self.directory.glob("part-*.parquet"))
        if not paths:
            raise UserError(f"{self.directory}: no part-*.parquet there. Prepare the data again")
        wanted = {"label": pa.float32()} | dict.fromkeys(schema.names, pa.int32())
        wanted |= dict.fromkeys(schema.dense, pa.float32())
        for path in paths:
            footer = self._footer(path)
            found = {f.name: f.type for f in footer.schema.to_arrow_schema()}
            for name, kind in wanted.items():
                if found.get(name) != kind:
                    what = f"has type {found[name]}" if name in found else "is missing"
                    raise UserError(f"{path}: column {name!r} {what}, expected {kind}. Prepare the data again")
            self.groups += [RowGroup(path, i, footer.row_group(i).num_rows) for i in range(footer.num_row_groups)]
        self.groups = [g for g in self.groups if g.rows]
        self.rows = sum(g.rows for g in self.groups)
        if split in schema.rows and self.rows != schema.rows[split]:
            raise UserError(
                f"{self.directory}: {self.rows} rows in the shards, {schema.rows[split]} in schema.json. "
                "A shard is missing or not of this data set; prepare the data again"
            )
        if self.rows == 0:
            raise UserError(f"{self.directory}: the split has no rows. Prepare the data again")

    @staticmethod
    def _footer(path: Path) -> pq.FileMetaData:
        try:
            return pq.read_metadata(path)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: not a whole Parquet file ({_one_line(e)}). Prepare the data again") from e

    def read(self, groups: list[RowGroup], limit: int | None = None) -> Rows:
        """Rows of the given row groups in the given order, at most ``limit``; checked.

        Raises:
            UserError: an unreadable row group, an id outside its field's vocabulary, a label that is
                neither 0 nor 1, a null or a dense value that is not finite; names file, row group and value.
        """
        total = sum(g.rows for g in groups)
        total = total if limit is None else min(total, limit)
        schema = self.schema
        rows = Rows(
            np.empty((len(schema.fields), total), np.int32),
            np.empty((total, len(schema.dense)), np.float32),
            np.empty(total, np.float32),
        )
        start, opened, file = 0, None, None
        try:
            for group in groups:
                if start >= total:
                    break
                if opened != group.path:
                    if file is not None:
                        file.close()
                    file, opened = self._open(group.path), group.path
                start = self._fill(rows, start, group, file)
        finally:
            if file is not None:
                file.close()
        return rows

    @staticmethod
    def _open(path: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: not a whole Parquet file ({_one_line(e)}). Prepare the data again") from e

    def _fill(self, rows: Rows, start: int, group: RowGroup, file: pq.ParquetFile) -> int:
        where = f"{group.path}, row group {group.index}"
        names = ["label", *self.schema.names, *self.schema.dense]
        try:
            table = file.read_row_group(group.index, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{where}: cannot be read ({_one_line(e)}). Prepare the data again") from e
        stop = min(start + table.num_rows, len(rows))

        def column(name: str) -> np.ndarray:
            values = table[name]
            if values.null_count:
                raise UserError(f"{where}: column {name!r} has {values.null_count} nulls. Prepare the data again")
            return values.to_numpy()[: stop - start]

        label = column("label")
        bad = label[(label != 0) & (label != 1)]
        if len(bad):
            raise UserError(f"{where}: {len(bad)} labels are neither 0 nor 1, the first is {bad[0]:g}. Prepare again")
        rows.label[start:stop] = label
        for i, known in enumerate(self.schema.fields):
            ids = column(known.name)
            if len(ids) and (ids.min() < 0 or ids.max() >= known.cardinality):
                bad = ids[(ids < 0) | (ids >= known.cardinality)]
                raise UserError(
                    f"{where}: field {known.name!r} has {len(bad)} ids outside 0..{known.cardinality - 1}, "
                    f"the first is {bad[0]}. The shard is not of this schema; prepare the data again"
                )
            rows.ids[i, start:stop] = ids
        for i, name in enumerate(self.schema.dense):
            values = column(name)
            if not np.isfinite(values).all():
                raise UserError(f"{where}: dense column {name!r} has values that are not finite. Prepare again")
            rows.dense[start:stop, i] = values
        return stop


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200]
