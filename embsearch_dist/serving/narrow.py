"""Whole numbers in floats that cannot hold them: a model that knows 16777217 must not be asked about a float32, which
has only its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from embsearch_dist.data.formats.cells import EXACT
from embsearch_dist.data.formats.opening import PARQUET, packing
from embsearch_dist.data.formats.parquet import limit_of
from embsearch_dist.errors import UserError
from embsearch_dist.serving.directory import ModelDirectory
from embsearch_dist.serving.reading import schema_of

FLOATS: dict[float, type[np.floating]] = {2.0**11: np.float16, 2.0**24: np.float32, EXACT: np.float64}
"""By :func:`embsearch_dist.data.formats.parquet.limit_of`."""


@dataclass(frozen=True)
class Narrow:
    """A column of rows to be predicted whose large numbers may stand for several ids.

    Attributes:
        field: of the model.
        column: of the file.
        file: that has the narrowest floats.
        type: of the numbers.
        limit: from which number on whole numbers are not all held.
    """

    field: str
    column: str
    file: Path
    type: pa.DataType
    limit: float

    def check(self, frame: pl.DataFrame) -> None:
        """Raises:
        UserError: a value of the frame, as readers give it, is beyond what the type holds.
        """
        values = frame[self.field]
        if values.dtype == pl.List:
            values = values.explode()
            values = values.struct.field("value") if values.dtype == pl.Struct else values
        large = values.filter((values.cast(pl.Float64, strict=False).abs() >= self.limit).fill_null(False))
        if len(large):
            raise UserError(
                f"{self.file}: column {self.column!r} is {self.type}, which does not tell {large[0]} from its "
                "neighbours, but the training data did. Write the column as whole numbers or text"
            )


def narrow_columns(directory: ModelDirectory, files: Sequence[Path]) -> list[Narrow]:
    """The columns of Parquet files with the model's ids in narrower floats than those that it was trained on.

    A model that was trained on such floats knows none of the numbers that they do not hold, and takes them.
    """
    schemas = {file: schema_of(file) for file in files if packing(file) == PARQUET}
    found = []
    for column in directory.source.columns:
        if column.name not in directory.fields or column.kind not in ("categorical", "list"):
            continue
        raw = directory.source.raw[column.name]
        types = {file: _value_type(schema.field(raw).type) for file, schema in schemas.items()}
        limits = {file: limit for file, type_ in types.items() if (limit := limit_of(type_)) in FLOATS}
        if limits:
            file = min(limits, key=limits.__getitem__)
            if _knows_more(directory, column.name, FLOATS[limits[file]]):
                found.append(Narrow(column.name, raw, file, types[file], limits[file]))
    return found


def _value_type(type_: pa.DataType) -> pa.DataType:
    """Of the single values in a column of a type."""
    if isinstance(type_, pa.BaseExtensionType):
        return _value_type(type_.storage_type)
    nested = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return _value_type(type_.value_type) if nested or pa.types.is_dictionary(type_) else type_


def _knows_more(directory: ModelDirectory, field: str, floats: type[np.floating]) -> bool:
    """Whether a field of the model has ids of whole numbers that a type of floats does not hold."""
    if directory.source.given_ids:
        sizes = {f.name: f.cardinality for f in directory.schema.fields}
        known = np.arange(max(sizes[field] - 2, 0), sizes[field])  # one of two neighbours is odd
    else:
        known = directory.vocabulary(field).cast(pl.Int64, strict=False).drop_nulls().to_numpy()
    with np.errstate(all="ignore"):  # what is too large for the type comes back as another number
        return bool((known.astype(floats).astype(np.int64) != known).any())
