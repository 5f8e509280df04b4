"""Row groups of a Parquet file with ids -> checked arrays; what is wrong is named by file, column, row and value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from embsearch_dist.data.ids.source import IdField, IdSource
from embsearch_dist.data.store.bags import Bags
from embsearch_dist.errors import UserError

MAKE = "docs/ids.md shows how such files are made"


@dataclass
class Columns:
    """Checked rows of a row group: label, ids (or bags of them) by field, dense numbers by name, and the split.

    Attributes:
        label: ``[N]`` float32.
        ids: field -> ``[N]`` int32, or bags.
        dense: name -> ``[N]`` float32.
        split: ``[N]`` texts of the column that tells the split; empty where there is none.
    """

    label: np.ndarray
    ids: dict[str, np.ndarray | Bags] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    split: np.ndarray = field(default_factory=lambda: np.zeros(0, object))


def wanted(source: IdSource) -> dict[str, str]:
    """The columns that are read, and for what: ``label``, ``ids``, ``list``, ``weights``, ``dense`` or ``split``."""
    found = {source.label: "label"}
    for f in source.fields:
        found[f.column] = "list" if f.pooling else "ids"
        if f.weights:
            found[f.weights] = "weights"
    found |= dict.fromkeys(source.dense.values(), "dense")
    return found | ({source.split_column: "split"} if source.split_column else {})


def open_file(path: Path) -> pq.ParquetFile:
    """Raises:
    UserError: it is no whole Parquet file.
    """
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a whole Parquet file ({' '.join(str(e).split())[:160]}). Write it again") from e


def types_of(source: IdSource, path: Path, schema: pa.Schema) -> dict[str, pa.DataType]:
    """The types of the columns that are wanted, checked.

    Raises:
        UserError: one is missing, twice there or of a wrong type.
    """
    found = {}
    for name, use in wanted(source).items():
        places = schema.get_all_field_indices(name)
        if len(places) != 1:
            what = "missing" if not places else "there twice"
            near = ", ".join(schema.names[:8])
            raise UserError(f"{path}: column {name!r} is {what}; the file has {near}. Correct {source.path.name}")
        kind = schema.field(places[0]).type
        inner = kind.value_type if _is_list(kind) else kind
        fits = {
            "label": _is_number(kind) or types.is_boolean(kind),
            "ids": types.is_integer(kind),
            "list": _is_list(kind) and types.is_integer(inner),
            "weights": _is_list(kind) and _is_number(inner),
            "dense": _is_number(kind),
            "split": types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind),
        }
        if not fits[use]:
            said = {"ids": "whole numbers", "list": "lists of whole numbers", "weights": "lists of numbers"}
            want = said.get(use, "text or whole numbers" if use == "split" else "numbers")
            raise UserError(f"{path}: column {name!r} is {kind}, {use} must be {want}. Cast it; {MAKE}")
        found[name] = kind
    return found


def read(source: IdSource, path: Path, file: pq.ParquetFile) -> Iterator[Columns]:
    """Row group after row group, checked.

    Raises:
        UserError: a null, an id outside its field, a label that is neither 0 nor 1, a number that is not finite, or
            weights that do not fit their ids.
    """
    start = 0
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, columns=list(wanted(source)), use_threads=False)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: row group {group} cannot be read ({' '.join(str(e).split())[:160]})") from e
        yield _Group(source, path, start, table).columns()
        start += table.num_rows


@dataclass(frozen=True)
class _Group:
    source: IdSource
    path: Path
    start: int
    table: pa.Table

    def columns(self) -> Columns:
        source = self.source
        label = self._numbers(source.label)
        if (bad := np.flatnonzero((label != 0) & (label != 1))).size:
            self._bad(source.label, bad[0], f"{label[bad[0]]:g} is neither 0 nor 1", "Make it one of them")
        found = Columns(label)
        for f in source.fields:
            found.ids[f.name] = self._bags(f) if f.pooling else self._ids(f)
        for name, column in source.dense.items():
            values = found.dense[name] = self._numbers(column)
            if (bad := np.flatnonzero(~np.isfinite(values))).size:
                self._bad(column, bad[0], f"{values[bad[0]]} is not finite in float32", "Fill it, or scale it down")
        if source.split_column:
            found.split = self._split()
        return found

    def _whole(self, column: str) -> pa.Array:
        values = self.table[column].combine_chunks()
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            self._bad(column, row, "null", "Give it a value: COALESCE(column, 0) where id 0 means unknown")
        return values

    def _numbers(self, column: str) -> np.ndarray:
        values = self._whole(column)
        with np.errstate(over="ignore"):
            return values.cast(pa.float64(), safe=False).to_numpy().astype(np.float32)

    def _check_ids(self, f: IdField, values: np.ndarray, row_of: np.ndarray | None = None) -> np.ndarray:
        if values.size and (int(values.min()) < 0 or int(values.max()) >= f.cardinality):
            bad = int(np.flatnonzero((values < 0) | (values >= f.cardinality))[0])
            row = bad if row_of is None else int(np.searchsorted(row_of, bad, side="right") - 1)
            cure = f"Raise the cardinality of {f.name!r} in {self.source.path.name} above the largest id"
            cure = "Ids count from 0" if values[bad] < 0 else f"{cure} (here {int(values.max()):,})"
            self._bad(f.column, row, f"id {values[bad]:,} is not in 0 to {f.cardinality - 1:,}", cure)
        return values.astype(np.int32)

    def _ids(self, f: IdField) -> np.ndarray:
        return self._check_ids(f, self._whole(f.column).to_numpy())

    def _lists(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Elements and ``[N + 1]`` offsets."""
        lists = self._whole(column)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        elements = lists.flatten()
        offsets = offsets - offsets[0]
        if elements.null_count:
            place = int(np.flatnonzero(elements.is_null().to_numpy(zero_copy_only=False))[0])
            row = int(np.searchsorted(offsets, place, side="right") - 1)
            self._bad(column, row, "null in a list", "Leave it out of the list")
        return elements.to_numpy(), offsets

    def _bags(self, f: IdField) -> Bags:
        ids, offsets = self._lists(f.column)
        ids = self._check_ids(f, ids, offsets)
        if not f.weights:
            return Bags(ids, offsets)
        weights, others = self._lists(f.weights)
        if (bad := np.flatnonzero(np.diff(offsets) != np.diff(others))).size:
            n, m = np.diff(offsets)[bad[0]], np.diff(others)[bad[0]]
            self._bad(f.weights, bad[0], f"{m} weights for {n} ids", "Give each id one weight")
        weights = weights.astype(np.float32)
        if (bad := np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))).size:
            row = int(np.searchsorted(offsets, bad[0], side="right") - 1)
            self._bad(f.weights, row, f"weight {weights[bad[0]]}", "Weights are finite numbers from 0 on")
        return Bags(ids, offsets, weights)

    def _split(self) -> np.ndarray:
        column = self.source.split_column
        values = self._whole(column).cast(pa.string()).to_numpy(zero_copy_only=False)
        known = [value for value, _ in self.source.splits]
        if (bad := np.flatnonzero(~np.isin(values, known))).size:
            cure = f"Name it under split in {self.source.path.name}, or leave such rows out"
            self._bad(column, bad[0], f"{values[bad[0]]!r} is none of {', '.join(known)}", cure)
        return values

    def _bad(self, column: str, row: int, what: str, cure: str) -> NoReturn:
        raise UserError(f"{self.path}: column {column!r}, row {self.start + int(row) + 1:,}: {what}. {cure}")


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
