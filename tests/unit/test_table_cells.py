"""Cells of a user's table: Parquet types agreed over all files, and the keys for what real exports hold."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import LABEL, TIME, open_source
from embsearch_dist.data.formats.columns import Reading
from embsearch_dist.data.formats.described import Description
from embsearch_dist.errors import UserError

MIDNIGHT = datetime(2024, 3, 5)


def read(folder: Path, files: str, fields: str = "u: categorical", more: str = "", label: str = "y") -> pl.DataFrame:
    (folder / "s.yaml").write_text(f"files: {files}\nlabel: {label}\nfields: {{{fields}}}\n{more}")
    return pl.concat([c.frame for c in open_source("table", folder / "s.yaml").chunks()])


def parts(folder: Path, *columns: pa.Array, name: str = "u") -> str:
    for k, column in enumerate(columns):
        y = pa.array([k % 2] * len(column), pa.int64())
        pq.write_table(pa.table({"y": y, "z": y, name: column}), folder / f"{k}.parquet")
    return "[" + ", ".join(f"{k}.parquet" for k in range(len(columns))) + "]"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (pa.array([1, 2]), pa.array([1.0, None, 2.5]), ["1", "2", "1", None, "2.5"]),
        (pa.array([1, 2], pa.int8()), pa.array([1, 2**63], pa.uint64()), ["1", "2", "1", str(2**63)]),
        (pa.array([1]), pa.array([Decimal("1.00"), Decimal("10.50"), Decimal("100.00")]), ["1", "1", "10.5", "100"]),
        (pa.array([0.1, -0.0], pa.float32()), pa.array([0.1, 7.0]), ["0.1", "0", "0.1", "7"]),
        (pa.array(["a"]), pa.array(["a", "b"]).dictionary_encode(), ["a", "a", "b"]),
        (pa.array(["a"], pa.large_string()), pa.nulls(2), ["a", None, None]),
        (pa.nulls(1), pa.array([1, 2]).dictionary_encode(), [None, "1", "2"]),
        (
            pa.array([MIDNIGHT], pa.timestamp("ms")),
            pa.array([MIDNIGHT, MIDNIGHT + timedelta(microseconds=500_000)], pa.timestamp("ns")),
            ["2024-03-05 00:00:00"] * 2 + ["2024-03-05 00:00:00.500"],
        ),
        (
            pa.array([MIDNIGHT], pa.timestamp("us", "UTC")),
            pa.array([MIDNIGHT], pa.timestamp("us", "Asia/Tokyo")),
            ["2024-03-05 00:00:00"] * 2,
        ),
        (pa.array([date(2024, 3, 5)]), pa.array([date(2024, 3, 5)], pa.date64()), ["2024-03-05"] * 2),
        (pa.array([1.0, None]), pa.array([3.0]), ["1", None, "3"]),
        (pa.array([Decimal(7)], pa.decimal256(38, 2)), pa.array([7, 8]), ["7", "7", "8"]),
    ],
)
def test_one_value_has_one_text_in_all_files(
    tmp_path: Path, one: pa.Array, other: pa.Array, expected: list[str | None]
) -> None:
    files = parts(tmp_path, one, other)
    assert read(tmp_path, files)["u"].to_list() == expected


@pytest.mark.parametrize(
    ("one", "other", "field"),
    [
        (pa.array([1]), pa.array([True]), "u: categorical"),
        (pa.array([1]), pa.array(["1"]), "u: categorical"),
        (pa.array([date(2024, 1, 1)]), pa.array([MIDNIGHT]), "u: categorical"),
        (pa.array([MIDNIGHT]), pa.array([MIDNIGHT], pa.timestamp("us", "UTC")), "u: categorical"),
        (pa.array(["a|b"]), pa.array([["a", "b"]]), "u: {kind: list}"),
        (pa.array([[1]]), pa.array([["1"]]), "u: {kind: list}"),
        (pa.array(["1"]), pa.array([1.5]), "u: dense, v: {column: z}"),
    ],
)
def test_types_that_differ_are_refused_with_both_files(
    tmp_path: Path, one: pa.Array, other: pa.Array, field: str
) -> None:
    files = parts(tmp_path, one, other)
    with pytest.raises(UserError, match=r"1.parquet: field 'u': column 'u' is .*, but .* in .*0.parquet. Write all"):
        read(tmp_path, files, field)


def test_whole_numbers_that_a_float_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    files = parts(tmp_path, pa.array([2**53 + 1]), pa.array([1.0, 2.0**53]))
    with pytest.raises(UserError, match=r"beyond 2\^53, and the column holds whole numbers in .*0.parquet but floats"):
        read(tmp_path, files)
    lists = parts(tmp_path, pa.array([[1], [2]]), pa.array([[1.0], [3.0, 2.0**54]]))
    with pytest.raises(UserError, match=r"1.parquet, row 2, column 'u': .*beyond 2\^53"):
        read(tmp_path, lists, "u: {kind: list}")


@pytest.mark.parametrize(
    ("column", "use", "message"),
    [
        (pa.array([{"a": 1}]), "categorical", "is struct<a: int64>. Write text, a number or a date"),
        (pa.array([b"a"]), "categorical", "is binary. Write text"),
        (pa.array([time(1)]), "categorical", r"is time64\[us\]. Write text"),
        (pa.array([timedelta(1)]), "categorical", r"is duration\[us\]. Write text"),
        (pa.array([["a"]]), "categorical", "is list<.*>. Write .*kind: list"),
        (pa.array([Decimal(1)], pa.decimal256(39, 0)), "categorical", r"is decimal256\(39, 0\). Write text"),
        (pa.array([[Decimal(1)]], pa.list_(pa.decimal256(39, 0))), "{kind: list}", "is list<.*>. Write a list of text"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "categorical", "is map<.*>. Write text"),
        (pa.array([date(2024, 1, 1)]), "dense", r"is date32\[day\]. Write a number"),
        (pa.array([3]), "{kind: list}", "is int64. Write a list of text"),
        (pa.array([[[1]]]), "{kind: list}", "is list<.*>. Write a list of text"),
        (pa.array([time(1)]), "time", r"is time64\[us\]. Write a number, a date"),
        (pa.array([b"2024-01-01"]), "time", "is binary. Write a number, a date"),
        (pa.array([True]), "time", "is bool. Write a number, a date"),
        (pa.array([date(2024, 1, 1)]), "label", "is date32.*Write a number, true and false, or text"),
    ],
)
def test_types_that_a_use_does_not_take_are_refused_before_reading(
    tmp_path: Path, column: pa.Array, use: str, message: str
) -> None:
    pq.write_table(pa.table({"y": [1], "u": column, "w": ["x"]}), tmp_path / "a.parquet")
    more = "time: u" if use == "time" else ""
    label = "u" if use == "label" else "y"
    fields = "w: categorical" + (f", u: {use}" if use not in ("time", "label") else "")
    (tmp_path / "s.yaml").write_text(f"files: a.parquet\nlabel: {label}\nfields: {{{fields}}}\n{more}")
    with pytest.raises(UserError, match=f"a.parquet: .*column 'u' {message}"):
        open_source("table", tmp_path / "s.yaml")


def test_a_parquet_column_twice_and_text_that_is_none_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array(["a"]), pa.array(["b"])], names=["y", "u", "u"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: column 'u' is there twice. Rename one"):
        read(tmp_path, "a.parquet")
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"y": [1], "u": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: cannot be read as Parquet .*UTF"):
        read(tmp_path, "a.parquet")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ((pa.array([MIDNIGHT], pa.timestamp("ms")), pa.array([MIDNIGHT], pa.timestamp("us"))), [0, 0]),
        ((pa.array([date(2024, 3, 5)]), pa.array([MIDNIGHT + timedelta(hours=1)], pa.timestamp("ns"))), [0, 3600e6]),
        ((pa.array(["2024-03-05", "2024-03-05T01:00Z"]).dictionary_encode(), pa.array(["2024-03-05"])), [0, 3600e6, 0]),
        ((pa.array([5]), pa.array([5.5]), pa.array([Decimal("6.25")])), [0, 0.5, 1.25]),
    ],
)
def test_times_of_several_files_are_of_one_measure(
    tmp_path: Path, columns: tuple[pa.Array, ...], expected: list[float]
) -> None:
    files = parts(tmp_path, *columns, name="t")
    found = read(tmp_path, files, "f: {column: y}", "time: t", label="{column: z, threshold: 0}")[TIME].to_numpy()
    assert np.array_equal(found - found[0], expected)


def test_times_of_several_measures_are_refused(tmp_path: Path) -> None:
    files = parts(tmp_path, pa.array([5]), pa.array([MIDNIGHT]), name="t")
    with pytest.raises(UserError, match="1.parquet: time: column 't' is timestamp.*, but int64 in .*0.parquet"):
        read(tmp_path, files, "f: {column: y}", "time: t", label="{column: z, threshold: 0}")


@pytest.mark.parametrize(
    ("written", "key", "hour"),
    [
        ("2024-03-05T10:00:00+02:00", "t", 8),
        ("2024-03-05 10:00:00-0330", "t", 13.5),
        ("2024-03-05T10:00+01", "t", 9),
        ("2024-03-05 10:00:00 UTC", "t", 10),
        ("2024-03-05T10:00:00.000Z", "t", 10),
        ("2024-03-05", "t", 0),
        ("2024-03-05 10:00", "{column: t, zone: Europe/Berlin}", 9),
        ("2024-03-05T10:00Z", "{column: t, zone: Europe/Berlin}", 10),
        ("05.03.2024", "{column: t, format: dd.mm.yyyy}", 0),
        ("05.03.2024 10:30", "{column: t, format: dd.mm.yyyy HH:MM}", 10.5),
        ("03/05/24 10:30:36", "{column: t, format: '%m/%d/%y %H:%M:%S'}", 10.51),
        ("05.03.2024 10:30", "{column: t, format: dd.mm.yyyy HH:MM, zone: Asia/Kolkata}", 5),
    ],
)
def test_dates_with_offsets_zones_and_formats(tmp_path: Path, written: str, key: str, hour: float) -> None:
    (tmp_path / "a.csv").write_text(f"y,t,u\n1,{written},a\n")
    found = read(tmp_path, "a.csv", more=f"time: {key}")[TIME][0]
    assert found == (datetime(2024, 3, 5, tzinfo=UTC) + timedelta(hours=hour)).timestamp() * 1e6


@pytest.mark.parametrize(
    ("written", "key", "message"),
    [
        ("2024-02-30", "t", "line 2, column 't': the time is '2024-02-30'. Write a date like"),
        ("05.03.2024", "t", "line 2, column 't': the time is '05.03.2024'. Write .*name its `format`"),
        ("2024-03-05T10:00+99:00", "t", "the time is '2024-03-05T10:00"),
        ("2024-03-05", "{column: t, format: dd.mm.yyyy}", "Write a date of the format %d.%m.%Y"),
        ("2024-03-31 02:30:00", "{column: t, zone: Europe/Berlin}", "the time is '2024-03-31 02:30:00'"),
        ("inf", "t", "the time is 'inf'. Write a number"),
        ("1", "{column: t, zone: Nowhere/Land}", "s.yaml: time: zone 'Nowhere/Land' is not known"),
        ("1", "{column: t, format: dd.qq}", "s.yaml: time: format 'dd.qq' is not known: write it like dd.mm.yyyy"),
        ("1", "{column: t, fromat: x}", "Did you mean 'format'"),
    ],
)
def test_times_that_cannot_be_read_are_named(tmp_path: Path, written: str, key: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(f"y,t,u\n1,{written},a\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path, "a.csv", more=f"time: {key}")


def test_text_times_are_held_to_the_first_row_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,t,u\n1,1709600000,a\n")
    (tmp_path / "b.csv").write_text("y,t,u\n1,1709600000,a\n1,2024-03-05,a\n")
    with pytest.raises(UserError, match=r"b.csv, line 3, .*'2024-03-05'. Write it as in the first row of all"):
        read(tmp_path, "[a.csv, b.csv]", more="time: t")


def test_values_that_mean_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,u,n,l\n1,?,NULL,a|?|b\n0,NULL,3,?\n1,x,\\N,c\n")
    more = 'missing: ["?", "\\\\N", NULL]'
    frame = read(tmp_path, "a.csv", "u: categorical, n: dense, l: {kind: list}", more)
    assert frame["u"].to_list() == [None, None, "x"] and frame["n"].to_list() == [None, 3, None]
    assert frame["l"].to_list() == [["a", "b"], [], ["c"]]
    with pytest.raises(UserError, match=r"line 2, column 'n': .*'NULL'.*a missing value\? Write `missing"):
        read(tmp_path, "a.csv", "u: categorical, n: dense")
    (tmp_path / "a.csv").write_text("y,u\n?,a\n")
    with pytest.raises(UserError, match="line 2, column 'y': .*blank"):
        read(tmp_path, "a.csv", more=more)
    pq.write_table(pa.table({"y": [1, 0], "u": ["?", "a"], "n": [-999, 4]}), tmp_path / "a.parquet")
    frame = read(tmp_path, "a.parquet", "u: categorical, n: dense", 'missing: ["?", -999]')
    assert frame["u"].to_list() == [None, "a"] and frame["n"].to_list() == [None, 4]


@pytest.mark.parametrize(
    ("cell", "keys"),
    [
        ("-999.0", "missing: -999"),
        ("-9.99e2", "missing: [x, -999]"),
        ("-999", "missing: ['-999.00']"),
        ("-999,0", "missing: -999\ndecimal: ','"),
        ("-999", "missing: ['-999,0']\ndecimal: ','"),
        ("12.345,0", "missing: 12345\ndecimal: ','\nthousands: ."),
        (" -999.0 ", "missing: -999\nspaces: trim"),
    ],
)
def test_a_number_that_means_missing_does_so_however_it_is_written(tmp_path: Path, cell: str, keys: str) -> None:
    (tmp_path / "a.csv").write_text(f"y;u;n\n1;a;{cell}\n0;b;4\n")
    fields, more = "c: {column: n}, n: dense, b: {column: n, kind: bucketed}", f"delimiter: ';'\n{keys}"
    frame = read(tmp_path, "a.csv", fields, more)
    assert frame["n"].to_list() == [None, 4] and frame["b"].to_list() == [None, 4]
    assert frame["c"].to_list() == [cell.strip(), "4"]  # a category is text
    for label, order in (("{column: n, threshold: 0}", ""), ("y", "\ntime: n")):
        with pytest.raises(UserError, match="line 2, column 'n': .* blank"):
            read(tmp_path, "a.csv", "u: categorical", more + order, label)


def test_missing_numbers_of_parquet_are_spelled_as_in_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [1, 0], "u": ["a", "b"], "n": [-999.5, 4]}), tmp_path / "a.parquet")
    for missing in ("'-999,5'", "'-999.5'"):
        frame = read(tmp_path, "a.parquet", "u: categorical, n: dense", f"missing: {missing}\ndecimal: ','")
        assert frame["n"].to_list() == [None, 4]


@pytest.mark.parametrize(
    ("cell", "keys", "value"),
    [
        ("1,5", 'decimal: ","', 1.5),
        ("1.234.567,5", 'decimal: ","\nthousands: "."', 1234567.5),
        ("1,234.5", 'thousands: ","', 1234.5),
        ("-1 234", 'thousands: " "', -1234.0),
        ("1e-3", 'decimal: ","', 0.001),
        ("1.5", 'decimal: ","', None),
        ("1.5", 'decimal: ","\nthousands: "."', None),
        ("1,23", 'thousands: ","', None),
        ("12,34,567", 'thousands: ","', None),
        ("1,5", "", None),
    ],
)
def test_decimal_comma_and_thousands(tmp_path: Path, cell: str, keys: str, value: float | None) -> None:
    (tmp_path / "a.csv").write_text(f"y;u;n\n1;{cell};{cell}\n")
    more = f"delimiter: ';'\n{keys}"
    if value is None:
        with pytest.raises(UserError, match="line 2, column 'n': not a finite number"):
            read(tmp_path, "a.csv", "u: categorical, n: dense", more)
    else:
        frame = read(tmp_path, "a.csv", "u: categorical, n: dense", more)
        assert frame["n"].to_list() == [value] and frame["u"].to_list() == [cell]


@pytest.mark.parametrize(
    ("cells", "label", "expected"),
    [
        (["True", "false", "TRUE", "0", "1"], "y", [1, 0, 1, 0, 1]),
        (["yes", "No"], "y", [1, 0]),
        (["buy", "skip", "click"], "{column: y, positive: [buy, click], negative: skip}", [1, 0, 1]),
        (["1", "-1"], "{column: y, positive: 1, negative: -1}", [1, 0]),
        (["no", "yes"], "{column: y, positive: no, negative: yes}", [1, 0]),
    ],
)
def test_labels_of_words(tmp_path: Path, cells: list[str], label: str, expected: list[int]) -> None:
    (tmp_path / "a.csv").write_text("y,u\n" + "".join(f"{c},a\n" for c in cells))
    assert read(tmp_path, "a.csv", label=label)[LABEL].to_list() == expected
    (tmp_path / "a.csv").write_text("y,u\n" + "".join(f"{c},a\n" for c in cells) + "other,a\n")
    with pytest.raises(UserError, match=f"line {len(cells) + 2}, column 'y': the label is .*'other'"):
        read(tmp_path, "a.csv", label=label)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("{column: y, positive: a}", "positive and negative go together"),
        ("{column: y, positive: a, negative: [b, a]}", "'a' is positive and negative"),
        ("{column: y, positive: a, negative: b, threshold: 1}", "a threshold, or positive and negative"),
        ("{column: y, threshold: 1x}", "threshold must be a number, got '1x'"),
        ("{column: y, threshold: .inf}", "threshold must be a number|threshold must be finite"),
        ("{threshold: 1}", "key 'column' is missing"),
    ],
)
def test_labels_that_contradict_themselves_are_refused(tmp_path: Path, label: str, message: str) -> None:
    with pytest.raises(UserError, match=f"s.yaml: label: {message}"):
        read(tmp_path, "a.csv", label=label)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quotes: yes", "quotes must be double .* or none"),
        ("decimal: ':'", "decimal must be"),
        ("thousands: .", "thousands must be one character, other than decimal"),
        ("thousands: 1", "thousands must be one character"),
        ("encoding: ebcdic", "encoding 'ebcdic' is none of"),
        ("missing: {a: b}", "missing must be a text or a list"),
        ("format: parquet\nquotes: none", "quotes is for text"),
    ],
)
def test_keys_with_wrong_values_are_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=f"s.yaml: {message}"):
        read(tmp_path, "a.csv", more=line)


def test_whole_numbers_of_text_may_be_one_id(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,u\n1,7\n0,7.0\n1,7.5\n0,x.0\n")
    assert read(tmp_path, "a.csv")["u"].to_list() == ["7", "7.0", "7.5", "x.0"]
    assert read(tmp_path, "a.csv", "u: {whole_numbers: true}")["u"].to_list() == ["7", "7", "7.5", "x.0"]

    (tmp_path / "a.csv").write_text("y;u\n1;7\n0;7,0\n1;7.0\n0;1.234,00\n")
    commas = "delimiter: ;\ndecimal: ','\nthousands: ."
    found = read(tmp_path, "a.csv", "u: {whole_numbers: true}", commas)
    assert found["u"].to_list() == ["7", "7", "7.0", "1.234"]


PADDED = "y , u, n ,t, l\n 1, a , 1.5, 2014-10-21 , x : 1|y :2\n0 ,?  , , 2014-10-22, \n1,a,\t-3 ,2014-10-23,x: 3\n"
PADDED_FIELDS = "u: categorical, n: dense, l: {kind: list, weight_separator: ':'}"


def test_blanks_around_cells_and_names_do_not_count_where_the_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PADDED)
    found = read(tmp_path, "a.csv", PADDED_FIELDS, more="spaces: trim\nmissing: ['?']\ntime: t")
    assert found["u"].to_list() == ["a", None, "a"]
    assert found["n"].to_list() == [1.5, None, -3.0]
    assert found["l"].to_list() == [
        [{"value": "x", "weight": 1.0}, {"value": "y", "weight": 2.0}],
        [],
        [{"value": "x", "weight": 3.0}],
    ]
    assert found[LABEL].to_list() == [1.0, 0.0, 1.0]
    assert np.diff(found[TIME].to_numpy()).tolist() == [86_400e6] * 2


def test_blanks_that_are_in_the_way_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PADDED)
    with pytest.raises(UserError, match="no column 'y'. There are blanks around its name. Write `spaces: trim`"):
        read(tmp_path, "a.csv", PADDED_FIELDS)
    (tmp_path / "a.csv").write_text("y,u\n 1,a\n0,b\n")
    with pytest.raises(UserError, match="neither 0 nor 1: ' 1'.*write `spaces: trim`"):
        read(tmp_path, "a.csv")
    with pytest.raises(UserError, match="spaces must be keep or trim"):
        read(tmp_path, "a.csv", more="spaces: strip")


def test_rows_to_be_predicted_are_read_with_the_same_blanks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y, u\n1, a\n0, b\n")
    assert read(tmp_path, "a.csv", more="spaces: trim")["u"].to_list() == ["a", "b"]
    told = json.loads(json.dumps(open_source("table", tmp_path / "s.yaml").description))
    (tmp_path / "next.csv").write_text("u \n a\nb\n")
    rows = Description.of(told, "here").open(tmp_path / "next.csv", "table", Reading(labelled=False))
    assert next(iter(rows.chunks())).frame["u"].to_list() == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "inside"),
    [("next.data", "u\na\nb\n"), ("next.txt", "v,u\n7,a\n7,b\n"), ("next.tsv", "v\tu\n7\ta\n7\tb\n")],
)
def test_rows_to_be_predicted_may_have_names_that_tell_no_format(tmp_path: Path, name: str, inside: str) -> None:
    (tmp_path / "a.data").write_text("y,u\n1,a\n0,b\n")
    assert read(tmp_path, "a.data", more="format: csv")["u"].to_list() == ["a", "b"]
    told = Description.of(json.loads(json.dumps(open_source("table", tmp_path / "s.yaml").description)), "here")
    folder = tmp_path / "next"
    folder.mkdir()
    (folder / name).write_text(inside)
    for path in (folder, folder / name):
        rows = told.open(path, "table", Reading(labelled=False))
        assert next(iter(rows.chunks())).frame["u"].to_list() == ["a", "b"]
