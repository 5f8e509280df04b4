"""Which files a source file names, what they are by their first bytes, and columns whose names YAML would change."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import LABEL, open_source
from embsearch_dist.errors import UserError

TEXT = "y,u\n1,a\n0,b\n1,ü\n"
USERS = ["a", "b", "ü"]


def read(folder: Path, files: str, more: str = "", fields: str = "u: categorical", label: str = "y") -> pl.DataFrame:
    source = folder / "source.yaml"
    source.write_text(f"files: {files}\nlabel: {label}\nfields: {{{fields}}}\n{more}")
    return pl.concat([c.frame for c in open_source("table", source).chunks()])


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", gzip.compress(TEXT.encode(), mtime=0)),
        ("a.csv.gz", TEXT.encode()),
        ("a.csv.zst", zstd(TEXT.encode())),
        ("a.csv.zst", zstd(TEXT.encode()[:9]) + zstd(TEXT.encode()[9:])),
        ("a.csv", b"\xef\xbb\xbf" + TEXT.encode()),
        ("a.csv", TEXT.encode("utf-16")),
        ("a.csv", b"\xfe\xff" + TEXT.encode("utf-16-be")),
        ("a.csv.gz", gzip.compress(TEXT.replace("\n", "\r\n").encode("utf-16"), mtime=0)),
    ],
    ids=["gzip", "named-gzip", "zstd", "two-zstd", "bom", "utf-16", "utf-16-be", "gzip-utf-16"],
)
def test_packed_and_utf16_text_is_read_by_its_first_bytes(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    for quotes in ("", "quotes: none"):
        assert read(tmp_path, name, quotes)["u"].to_list() == USERS


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8"])
def test_a_byte_order_mark_counts_more_than_the_encoding_that_is_given(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (tmp_path / "b.csv").write_bytes(TEXT.encode("utf-16"))
    (tmp_path / "c.csv").write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.encode(), mtime=0))
    (tmp_path / "d.csv").touch()
    (tmp_path / "e.csv").write_bytes(TEXT.encode(encoding))
    for quotes in ("", "\nquotes: none"):
        found = read(tmp_path, "[a.csv, b.csv, c.csv, d.csv, e.csv]", f"encoding: {encoding}{quotes}")
        assert found["u"].to_list() == USERS * 4


def test_utf8_that_is_called_utf16_is_told_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TEXT)
    with pytest.raises(UserError, match="a.csv: this is not UTF-16: .* remove `encoding: utf-16`"):
        read(tmp_path, "a.csv", "encoding: utf-16")
    (tmp_path / "a.csv").write_bytes(TEXT.encode("utf-16-le"))
    with pytest.raises(UserError, match="a.csv: UTF-16 without a byte order mark"):
        read(tmp_path, "a.csv", "encoding: utf-16")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + b"x" * 99, "this is a ZIP archive .*Unpack it"),
        (b"BZh91AY&SY\x01\x02\x00\x00\x00\x00\x00", "this is a bzip2 file"),
        (b"\xfd7zXZ\x00" + b"x" * 99, "this is an xz file"),
        (b"y,u".ljust(257, b"\0") + b"ustar" + b"\0" * 250, "this is a tar archive"),
        (gzip.compress(b"PK\x03\x04" + b"x" * 99, mtime=0), "this is a ZIP archive"),
        (zstd(TEXT.encode() * 9)[:-6], "cannot be read .*Fetch it again"),
        (TEXT.encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (TEXT.encode("utf-16")[:-1], "not whole UTF-16 text"),
        (TEXT.encode("utf-32"), "UTF-32"),
        (TEXT.replace("\n", "\r").encode(), "line 1: a carriage return without a line feed"),
        (b"SQLite format 3\0" + b"x" * 99, "SQLite database"),
        (b"ARROW1\0\0" + b"x" * 99, "an Arrow"),
        (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n" + b"x" * 99, "a PDF"),
    ],
    ids=lambda x: "" if isinstance(x, bytes) else x[:24],
)
def test_what_is_no_delimited_text_is_said_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=f"a.csv.*{message}") as e:
        read(tmp_path, "a.csv")
    assert "\n" not in str(e.value)


def test_parquet_behind_another_name_is_read_or_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [1, 0], "u": ["a", "b"]}), tmp_path / "a.csv")
    assert read(tmp_path, "a.csv")["u"].to_list() == ["a", "b"]
    with pytest.raises(UserError, match="a.csv: this is a Parquet file, not text. Write `format: parquet`"):
        read(tmp_path, "a.csv", "format: csv")
    (tmp_path / "a.parquet").write_text(TEXT)
    with pytest.raises(UserError, match="a.parquet: cannot be read as Parquet"):
        read(tmp_path, "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PK\x03\x04" + b"x" * 99)
    for more in ("", "format: parquet"):
        with pytest.raises(UserError, match="a.parquet: this is a ZIP archive"):
            read(tmp_path, "a.parquet", more)
    with pytest.raises(UserError, match="a.csv is parquet, but b.csv is csv"):
        (tmp_path / "b.csv").write_text(TEXT)
        read(tmp_path, "[a.csv, b.csv]")
    (tmp_path / "a.dat").write_text(TEXT)
    with pytest.raises(UserError, match="cannot tell the format of 'a.dat'. Name it .csv, .tsv or .*add `format: csv`"):
        read(tmp_path, "a.dat")


@pytest.mark.parametrize(
    "named", ["parts", '"parts/*.csv"', '"p*/**"', "[parts/p-2.csv, parts/p-10.csv, parts/p-3.csv]"]
)
def test_folders_and_patterns_are_read_in_order_without_marks_and_empty_parts(tmp_path: Path, named: str) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for k in (10, 2):
        (folder / f"p-{k}.csv").write_text(f"y,u\n1,u{k}\n")
    (folder / "p-3.csv").write_text("y,u\n")
    (folder / "p-4.csv").write_text("")
    for mark in ("_SUCCESS", ".p-2.csv.crc", "_started.csv"):
        (folder / mark).write_text("x")
    found = read(tmp_path, named)
    assert found["u"].to_list() == ["u2", "u10"]
    notes = open_source("table", tmp_path / "source.yaml").notes
    assert "p-3.csv has no rows" in notes
    for part in folder.glob("p-*"):
        part.write_text("y,u\n")
    with pytest.raises(UserError, match="the file has no rows"):
        read(tmp_path, named)


@pytest.mark.parametrize(
    ("named", "users"),
    [
        ("**/*.csv", ["p", "q"]),
        ("**", ["p", "q"]),
        ("*/*.csv", ["p"]),
        ("*/_old/*.csv", ["o"]),
        ("p/_o*/*.csv", ["o"]),
        ("_*/**/*.csv", ["t"]),
        ("p/.c*/p.csv", ["c"]),
    ],
)
def test_a_pattern_skips_folders_of_marks_that_it_does_not_spell_out(
    tmp_path: Path, named: str, users: list[str]
) -> None:
    for name in ("p/p.csv", "p/q/q.csv", "p/_old/o.csv", "p/.cache/p.csv", "_tmp/0/t.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"y,u\n1,{'c' if 'cache' in name else name[-5]}\n")
    named = "p/**" if named == "**" else named
    assert read(tmp_path, f'"{named}"')["u"].to_list() == users


def test_a_folder_that_fits_a_pattern_is_read_as_a_folder_or_refused(tmp_path: Path) -> None:
    for name in ("day1.csv", "day2.csv/part-0.csv", "day2.csv/part-1.csv", "day10.csv", "day3.csv/_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"y,u\n1,{name}\n")
    (tmp_path / "day2.csv" / "readme.md").touch()
    expected = ["day1.csv", "day2.csv/part-0.csv", "day2.csv/part-1.csv", "day10.csv"]
    assert read(tmp_path, '"day*.csv"')["u"].to_list() == expected
    assert open_source("table", tmp_path / "source.yaml").notes == ("day2.csv/readme.md was not read",)
    assert read(tmp_path, '"**/*.csv"')["u"].to_list() == expected  # not twice
    assert read(tmp_path, '"*2.csv"')["u"].to_list() == expected[1:3]
    (tmp_path / "day3.csv" / "hour=1").mkdir()
    with pytest.raises(UserError, match=r"day3.csv holds folders \(hour=1, ...\). Name the files by a pattern"):
        read(tmp_path, '"day*.csv"')
    (tmp_path / "day3.csv" / "hour=1").rmdir()
    (tmp_path / "day3.csv" / "clicks.log").touch()
    with pytest.raises(UserError, match="the folder .*day3.csv holds no data files"):
        read(tmp_path, '"day*.csv"')


def test_a_parquet_folder_skips_empty_parts_whatever_their_types(tmp_path: Path) -> None:
    folder = tmp_path / "clicks.parquet"
    folder.mkdir()
    pq.write_table(pa.table({"y": [1, 0], "u": ["a", "b"]}), folder / "part-1.snappy.parquet")
    pq.write_table(
        pa.table({"y": pa.array([], pa.string()), "u": pa.array([], pa.float64())}), folder / "part-0.parquet"
    )
    (folder / "_SUCCESS").touch()
    (folder / "readme.md").touch()
    assert read(tmp_path, "clicks.parquet")["u"].to_list() == ["a", "b"]
    notes = open_source("table", tmp_path / "source.yaml").notes
    assert notes == ("clicks.parquet/readme.md was not read", "part-0.parquet has no rows")
    (folder / "day=1").mkdir()
    with pytest.raises(UserError, match=r"holds folders \(day=1, ...\). Name the files by a pattern"):
        read(tmp_path, "clicks.parquet")


@pytest.mark.parametrize(
    "other", ["clicks.csv", "./clicks.csv", "link.csv", "hard.csv", "'*.csv'", "down/../clicks.csv"]
)
def test_the_same_file_twice_is_refused_by_any_path(tmp_path: Path, other: str) -> None:
    (tmp_path / "clicks.csv").write_text(TEXT)
    (tmp_path / "down").mkdir()
    (tmp_path / "link.csv").symlink_to("clicks.csv")
    os.link(tmp_path / "clicks.csv", tmp_path / "hard.csv")
    with pytest.raises(UserError, match="is named twice"):
        read(tmp_path, f"[clicks.csv, {other}]")


@pytest.mark.parametrize("named", ["no.csv", "'no*.csv'", "loop", "no/", "x" * 300])
def test_what_is_not_there_is_said(tmp_path: Path, named: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="source.yaml: files: .*(does not exist|no file fits|cannot be looked at)"):
        read(tmp_path, named)


@pytest.mark.parametrize(
    "name", ["on", "yes", "no", "Off", "0", "010", "1e3", "null", "2014-10-21", "0x1F", "1:30", "True"]
)
def test_names_are_text_as_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.csv").write_text(f"{name},u\n1,a\n0,b\n")
    assert read(tmp_path, "a.csv", label=name)[LABEL].to_list() == [1, 0]
    assert read(tmp_path, "a.csv", label=f"{{column: {name}, threshold: 1e-3}}")[LABEL].to_list() == [1, 0]
    (tmp_path / "a.csv").write_text(f"y,{name}\n1,a\n0,b\n")
    field = f"f: {{column: {name}}}"
    assert read(tmp_path, "a.csv", fields=field)["f"].to_list() == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["? [a]\n: b\n", "[" * 2000, "\x07", "a: &x [*x]", "files: !!python/object:os.x {}", "- 1"]
)
def test_yaml_that_is_no_source_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match="s.yaml") as e:
        open_source("table", tmp_path / "s.yaml")
    assert "\n" not in str(e.value)


def test_a_name_of_more_than_a_thousand_letters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TEXT)
    with pytest.raises(UserError, match="a field's name has 1001 letters, at most 1000 can be"):
        read(tmp_path, "a.csv", fields="f" * 1001 + ": {column: u}")
    assert read(tmp_path, "a.csv", fields="f" * 1000 + ": {column: u}").width == 2


@pytest.mark.parametrize("tags", ["weight_separator: ':'", "weights: w"])
def test_a_field_named_as_the_weights_of_a_list_is_refused(tmp_path: Path, tags: str) -> None:
    (tmp_path / "a.csv").write_text("y,tags,w,tags weights\n1,a:1,1,b\n")
    with pytest.raises(
        UserError, match="source.yaml: 'tags weights' cannot name a field: the weights of 'tags'.*Rename"
    ):
        read(tmp_path, "a.csv", fields=f"tags weights: categorical, tags: {{kind: list, {tags}}}")
    found = read(tmp_path, "a.csv", fields="tags weights: categorical, tags: {kind: list}")
    assert found["tags weights"].to_list() == ["b"]


@pytest.mark.parametrize("name", ["PAR1", "BZh", "ORC", "ARROW1", "SQLite format 3", "%PDF"])
def test_a_first_column_may_be_called_as_other_files_begin(tmp_path: Path, name: str) -> None:
    text = f"{name},y,u\nx,1,a\n"
    for data in (text.encode(), gzip.compress(text.encode(), mtime=0)):
        (tmp_path / "a.csv").write_bytes(data)
        assert read(tmp_path, "a.csv")["u"].to_list() == ["a"]
    (tmp_path / "a.csv").write_text(f"u,y,{'t' * 252}ustar\na,1,b\n")
    assert read(tmp_path, "a.csv")["u"].to_list() == ["a"]


def test_names_are_sorted_by_plain_digits_alone(tmp_path: Path) -> None:
    for name in ("1\u00b23.csv", "10.csv", "9.csv"):
        (tmp_path / name).write_text(f"y,u\n1,{name[0]}\n")
    assert read(tmp_path, '"*.csv"')["u"].to_list() == ["1", "9", "1"]


def test_a_wrong_delimiter_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y;u\n1;a\n")
    with pytest.raises(UserError, match=r"no column 'y'. Its first line is cut by ','. Try `delimiter: ';'`"):
        read(tmp_path, "a.csv")
    assert read(tmp_path, "a.csv", "delimiter: ';'")["u"].to_list() == ["a"]
    (tmp_path / "a.csv").write_text("y\tu\n1\ta\n")
    with pytest.raises(UserError, match=r"Try `delimiter: 'tab'`"):
        read(tmp_path, "a.csv")
    assert read(tmp_path, "a.csv", "delimiter: tab")["u"].to_list() == ["a"]


def test_a_column_in_the_names_of_folders_is_told(tmp_path: Path) -> None:
    (tmp_path / "day=1").mkdir()
    pq.write_table(pa.table({"y": [1, 0], "u": ["a", "b"]}), tmp_path / "day=1" / "a.parquet")
    (tmp_path / "s.yaml").write_text("files: 'day=*/*'\nlabel: y\nfields: {u: categorical, day: categorical}\n")
    with pytest.raises(UserError, match="no column 'day'. Names of folders, as day=1, are not read as columns. Write"):
        open_source("table", tmp_path / "s.yaml")
