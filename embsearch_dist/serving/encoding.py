"""Raw rows -> ids and standardised numbers, as the training data had them, with the vocabulary of a model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from embsearch_dist.data.formats.columns import Column, bucket
from embsearch_dist.data.prepare.encode import standardised
from embsearch_dist.data.prepare.staging import leading, numbered
from embsearch_dist.data.store.bags import offsets_of
from embsearch_dist.errors import UserError
from embsearch_dist.serving.directory import ModelDirectory
from embsearch_dist.serving.tables import Ids, ids_of

FEW = 4096  # values of a vocabulary that polars looks up faster than an index
SOME = 32  # rows that Python looks up faster than polars prepares for them


class Index:
    """Values -> ids from 1 on, 0 for any other.

    A hash table in arrays that is made once: polars and pyarrow make theirs anew for every look-up, which for a million
    values takes a second. What it finds is compared with the value itself.
    """

    def __init__(self, values: pl.Series) -> None:
        self.values = values
        self._few = pl.Enum(values) if len(values) <= FEW else None
        self._ids: dict[str | None, int] = {}
        if self._few is None:
            self._make()

    def _make(self) -> None:
        hashes, count = self.values.hash(0).to_numpy(), len(self.values)
        size = 1 << (2 * count - 1).bit_length()
        self._mask = np.uint64(size - 1)
        self._table = np.zeros(size, np.int32)  # 0: free
        self._hashes = np.concatenate([np.zeros(1, np.uint64), hashes])
        left, place = np.arange(1, count + 1, dtype=np.int32), (hashes & self._mask).astype(np.int64)
        while len(left):
            free = self._table[place] == 0
            self._table[place[free]] = left[free]
            lost = self._table[place] != left  # several may have wanted one place: the last got it
            left, place = left[lost], (place[lost] + 1) & int(self._mask)

    def __call__(self, values: pl.Series) -> np.ndarray:
        """``[N]`` int32 ids of ``[N]`` texts; null is 0."""
        if len(self.values) == 0:
            return np.zeros(len(values), np.int32)
        if self._few is not None:
            if len(values) <= SOME:
                self._ids = self._ids or {value: k for k, value in enumerate(self.values, 1)}
                return np.array([self._ids.get(value, 0) for value in values], np.int32)
            code = values.cast(self._few, strict=False).to_physical().cast(pl.Int32)
            return (code + 1).fill_null(0).to_numpy()
        hashes = values.hash(0).to_numpy()
        where = (hashes & self._mask).astype(np.int64)
        ids = self._table[where]
        wrong = np.flatnonzero((self._hashes[ids] != hashes) & (ids > 0))
        where = where[wrong]
        while len(wrong):
            where = (where + 1) & int(self._mask)
            ids[wrong] = found = self._table[where]
            on = (self._hashes[found] != hashes[wrong]) & (found > 0)
            wrong, where = wrong[on], where[on]
        same = (self.values.gather(np.maximum(ids, 1) - 1) == values).fill_null(False).to_numpy()
        return np.where(same, ids, np.int32(0))


class GivenIds:
    """In the place of an :class:`Index` where rows bring ids that another engine has made, written as whole numbers."""

    def __init__(self, field: str, cardinality: int) -> None:
        self.field, self.cardinality = field, cardinality

    def __call__(self, values: pl.Series) -> np.ndarray:
        """``[N]`` int32 ids of ``[N]`` texts; null is 0.

        Raises:
            UserError: a text is no id of the field.
        """
        ids = values.cast(pl.Int64, strict=False)
        bad = values.is_not_null() & ((ids < 0) | (ids >= self.cardinality)).fill_null(True)
        if bad.any():
            raise UserError(
                f"field {self.field!r}: {str(values.filter(bad)[0])[:40]!r} is not in 0 to {self.cardinality - 1:,}: "
                "this model was trained on ids that another engine has made. Give rows with its ids, not with values"
            )
        return ids.fill_null(0).to_numpy().astype(np.int32)


@dataclass
class Encoded:
    """Rows as the model takes them, and how many cells of each field had a value without an id."""

    ids: Ids
    unseen: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.ids.rows


class RowEncoder:
    """Frames of a reader (text, numbers, lists) -> :class:`Ids`.

    Args:
        directory: of the model.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        columns = {c.name: c for c in directory.source.columns}
        self.fields = [columns[n] for n in directory.fields]
        self.dense, self.scale = list(directory.schema.dense), dict(directory.scale)
        self.index: dict[str, Callable[[pl.Series], np.ndarray]]
        if directory.source.given_ids:
            counts = {f.name: f.cardinality for f in directory.schema.fields}
            self.index = {n: GivenIds(n, counts[n]) for n in directory.fields}
        else:
            self.index = {n: Index(directory.vocabulary(n)) for n in directory.fields}

    def __call__(self, frame: pl.DataFrame) -> Encoded:
        """Raises:
        UserError: a number is too large for float32, once standardised.
        """
        single: dict[str, np.ndarray] = {}
        lists: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = {}
        unseen: dict[str, int] = {}
        for column in self.fields:
            series = frame[column.name]
            if column.bag is not None:
                lists[column.name], unseen[column.name] = self._list(column, series)
            else:
                ids, present = self._single(column, series)
                single[column.name] = ids
                unseen[column.name] = present - int(np.count_nonzero(ids))
        dense = np.zeros((frame.height, len(self.dense)), np.float32)
        for k, name in enumerate(self.dense):
            x = frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
            with np.errstate(over="ignore"):  # told below
                dense[:, k] = standardised(x, *self.scale[name])
            if not np.isfinite(dense[:, k]).all():
                far = x[~np.isfinite(dense[:, k])][0]
                raise UserError(f"column {name!r}: {far:g} is too large for the model. Correct it, or leave it empty")
        return Encoded(ids_of(single, lists, dense), unseen)

    def _single(self, column: Column, series: pl.Series) -> tuple[np.ndarray, int]:
        """``[N]`` ids, and how many rows have a value."""
        present = len(series) - series.null_count()
        if column.kind != "bucketed":
            return self.index[column.name](series), present
        # Several numbers fall into one bucket, and few are distinct.
        codes, values = numbered(series)
        found = self.index[column.name](bucket(pl.Series(values)))
        return np.concatenate([np.zeros(1, np.int32), found])[codes], present

    def _list(self, column: Column, series: pl.Series) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray | None], int]:
        assert column.bag is not None
        elements, lengths, _ = leading(series, column.bag.max_length)
        weights = None
        if column.bag.weighted:
            weights = elements.struct.field("weight").to_numpy().astype(np.float32, copy=True)
            elements = elements.struct.field("value")
        ids = self.index[column.name](elements)
        return (ids, offsets_of(lengths), weights), len(ids) - int(np.count_nonzero(ids))


def add_counts(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add the counts of unseen values."""
    for name, n in more.items():
        total[name] = total.get(name, 0) + n
