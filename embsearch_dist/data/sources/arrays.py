"""Tables in memory as a data source: ids as they are, or raw values with a vocabulary of the training rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from embsearch_dist.data.formats.cells import text_of
from embsearch_dist.data.prepare.encode import standardised
from embsearch_dist.data.sources.registry import schema_of
from embsearch_dist.data.sources.tables import frame_of
from embsearch_dist.data.store.bags import offsets_of
from embsearch_dist.errors import UserError
from embsearch_dist.schema import RAW_VALUES, SPLITS, Field, Schema

LABEL = "label"  # what the loader calls it


class ArraySource:
    """Rows in memory: pandas or polars frames, pyarrow tables, mappings of numpy arrays, or iterators of any of them.

    An iterator (a generator, a cursor) is read once, here, into memory; that is how rows that cannot be read again by
    number become a source.

    >>> rows = {"user": ["u1", "u2", "u1"], "price": [1.0, 2.0, None], "label": [0, 1, 1]}
    >>> splits = {"train": rows, "validation": rows, "test": rows}
    >>> ArraySource(["user"], splits, dense=["price"], raw=True).read("train", 0, 3)["user"].to_list()
    [1, 2, 1]

    Attributes:
        schema: fields in the given order; a field has as many ids as the largest one says, or as its vocabulary has.
        fingerprint: hash of all ids, numbers and labels, and of the vocabulary.
        vocabulary: of raw values: field -> its values; the id of ``vocabulary[field][k]`` is k + 1, any other has 0.
    """

    def __init__(
        self,
        fields: Sequence[str] | Schema,
        splits: Mapping[str, Any],
        *,
        dense: Sequence[str] = (),
        label: str = LABEL,
        raw: bool = False,
        min_count: int = 1,
        name: str = "arrays",
        vocabulary: ArraySource | None = None,
    ) -> None:
        """
        Args:
            fields: names of the categorical columns (one of lists is pooled by its mean), or a schema, which says dense
                columns, numbers of ids and pooling too.
            splits: ``train``, ``validation`` and ``test``: a table each, or an iterator of tables.
            dense: names of the float columns.
            label: column of clicks, 0 or 1.
            raw: the fields hold any values, which get ids by their count in the training rows; dense columns are
                standardised on the training rows, and a gap is their mean. False: ids and numbers are used as they are.
            min_count: raw values seen less often in training share id 0.
            name: of the data set, for people.
            vocabulary: with raw, an earlier source of raw values: its ids, means and deviations are kept, and values
                that it lacks get the ids behind its own. So a model that was trained on it can be trained further.

        Raises:
            UserError: a split or column is missing, or a column holds what it cannot; the earlier source has other
                columns.
        """
        given, names = (fields, fields.names) if isinstance(fields, Schema) else (None, list(fields))
        self._dense = list(given.dense if given is not None else dense)
        self._fields, self._label, self._min_count = names, label, min_count
        weights = [f.weights_column for f in given.fields if f.weighted] if given is not None else []
        frames = {split: self._frame(splits, split, [*names, *weights, *self._dense, label]) for split in SPLITS}
        self.vocabulary: dict[str, pl.Series] = {}
        self._scale: dict[str, tuple[float, float]] = {}
        self._keeps: list[str] = []
        if vocabulary is not None:
            self._keep(vocabulary, raw)
        if raw:
            self._learn(frames["train"])
        self._frames = {split: self._encoded(frame, raw).rename({label: LABEL}) for split, frame in frames.items()}
        self.schema = given or Schema(name, tuple(map(self._field, names)), tuple(self._dense))
        if raw:
            known = {n: len(v) + 1 for n, v in self.vocabulary.items()}
            own = tuple(replace(f, cardinality=known[f.name]) for f in self.schema.fields)
            told = {**self.schema.provenance, RAW_VALUES: self._hash_of_values(), "vocabulary": {"keeps": self._keeps}}
            self.schema = replace(self.schema, fields=own, provenance=told)
        self.fingerprint = self._hash()

    def rows(self, split: str) -> int:
        return self._frames[split].height

    def read(self, split: str, start: int, stop: int) -> pl.DataFrame:
        return self._frames[split].slice(start, stop - start)

    def encode(self, table: Any) -> pl.DataFrame:
        """Other raw rows as this source has them, for a model that was trained on it: ids and standardised numbers.

        Raises:
            UserError: a column is missing, or a number is too large for float32 once standardised.
        """
        frame = _plain(frame_of(table))
        missing = [n for n in [*self.vocabulary, *self._scale] if n not in frame.columns]
        if missing:
            raise UserError(f"data source: column {missing[0]!r} is missing")
        ids = [self._ids(frame[n]) for n in self.vocabulary]
        return frame.with_columns(*ids, *(self._standard(frame, n) for n in self._scale))

    def _frame(self, splits: Mapping[str, Any], split: str, columns: Sequence[str]) -> pl.DataFrame:
        if split not in splits:
            raise UserError(f"data source: the split {split!r} is missing; give {', '.join(SPLITS)}")
        table = splits[split]
        if isinstance(table, Iterator | list | tuple):
            parts = [self._frame({split: part}, split, columns) for part in table]
            if not parts:
                raise UserError(f"data source: the split {split!r} has no rows")
            for name in parts[0].columns:
                _check_types(f"data source, split {split!r}", name, [p[name] for p in parts], name in self._fields)
            table = pl.concat(parts, how="vertical_relaxed")
        try:
            frame = frame_of(table)
        except UserError as e:
            raise UserError(f"data source, split {split!r}: {e}, or an iterator of them") from e
        missing = [c for c in columns if c not in frame.columns]
        if missing:
            raise UserError(f"data source, split {split!r}: column {missing[0]!r} is missing")
        if LABEL in columns and self._label != LABEL:
            raise UserError(f"data source: a column called {LABEL!r} beside the label {self._label!r}. Rename it")
        return _plain(frame.select(list(dict.fromkeys(columns))))

    def _keep(self, earlier: ArraySource, raw: bool) -> None:
        """Take over the ids, means and deviations of an earlier source."""
        if not raw or not earlier.vocabulary:
            raise UserError("data source: vocabulary belongs to raw=True, here and in the earlier source")
        if list(earlier.vocabulary) != self._fields or list(earlier._scale) != self._dense:
            raise UserError(
                f"data source: the earlier source has fields {', '.join(earlier.vocabulary)} and dense columns "
                f"{', '.join(earlier._scale) or 'none'}, this one {', '.join(self._fields)} and "
                f"{', '.join(self._dense) or 'none'}. Name the same in the same order, or leave vocabulary out"
            )
        self.vocabulary, self._scale = dict(earlier.vocabulary), dict(earlier._scale)
        before = schema_of(earlier)
        self._keeps = [before.data, *earlier._keeps]

    def _learn(self, train: pl.DataFrame) -> None:
        """Vocabularies and scales of the training rows, behind those that are kept; the most frequent value first, of
        equals the lesser."""
        for name in self._fields:
            column = train[name]
            values = _without_nan(_flat(column)).drop_nulls()
            if (known := self.vocabulary.get(name)) is not None and len(known):
                self.vocabulary[name] = _extended(name, known, values, self._min_count)
                continue
            counts = values.value_counts(name="rows of it").filter(pl.col("rows of it") >= self._min_count)
            order = counts.sort(["rows of it", name], descending=[True, False])
            self.vocabulary[name] = order[name]
        for name in self._dense:
            if name in self._scale:
                continue
            try:
                numbers = train[name].cast(pl.Float64).fill_nan(None).drop_nulls().to_numpy()
            except pl.exceptions.PolarsError as e:
                raise UserError(f"data source: dense column {name!r} does not hold numbers ({e})") from e
            constant = not len(numbers) or numbers.min() == numbers.max()  # rounding may leave a deviation, else
            first = float(numbers[0]) if len(numbers) else 0.0
            with np.errstate(over="ignore", invalid="ignore"):
                scale = (first, 0.0) if constant else (float(numbers.mean()), float(numbers.std()))
            if not np.isfinite(scale).all():
                raise UserError(
                    f"data source: dense column {name!r}: its values are too large to standardise. Scale them"
                )
            self._scale[name] = scale

    def _encoded(self, frame: pl.DataFrame, raw: bool) -> pl.DataFrame:
        if raw:
            frame = self.encode(frame)
        try:
            numbers = [pl.col(n).cast(pl.Float32) for n in dict.fromkeys([*self._dense, self._label])]
            return frame.with_columns(numbers).rechunk()
        except pl.exceptions.PolarsError as e:
            raise UserError(f"data source: a dense column or the label does not hold numbers ({e})") from e

    def _ids(self, column: pl.Series) -> pl.Series:
        """The ids of raw values, int32, or lists of them.

        Raises:
            UserError: the values are of a type that cannot be compared with that of the training rows.
        """
        known = self.vocabulary[column.name]
        new = pl.int_range(1, len(known) + 1, dtype=pl.Int32, eager=True)
        values = _flat(column)
        if len(known):
            alike = _alike(values, known.dtype)
            ids = alike.replace_strict(known, new, default=0, return_dtype=pl.Int32).fill_null(0)
        else:  # nothing but gaps in training
            ids = pl.zeros(len(values), pl.Int32, eager=True)
        if not isinstance(column.dtype, pl.List):
            return ids.alias(column.name)
        offsets = offsets_of(column.list.len().fill_null(0).to_numpy().astype(np.int64))
        return pl.Series(column.name, pa.LargeListArray.from_arrays(pa.array(offsets), ids.rechunk().to_arrow()))

    def _standard(self, frame: pl.DataFrame, name: str) -> pl.Series:
        x = frame[name].cast(pl.Float64).to_numpy()
        scaled = standardised(x, *self._scale[name])
        if not np.isfinite(scaled).all():
            far = x[~np.isfinite(scaled)][0]
            raise UserError(f"data source: dense column {name!r}: {far:g} is too large once standardised. Correct it")
        return pl.Series(name, scaled)

    def _field(self, name: str) -> Field:
        columns = [frame[name] for frame in self._frames.values()]
        kinds = {str(c.dtype) for c in columns if not (c.dtype.is_integer() or isinstance(c.dtype, pl.List))}
        if kinds:
            raise UserError(
                f"data source: field {name!r} must hold ids, whole numbers, got {sorted(kinds)[0]}. "
                "Give raw=True for values that are to get ids"
            )
        pooling = "mean" if isinstance(columns[0].dtype, pl.List) else ""
        largest = max((int(_flat(c).max() or 0) for c in columns if len(c)), default=0)  # type: ignore[arg-type, call-overload]
        return Field(name, largest + 1, pooling)

    def _hash_of_values(self) -> str:
        """Of what says which raw value is which id or number."""
        found = hashlib.sha256(repr(list(self._scale.items())).encode())
        for name, values in self.vocabulary.items():
            kind = "int" if values.dtype.is_integer() else str(values.dtype)
            found.update(f"{name} {kind} ".encode() + "\0".join(map(str, values.to_list())).encode())
        return found.hexdigest()[:16]

    def _hash(self) -> str:
        found = hashlib.sha256()
        for split, frame in self._frames.items():
            for name in frame.columns:
                column = frame[name]
                found.update(f"{split} {name} {len(column)} ".encode())
                if isinstance(column.dtype, pl.List):
                    found.update(column.list.len().fill_null(0).to_numpy().tobytes())
                flat = _flat(column)
                flat = flat.cast(pl.Int64) if flat.dtype.is_integer() else flat  # the same ids in any type
                found.update(str(flat.dtype).encode() + flat.to_numpy().tobytes())
        for name, values in self.vocabulary.items():
            found.update(name.encode() + "\0".join(map(str, values.to_list())).encode())
        return found.hexdigest()[:16]


def _flat(column: pl.Series) -> pl.Series:
    """The elements of a column of lists one after the other; any other column as it is."""
    if not isinstance(column.dtype, pl.List):
        return column
    column = column.fill_null([])
    return column.filter(column.list.len() > 0).explode()


def _check_types(where: str, name: str, columns: Sequence[pl.Series], values: bool) -> None:
    """Raises ``UserError`` unless the parts of a column are of one type, or hold numbers.

    Args:
        values: it is a field: a boolean is no number there.
    """
    kinds: dict[str, pl.DataType] = {}
    for column in columns:
        inner = column.dtype.inner if isinstance(column.dtype, pl.List) else column.dtype
        if inner == pl.Null:
            continue
        number = inner.is_numeric() or (inner == pl.Boolean and not values)
        kind = (
            "number" if number else str(pl.Datetime("us", inner.time_zone) if isinstance(inner, pl.Datetime) else inner)
        )
        kinds.setdefault(f"list of {kind}" if isinstance(column.dtype, pl.List) else kind, column.dtype)
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise UserError(f"{where}: column {name!r} is {one} in one of its tables and {other} in another. Give one type")


def _without_nan(values: pl.Series) -> pl.Series:
    """NaN is a gap in every table, as it is in one of pandas."""
    return values.fill_nan(None) if values.dtype.is_float() else values


def _alike(values: pl.Series, kind: pl.DataType) -> pl.Series:
    """Values in the type of a vocabulary; null for those that this type has not: 1.7 is not the whole number 1.

    Raises:
        UserError: types that are not compared.
    """
    values, own = _without_nan(values), values.dtype
    if own in (kind, pl.Null):
        return values.cast(kind)
    if kind == pl.String and not own.is_nested():
        return text_of(values)  # 7.0 is the text 7, as in files
    numbers, moments = own.is_numeric() and kind.is_numeric(), False
    if isinstance(own, pl.Datetime) and isinstance(kind, pl.Datetime):
        moments = (own.time_zone is None) == (kind.time_zone is None)
    if not (numbers or moments or own == pl.String):
        raise UserError(
            f"data source: field {values.name!r} holds {own}, but {kind} in the rows that its ids are of. "
            "Give both one type"
        )
    found = values.cast(kind, strict=False)
    if own == pl.String or (own.is_float() and kind.is_float()):
        return found
    return found.set((found.cast(own, strict=False) != values).fill_null(False), None)


def _extended(name: str, known: pl.Series, values: pl.Series, min_count: int) -> pl.Series:
    """A vocabulary with the values behind it that it lacks, by their count.

    Raises:
        UserError: they are of another type.
    """
    if not len(values):
        return known
    if values.dtype != known.dtype:
        if not (values.dtype.is_integer() and known.dtype.is_integer()):
            raise UserError(
                f"data source: field {name!r} holds {values.dtype}, the earlier source has {known.dtype}. "
                "Give both one type"
            )
        values = values.cast(pl.Int64)
        known = known.cast(pl.Int64)
    new = values.filter(~values.is_in(known.implode()))
    counts = new.value_counts(name="rows of it").filter(pl.col("rows of it") >= min_count)
    order = counts.sort(["rows of it", values.name], descending=[True, False])[values.name]
    return pl.concat([known, order.alias(known.name)])


def _plain(frame: pl.DataFrame) -> pl.DataFrame:
    """Arrays of one length a row (two-dimensional ones of numpy) are lists, too, and categories are their texts."""
    arrays = [n for n, kind in frame.schema.items() if isinstance(kind, pl.Array)]
    texts = [n for n, kind in frame.schema.items() if isinstance(kind, pl.Categorical | pl.Enum)]
    return frame.with_columns(*(pl.col(n).arr.to_list() for n in arrays), *(pl.col(n).cast(pl.String) for n in texts))
