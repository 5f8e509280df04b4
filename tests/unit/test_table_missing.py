"""Values that mean missing where a category is no plain text: whole numbers written as 1.0, dates and timestamps."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import open_source


def read(folder: Path, files: str, fields: str, more: str) -> pl.DataFrame:
    (folder / "s.yaml").write_text(f"files: {files}\nlabel: y\nfields: {{{fields}}}\n{more}")
    return pl.concat([c.frame for c in open_source("table", folder / "s.yaml").chunks()])


@pytest.mark.parametrize("missing", ["-1", "-1.0", "-1.00"])
def test_one_id_of_whole_numbers_is_missing_in_all_its_forms(tmp_path: Path, missing: str) -> None:
    (tmp_path / "a.csv").write_text("y,u,l\n1,-1,-1|2\n0,-1.0,2.0|-1.0\n1,1.0,3\n")
    fields = "u: {whole_numbers: true}, l: {kind: list, whole_numbers: true}, t: {column: u}"
    frame = read(tmp_path, "a.csv", fields, f"missing: '{missing}'")
    assert frame["u"].to_list() == [None, None, "1"] and frame["l"].to_list() == [["2"], ["2"], ["3"]]
    assert frame["t"].to_list() == [None if cell == missing else cell for cell in ("-1", "-1.0", "1.0")]


def test_dates_and_timestamps_may_be_missing(tmp_path: Path) -> None:
    days, hours = [date(1970, 1, 1), date(2024, 3, 5), None], [datetime(1970, 1, 1), datetime(2024, 3, 5, 7), None]
    table = {"y": [1, 0, 1], "d": days, "h": hours, "l": pa.array([days[:2], [], None], pa.list_(pa.date32()))}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    fields, epoch = "d: categorical, h: categorical, l: list", "missing: [1970-01-01, '1970-01-01 00:00:00']"
    frame = read(tmp_path, "a.parquet", fields, epoch)
    assert frame["d"].to_list() == [None, "2024-03-05", None]
    assert frame["h"].to_list() == [None, "2024-03-05 07:00:00", None]
    assert frame["l"].to_list() == [["2024-03-05"], [], []]


@pytest.mark.parametrize(("kind", "top"), [(pa.int64(), 2**63 - 1), (pa.uint64(), 2**64 - 1)])
def test_the_neighbours_of_a_large_missing_number_are_values(tmp_path: Path, kind: pa.DataType, top: int) -> None:
    ids = [top, top - 1, 7, None, 9]
    lists = pa.array([[top, top - 1], [], None, [7], [9]], pa.list_(kind))
    table = {"y": [1, 0, 1, 0, 1], "u": pa.array(ids, kind), "l": lists}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    frame = read(tmp_path, "a.parquet", "u: categorical, l: list", f"missing: ['{top}', '7.0', '9.5', x, inf, -1]")
    assert frame["u"].to_list() == [None, str(top - 1), None, None, "9"]
    assert frame["l"].to_list() == [[str(top - 1)], [], [], [], ["9"]]
