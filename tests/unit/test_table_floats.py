"""Ids that Parquet holds as floats: where these cannot tell two of them apart, it is said."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import open_source
from embsearch_dist.errors import UserError

WIDE, SINGLE, HALF = 2**53, 2**24, 2**11
F32 = pa.float32()


def read(folder: Path, columns: list[pa.Array], fields: str) -> pl.DataFrame:
    """The rows of files 0.parquet, 1.parquet, ... with these columns ``u``."""
    for k, column in enumerate(columns):
        y = pa.array([0] * len(column))
        pq.write_table(pa.table({"y": y, "u": column}), folder / f"{k}.parquet")
    files = ", ".join(f"{k}.parquet" for k in range(len(columns)))
    (folder / "s.yaml").write_text(f"files: [{files}]\nlabel: y\nfields: {{{fields}}}\n")
    return pl.concat([c.frame for c in open_source("table", folder / "s.yaml").chunks()])


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            pa.array([SINGLE + 1]),
            pa.array([1.0], F32),
            r"0.parquet, row 1, .*2\^24, .*whole numbers in .* floats of 32",
        ),
        (pa.array([1]), pa.array([0, SINGLE], F32), r"1.parquet, row 2, column 'u': .* is beyond 2\^24"),
        (
            pa.array([1]),
            pa.array(np.float16([0, HALF])),
            r"1.parquet, row 2, .*2\^11, .*but floats of 16 bits in .*1.p",
        ),
        (
            pa.array([HALF + 1.0], F32),
            pa.array(np.float16([1])),
            r"beyond 2\^11, .*floats of 32 bits in .*0.parquet but",
        ),
        (pa.array([SINGLE + 1.0]), pa.array([1.0], F32), r"beyond 2\^24, .*floats of 64 bits in .*0.parquet but"),
        (pa.array([Decimal(WIDE + 1)]), pa.array([1.0]), r"beyond 2\^53, .*decimals in .*0.parquet but floats of 64"),
        (pa.array([1]), pa.array([1.0, SINGLE], F32).dictionary_encode(), r"1.parquet, row 2, .*beyond 2\^24"),
        (pa.array([[1]]), pa.array([[1], [-SINGLE]], pa.list_(F32)), r"1.parquet, row 2, .*beyond 2\^24"),
    ],
)
def test_ids_beyond_what_the_narrowest_float_tells_apart_are_refused(
    tmp_path: Path, one: pa.Array, other: pa.Array, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, [one, other], "u: {kind: list}" if pa.types.is_list(one.type) else "u: categorical")


def test_floats_below_their_limit_go_with_whole_numbers(tmp_path: Path) -> None:
    half = pa.array(np.float16([HALF - 1, np.nan]))
    columns = [pa.array([HALF - 1]), half, pa.array([HALF - 1], F32), pa.nulls(1)]
    assert read(tmp_path, columns, "u: categorical")["u"].to_list() == ["2047", "2047", None, "2047", None]
    large = [pa.array([WIDE + 2]), pa.array([1.0], F32)]  # a number may round
    assert read(tmp_path, large, "f: {column: u, kind: bucketed}, u: dense")["u"].to_list() == [WIDE + 2, 1]


@pytest.mark.parametrize(
    ("column", "limit"),
    [(pa.array([1.0]), WIDE), (pa.array([1.0], F32), SINGLE), (pa.array(np.float16([1])), HALF), (pa.array([1]), None)],
)
def test_a_source_tells_which_ids_its_floats_merge(tmp_path: Path, column: pa.Array, limit: int | None) -> None:
    read(tmp_path, [column], "f: {column: u}, d: {column: u, kind: dense}")
    assert open_source("table", tmp_path / "s.yaml").coarse == ({} if limit is None else {"f": limit})
