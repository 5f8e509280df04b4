"""Dates that Parquet holds as numbers: read by their format as CSV is, or refused before a row is read."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import TIME, open_source
from embsearch_dist.errors import UserError

DAYS = ["01022000", "15011999", "09122001", "31121999"]


def times(folder: Path, column: list[str] | pa.Array, pattern: str) -> list[float]:
    rows = len(column)
    if isinstance(column, list):
        pl.DataFrame({"y": [0] * rows, "u": ["a"] * rows, "t": column}).write_csv(folder / "a.csv")
    else:
        pq.write_table(pa.table({"y": [0] * rows, "u": ["a"] * rows, "t": column}), folder / "a.parquet")
    files = "a.csv" if isinstance(column, list) else "a.parquet"
    time = f"{{column: t, format: '{pattern}'}}"
    (folder / "s.yaml").write_text(f"files: {files}\nlabel: y\ntime: {time}\nfields: {{u: categorical}}\n")
    return pl.concat([c.frame for c in open_source("table", folder / "s.yaml").chunks()])[TIME].to_list()


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint64(), pa.float64(), pa.decimal128(12, 2), pa.string()])
@pytest.mark.parametrize(
    ("pattern", "days"),
    [
        ("ddmmyyyy", DAYS),
        ("%d%m%Y", DAYS),
        ("mmddyyyy", [f"{d[2:4]}{d[:2]}{d[4:]}" for d in DAYS]),
        ("yyyymmdd", [f"{d[4:]}{d[2:4]}{d[:2]}" for d in DAYS]),
        ("yymmdd", [f"{d[6:]}{d[2:4]}{d[:2]}" for d in DAYS]),
        ("%m%Y", ["012000", "121999"]),
        ("%Y%j", ["2000032", "1999365"]),
    ],
)
def test_numbers_are_the_dates_that_text_would_be(
    tmp_path: Path, kind: pa.DataType, pattern: str, days: list[str]
) -> None:
    numbers = pa.array(days) if kind == pa.string() else pa.array([Decimal(d) for d in days]).cast(kind)
    assert times(tmp_path, numbers, pattern) == times(tmp_path, days, pattern)


def test_numbers_with_the_time_of_day_are_dates(tmp_path: Path) -> None:
    written = ["20000201000000", "19991231235959"]
    assert times(tmp_path, pa.array(list(map(int, written))), "yyyymmddHHMMSS") == times(
        tmp_path, written, "yyyymmddHHMMSS"
    )


@pytest.mark.parametrize(
    ("column", "pattern", "message"),
    [
        (pa.array([1022000]), "dd.mm.yyyy", "a.parquet: time: column 't' is int64. Write text of the given `format`"),
        (pa.array([1022000.0]), "%d%b%Y", "a.parquet: time: column 't' is double. Write text of the given `format`"),
        (pa.array([200201.0], pa.float32()), "yyyymmdd", "time: column 't' is float. Write a whole number"),
        (pa.array([np.float16(201)]), "yymmdd", "time: column 't' is halffloat. Write a whole number"),
        (pa.array([1022000, 42022000]), "ddmmyyyy", "row 2, column 't': the time is 42022000. Write a date of the"),
        (pa.array([1022000, None]), "ddmmyyyy", "row 2, column 't': the time is blank"),
        (pa.array([1022000, -1022000]), "ddmmyyyy", "row 2, column 't': the time is -1022000"),
        (pa.array([1022000, 1022000.5]), "ddmmyyyy", "row 2, column 't': the time is 1022000.5"),
        (pa.array([101022000]), "ddmmyyyy", "row 1, column 't': the time is 101022000"),
        (pa.array([9990201]), "yyyymmdd", "row 1, column 't': the time is 9990201"),
    ],
)
def test_numbers_that_are_no_dates_of_the_format_are_refused(
    tmp_path: Path, column: pa.Array, pattern: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        times(tmp_path, column, pattern)


def test_seconds_since_1970_stay_numbers(tmp_path: Path) -> None:
    assert times(tmp_path, pa.array([951782400, 5]), "%s") == [951782400, 5]
