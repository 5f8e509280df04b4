"""Parquet files: the types of all wanted columns agreed over all files before a row is read, then rows as cells.

Types whose values have one meaning go together (whole numbers of any size, floats and decimals; null with
anything), because :func:`embsearch_dist.data.formats.cells.text_of` gives one value one text. Others are refused
with both files and what to write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.data.formats.cells import EXACT, Spelling
from embsearch_dist.data.formats.columns import Rows
from embsearch_dist.data.formats.opening import PARQUET, packing
from embsearch_dist.errors import UserError

PARQUET_ROWS = 1 << 17
NUMBERS = ("whole", "float", "decimal")
SINGLE = (*NUMBERS, "truth", "text", "date", "timestamp", "timestamp with zone", "null")
LISTS = tuple(f"list of {kind}" for kind in SINGLE)
DATES = ("text", "date", "timestamp", "timestamp with zone")
TIMES = ("time", "digits", "dates")
# What kinds of columns a use takes.
ALLOWED: dict[str, tuple[str, ...]] = {
    "label": (*NUMBERS, "truth", "text", "null"),
    "time": (*NUMBERS, *DATES),
    "digits": (*NUMBERS, *DATES),
    "dates": DATES,
    "categorical": SINGLE,
    "number": (*NUMBERS, "truth", "text", "null"),
    "list": ("text", "null", *LISTS),
    "weights": ("text", "null", *(f"list of {kind}" for kind in (*NUMBERS, "text", "null"))),
}
WANTED = {
    "label": "a number, true and false, or text",
    "time": "a number, a date, a timestamp or text",
    "digits": "a whole number, a date, a timestamp or text",
    "dates": "text of the given `format`, a date or a timestamp; numbers that are no dates need no `format`",
    "categorical": "text, a number or a date (a list: `kind: list`)",
    "number": "a number",
    "list": "a list of text or numbers, or text",
    "weights": "a list of numbers, or text",
}
# From here on a float cannot tell a whole number from the next one.
LIMITS: tuple[tuple[Callable[[pa.DataType], bool], float], ...] = (
    (pa.types.is_float16, 2.0**11),
    (pa.types.is_float32, 2.0**24),
    (pa.types.is_float64, EXACT),
)
IS: tuple[tuple[str, Callable[[pa.DataType], bool]], ...] = (
    ("null", pa.types.is_null),
    ("truth", pa.types.is_boolean),
    ("whole", pa.types.is_integer),
    ("float", pa.types.is_floating),
    ("decimal", lambda t: pa.types.is_decimal(t) and not pa.types.is_decimal256(t)),  # polars has 38 digits
    ("date", pa.types.is_date),
    ("text", pa.types.is_string),
    ("text", pa.types.is_large_string),
    ("text", pa.types.is_string_view),
)


def kind_of(type_: pa.DataType) -> str:
    """What kind of values a type holds; the name of the type itself when it is none that is read."""
    type_ = plain(type_)
    if pa.types.is_timestamp(type_):
        return "timestamp with zone" if type_.tz else "timestamp"
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return f"list of {kind_of(type_.value_type)}"
    return next((name for name, test in IS if test(type_)), str(type_))


def limit_of(type_: pa.DataType) -> float:
    """From which number on a type (of a list: of its values) merges whole numbers; infinite where it never does."""
    if isinstance(type_, pa.BaseExtensionType):
        return limit_of(type_.storage_type)
    if isinstance(type_, pa.DictionaryType | pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return limit_of(type_.value_type)
    return next((limit for test, limit in LIMITS if test(type_)), math.inf)


def plain(type_: pa.DataType) -> pa.DataType:
    """A type without dictionaries and wrappers, as polars reads it."""
    if isinstance(type_, pa.BaseExtensionType):
        return plain(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return plain(type_.value_type)
    if pa.types.is_date64(type_):
        return pa.date32()
    if pa.types.is_decimal(type_) and type_.precision <= 38:
        return pa.decimal128(type_.precision, type_.scale)
    if pa.types.is_float16(type_):
        return pa.float32()
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        value = plain(type_.value_type)
        return type_ if value == type_.value_type else pa.large_list(value)
    return type_


@dataclass(frozen=True)
class Agreed:
    """Parquet files whose types go together.

    Attributes:
        files: those that have rows.
        wanted: the columns to read.
        coarse: columns of values that some file holds as floats, and from which number on the narrowest of these
            cannot tell which whole number it was: 2^53, 2^24 for 32 bits, 2^11 for 16.
        exact: of these the columns that another file holds more exactly, and what :func:`_check_exact` says of both.
    """

    files: tuple[Path, ...]
    wanted: tuple[str, ...]
    coarse: Mapping[str, float]
    exact: Mapping[str, str]


def agree(
    files: Sequence[Path], uses: Sequence[tuple[str, str, str]], check: Callable[[Path, tuple[str, ...]], None]
) -> Agreed:
    """Compare the types of all wanted columns over all files that have rows.

    Args:
        files: in the order of their rows.
        uses: key of the source file, column, and what for (a key of :data:`ALLOWED`, or ``kept`` for any type).
        check: called with a file and its column names; raises for one that is not there.

    Raises:
        UserError: a column that is there twice, a type that its use does not take, or two that do not go together.
    """
    schemas: dict[Path, pa.Schema] = {}
    for file in files:
        with opened(file) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        if rows == 0:
            continue
        check(file, tuple(schema.names))
        for _, column, _ in uses:
            if schema.names.count(column) > 1:
                raise UserError(f"{file}: column {column!r} is there twice. Rename one of them")
        schemas[file] = schema
    coarse: dict[str, float] = {}
    exact: dict[str, str] = {}
    for key, column, use in (u for u in uses if u[2] != "kept"):
        first: dict[str, Path] = {}
        for file, schema in schemas.items():
            type_ = schema.field(column).type
            if kind_of(type_) not in ALLOWED[use] or (use == "digits" and limit_of(type_) < EXACT):
                raise UserError(f"{file}: {key}: column {column!r} is {type_}. Write {WANTED[use]}")
            first.setdefault(_group(kind_of(type_), use), file)
        kinds = [k for k in first if k != "null"]
        if any(k.startswith("list of ") and k != "list of null" for k in kinds):
            kinds = [k for k in kinds if k != "list of null"]
        if len(kinds) > 1:
            one, other = first[kinds[0]], first[kinds[1]]
            raise UserError(
                f"{other}: {key}: column {column!r} is {schemas[other].field(column).type}, but "
                f"{schemas[one].field(column).type} in {one}. Write all files with one type"
            )
        limits = {file: limit_of(t) for file in schemas if _is_number(t := schemas[file].field(column).type)}
        if use not in ("categorical", "list") or min(limits.values(), default=math.inf) == math.inf:
            continue
        least, most = min(limits, key=limits.__getitem__), max(limits, key=limits.__getitem__)
        coarse[column] = limits[least]
        if limits[most] > limits[least]:
            exact[column] = " but ".join(f"{_shown(schemas[f].field(column).type)} in {f}" for f in (most, least))
    wanted = tuple(dict.fromkeys(column for _, column, _ in uses))
    return Agreed(tuple(schemas), wanted, coarse, exact)


def _is_number(type_: pa.DataType) -> bool:
    return kind_of(type_).removeprefix("list of ") in NUMBERS


def _shown(type_: pa.DataType) -> str:
    """A type of numbers, or of lists of them, for people."""
    bits = {limit: size for size, (_, limit) in zip((16, 32, 64), LIMITS, strict=True)}
    if (limit := limit_of(type_)) in bits:
        return f"floats of {bits[limit]} bits"
    return "decimals" if kind_of(type_).endswith("decimal") else "whole numbers"


def _group(kind: str, use: str) -> str:
    """Kinds of one group may stand in the files of one column."""
    if kind.startswith("list of "):
        return "list of " + _group(kind.removeprefix("list of "), use)
    if kind in NUMBERS or (kind == "truth" and use in ("label", "number")):
        return "number"
    return "timestamp" if kind == "date" and use in TIMES else kind


def opened(file: Path) -> pq.ParquetFile:
    """The file, for use in a ``with``.

    Raises:
        UserError: it cannot be read as Parquet.
    """
    if (kind := packing(file)) != PARQUET:
        what = f"it is {kind}, to be unpacked" if kind else "it does not begin like one"
        raise UserError(f"{file}: cannot be read as Parquet: {what}. Name its `format:`, or write the file again")
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as e:
        raise unreadable(file, e) from e


def unreadable(file: Path, e: Exception) -> UserError:
    return UserError(f"{file}: cannot be read as Parquet ({' '.join(str(e).split())[:200]}). Write the file again")


def rows_of(agreed: Agreed, file: Path, spelling: Spelling) -> Iterator[tuple[int, Callable[[], Rows]]]:
    """The rows of one file, piece by piece: bytes of the file that they take, and the rows when asked for.

    Raises:
        UserError: a damaged file.
    """
    size, first = file.stat().st_size, 0
    with opened(file) as parquet:
        total = parquet.metadata.num_rows
        try:
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=list(agreed.wanted)):
                yield size * batch.num_rows // total, partial(_cells, agreed, file, first, batch, spelling)
                first += batch.num_rows
        except (pa.ArrowException, OSError) as e:
            raise unreadable(file, e) from e
    if first != total:
        raise UserError(f"{file}: {total:,} rows by its footer, but {first:,} were read. Write the file again")


def _cells(agreed: Agreed, file: Path, first: int, batch: pa.RecordBatch, spelling: Spelling) -> Rows:
    try:
        batch.validate(full=True)  # text that is no UTF-8 would go through polars unseen
        columns = {name: _as_plain(batch.column(name)) for name in agreed.wanted}
        frame = pl.DataFrame(pl.from_arrow(pa.table(columns)))
    except (pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException) as e:
        raise unreadable(file, e) from e
    rows = Rows(frame, partial(_where, file, first), spelling)
    for name, others in agreed.exact.items():
        _check_exact(rows, name, agreed.coarse[name], others)
    return rows


def _as_plain(column: pa.Array) -> pa.Array:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_fixed_size_list(column.type) and column.null_count:
        # pyarrow cuts a batch out of a longer array, and polars then takes the nulls of a part with the values of all.
        column = column.take(pa.array(range(len(column)), pa.int64()))
    wanted = plain(column.type)
    return column if column.type == wanted else column.cast(wanted)


def _check_exact(rows: Rows, name: str, limit: float, others: str) -> None:
    """Raises ``UserError`` for a number that some file cannot tell from the next; ``others`` names that file."""
    values = rows.frame[name]
    row = pl.Series(range(len(values)), dtype=pl.Int64)
    if values.dtype in (pl.List, pl.Array):
        values = values.arr.to_list() if values.dtype == pl.Array else values
        frame = pl.DataFrame({"row": row, "value": values}).explode("value", empty_as_null=True)
        row, values = frame["row"], frame["value"]
    if values.dtype.is_numeric():
        bad = (values.cast(pl.Float64).fill_nan(None).abs() >= limit).fill_null(False)
        if bad.any():
            i = int(bad.arg_max() or 0)
            raise UserError(
                f"{rows.where(int(row[i]))}, column {name!r}: {values[i]} is beyond 2^{math.log2(limit):.0f}, and the "
                f"column holds {others}, which cannot tell such numbers apart. Write all files with whole numbers"
            )


def _where(file: Path, first: int, row: int) -> str:
    return f"{file}, row {first + row + 1}"
