"""Readers of raw data: what they give, and that each complaint names its line and its fix."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import LABEL, TIME, open_source
from embsearch_dist.data.formats.blocks import Layout, parse, read_blocks
from embsearch_dist.data.formats.clicks import AVAZU
from embsearch_dist.data.formats.columns import bucket
from embsearch_dist.errors import UserError, nearest_or_all


def write_table(folder: Path, text: str | bytes, source: str, name: str = "clicks.csv") -> Path:
    """A raw file and its source file in ``folder``; gives the path of the source file."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    path = folder / "source.yaml"
    path.write_text(source)
    return path


def read_all(source: Path, format: str = "table") -> pl.DataFrame:
    """All rows, bucketed columns as their categories."""
    opened = open_source(format, source)
    frame = pl.concat([c.frame for c in opened.chunks()])
    return frame.with_columns(bucket(frame[c.name]).alias(c.name) for c in opened.columns if c.kind == "bucketed")


SOURCE = """
files: [clicks.csv]
label: click
fields: {user: categorical, price: bucketed, score: dense}
"""


def test_table_gives_the_columns_in_the_order_of_the_source_file(tmp_path: Path) -> None:
    text = "score,click,user,unused,price\n0.5,1,ann,x,1\n,0,,y,100\n-2,1,bob,z,\n"
    frame = read_all(write_table(tmp_path, text, SOURCE))
    assert frame.columns == [LABEL, "user", "price", "score"]
    assert frame.rows() == [(1.0, "ann", "1", 0.5), (0.0, None, "21", None), (1.0, "bob", None, -2.0)]


def test_buckets_are_those_of_the_papers() -> None:
    numbers = pl.Series([-2.5, -1, 0, 1, 2, 3, 4, 5, 100, 1e6, None])
    # floor(ln(x)^2): ln 3 = 1.0986 -> 1, ln 4 = 1.386 -> 1, ln 5 = 1.609 -> 2, ln 100 = 4.605 -> 21
    assert bucket(numbers).to_list() == ["-3", "-1", "0", "1", "2", "1", "1", "2", "21", "190", None]


def test_quotes_line_ends_and_separators_inside_cells(tmp_path: Path) -> None:
    text = 'click,user,price,score\r\n1,"a ""b"", c",1,2\r\n0,"two\r\nlines",1,2\r\n'
    frame = read_all(write_table(tmp_path, text, SOURCE))
    assert frame["user"].to_list() == ['a "b", c', "two\r\nlines"]
    # The row after a cell of two lines is still named by its true line.
    with pytest.raises(UserError, match=r"clicks.csv, line 5, column 'click': .*'maybe'"):
        read_all(write_table(tmp_path, text + "maybe,x,1,2\r\n", SOURCE))


@pytest.mark.parametrize("block_bytes", [1, 7, 30, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_blocks_do_not_depend_on_where_the_file_is_cut(tmp_path: Path, block_bytes: int, end: str) -> None:
    lines = [f'{i},"v,{i}\n"' if i % 3 == 0 else f"{i},w{i}" for i in range(40)]
    (tmp_path / "t.csv").write_text("a,b\n" + "\n".join(lines) + end)
    layout = Layout(("a", "b"), ",", header=True, quoted=True)
    blocks = list(read_blocks(tmp_path / "t.csv", layout, block_bytes))
    frame = pl.concat([parse(b, layout) for b in blocks])
    assert frame["a"].to_list() == [str(i) for i in range(40)]
    assert frame["b"].to_list() == [f"v,{i}\n" if i % 3 == 0 else f"w{i}" for i in range(40)]
    assert sum(b.consumed for b in blocks) <= (tmp_path / "t.csv").stat().st_size
    true_line = 2
    lines_found = [b.line(k) for b in blocks for k in range(len(b.ends))]
    for i, found in enumerate(lines_found):
        assert found == true_line
        true_line += 2 if i % 3 == 0 else 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("click,user,price,score\n1,a,1,1\n0,b,2\n", r"clicks.csv, line 3: 3 columns .*expected 4"),
        ("click,user,price,score\n1,a,1,1,9\n", r"clicks.csv, line 2: 5 columns .*expected 4"),
        ("click,user,price,score\n1,a,1,1\n\n0,b,1,1\n", r"clicks.csv, line 3: the line is blank"),
        ("click,user,price,score\n1,a,1,1\n2,b,1,1\n", r"line 3, column 'click': .*neither 0 nor 1: '2'"),
        ("click,user,price,score\n,a,1,1\n", r"line 2, column 'click': .*blank"),
        ("click,user,price,score\nnan,a,1,1\n", r"line 2, column 'click': .*'nan'"),
        ("click,user,price,score\n1,a,1,1\n1,a,cheap,1\n", r"line 3, column 'price': not a finite number: 'cheap'"),
        ("click,user,price,score\n1,a,1,inf\n", r"line 2, column 'score': not a finite number: 'inf'"),
        ('click,user,price,score\n1,a,1,1\n0,"b,1,1\n1,c,1,1\n', r"line 3: a quote .* never closed"),
        ("click,user,price,score\n", r"clicks.csv: the file has no rows"),
        ("", r"clicks.csv: the file is empty"),
        ("click,user,price,user\n1,a,1,1\n", r"line 1: column 'user' is named twice"),
        ("click,usr,price,score\n1,a,1,1\n", r"field 'user': clicks.csv has no column 'user'. Did you mean 'usr'\?"),
        (b"click,user,price,score\n1,a,1,1\n1,\xe9,1,1\n", r"line 3: byte 0xe9 is not UTF-8 text. .*latin-1"),
        (b"click,us\xfer\n1,2\n", r"line 1: not utf-8 text"),
        ('click,"user\nname",price,score\n1,a,1,1\n', r"line 1: the header cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_all(write_table(tmp_path, text, SOURCE))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SOURCE + "tiem: t\n", r"unknown key 'tiem'. Did you mean 'time'\?"),
        (SOURCE + "label: x\n", r"line 5: key 'label' is there twice"),
        ("files: [clicks.csv]\nfields: {a: categorical}\n", r"key 'label' is missing"),
        (SOURCE.replace("bucketed", "bucket"), r"field 'price': unknown kind 'bucket'. Did you mean 'bucketed'\?"),
        (SOURCE.replace("label: click", "label: {column: click, treshold: 3}"), r"Did you mean 'threshold'\?"),
        (SOURCE.replace("[clicks.csv]", "[nowhere.csv]"), r"nowhere.csv does not exist. Paths are relative"),
        (SOURCE.replace("[clicks.csv]", "[clicks.dat]"), r"clicks.dat does not exist"),
        (SOURCE.replace("user: categorical", "click: categorical"), r"'click' is the label column"),
        (SOURCE.replace("user:", '"^u.*$":'), r"'\^u\.\*\$' cannot name a field .*Rename it"),
        (SOURCE.replace("user:", '"a\\tb":'), r"cannot name a field .*Rename it"),
        (SOURCE.replace("user:", f"{'a' * 1001}:"), r"has 1001 letters, at most 1000 can be: a{40}\.\.\. Rename it"),
        (SOURCE.replace("user: categorical, price: bucketed, ", ""), r"no categorical or bucketed one"),
        (SOURCE + "min_count: 0\n", r"min_count must be a whole number of at least 1"),
        (SOURCE + "delimiter: '::'\n", r"delimiter must be one ASCII character"),
        ("files: [a\n", r"line 2: not valid YAML"),
        ("just text", r"not a source file"),
    ],
)
def test_what_is_wrong_with_a_source_file_is_said(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_all(write_table(tmp_path, "click,user,price,score\n1,a,1,1\n", source))


def test_threshold_delimiter_encoding_and_renaming(tmp_path: Path) -> None:
    source = """
files: [clicks.csv]
delimiter: ";"
encoding: latin-1
label: {column: stars, threshold: 3}
fields:
  who: {column: "The User", kind: categorical}
"""
    text = "stars;The User\n3;Andr\xe9\n3.5;Bo\n5;Cy\n".encode("latin-1")
    frame = read_all(write_table(tmp_path, text, source))
    assert frame.rows() == [(0.0, "Andr\xe9"), (1.0, "Bo"), (1.0, "Cy")]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["3", "1.5", "-2"], [3.0, 1.5, -2.0]),
        (["2014-10-21", "2014-10-21 00:00:01", "2014-10-21T00:00:02.5Z"], [0, 1e6, 2.5e6]),
    ],
)
def test_time_column(tmp_path: Path, times: list[str], expected: list[float]) -> None:
    source = "files: [clicks.csv]\nlabel: y\ntime: t\nfields: {u: categorical}\n"
    body = "".join(f"1,{t},a\n" for t in times)
    found = read_all(write_table(tmp_path, "y,t,u\n" + body, source))[TIME].to_numpy()
    assert np.array_equal(found - (found[0] - expected[0]), expected)
    with pytest.raises(UserError, match=r"line 5, column 't': the time is 'soon'"):
        read_all(write_table(tmp_path, "y,t,u\n" + body + "1,soon,a\n", source))


def test_parquet_and_gzip_give_what_csv_gives(tmp_path: Path) -> None:
    text = "click,user,price,score\n1,a,1,0.5\n0,,300,\n1,b,,2\n"
    expected = read_all(write_table(tmp_path, text, SOURCE))
    zipped = gzip.compress(text.encode())
    assert read_all(write_table(tmp_path, zipped, SOURCE.replace(".csv", ".csv.gz"), "clicks.csv.gz")).equals(expected)
    with pytest.raises(UserError, match=r"clicks.csv.gz: not a whole gzip file"):
        read_all(write_table(tmp_path, zipped[:-12], SOURCE.replace(".csv", ".csv.gz"), "clicks.csv.gz"))
    columns = {"click": [True, False, True], "user": ["a", None, "b"], "price": [1, 300, None], "score": [0.5, None, 2]}
    pq.write_table(pa.table(columns), tmp_path / "clicks.parquet")
    source = tmp_path / "source.yaml"
    source.write_text(SOURCE.replace(".csv", ".parquet"))
    assert read_all(source).equals(expected)
    pq.write_table(pa.table(columns | {"click": [1, 0, 7]}), tmp_path / "clicks.parquet")
    with pytest.raises(UserError, match=r"clicks.parquet, row 3, column 'click': .*7"):
        read_all(source)
    (tmp_path / "clicks.parquet").write_bytes(b"PAR1 no more than this PAR1")
    with pytest.raises(UserError, match=r"clicks.parquet: cannot be read as Parquet"):
        read_all(source)


def test_unknown_words_offer_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown format 'criteoo'. Did you mean 'criteo'\?"):
        open_source("criteoo", Path("x"))
    assert nearest_or_all("zzzz", ["abc", "def"]) == "Known: abc, def"


@pytest.mark.parametrize("name", ["criteo", "avazu", "movielens_1m", "movielens_100k", "table"])
def test_a_missing_input_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such (file|directory)"):
        open_source(name, tmp_path / "nowhere")
    if name != "table":
        with pytest.raises(UserError, match="in this directory"):
            open_source(name, tmp_path)


def test_criteo_columns_and_its_unlabelled_test_file(data_dir: Path) -> None:
    frame = read_all(data_dir / "criteo" / "train_first_10000.txt", "criteo")
    assert frame.shape == (10_000, 41)
    assert round(float(frame[LABEL].mean()), 4) == 0.2182  # type: ignore[arg-type]
    # Shares of missing values and cardinalities that the data set's description gives.
    assert [round(frame[c].null_count() / 100) for c in ("I12", "I1", "C22", "C19", "I2")] == [77, 45, 82, 45, 0]
    distinct = [frame[f"C{i}"].drop_nulls().n_unique() for i in range(1, 27)]
    assert (min(distinct), float(np.median(distinct)), max(distinct)) == (3, 847.5, 5520)
    assert "-2" in frame["I2"].unique()
    with pytest.raises(UserError, match=r"test_first_10000.txt, line 1: 39 columns \(separator: tab\), expected 40"):
        read_all(data_dir / "criteo" / "test_first_10000.txt", "criteo")


def test_criteo_numbers_as_dense_columns(tmp_path: Path) -> None:
    numbers = ["0", "7", "-2", "", "1000000", *["3"] * 8]
    file = tmp_path / "train.txt"
    file.write_text("\t".join(["1", *numbers, *["abc"] * 26]) + "\n")
    opened = open_source("criteo", file, numbers="dense")
    assert [c.kind for c in opened.columns] == ["dense"] * 13 + ["categorical"] * 26
    assert "I1 to I13 are log(max(x, 0) + 1)" in opened.notes
    frame = pl.concat([c.frame for c in opened.chunks()])
    found = [frame[f"I{i}"][0] for i in range(1, 6)]
    assert found == pytest.approx([0.0, np.log(8), 0.0, None, np.log(1_000_001)])
    assert frame["C26"][0] == "abc"


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("avazu", "dense", "--numbers dense is for criteo, not for avazu"),
        ("criteo", "raw", "--numbers 'raw' is none of bucketed, dense"),
    ],
)
def test_numbers_are_dense_only_on_demand_and_only_of_criteo(name: str, numbers: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(name, "anywhere", numbers=numbers)


def test_several_files_are_read_in_order_and_a_folder_by_name(tmp_path: Path) -> None:
    for k in (0, 2, 10):
        (tmp_path / f"part-{k}.txt").write_text("\t".join(["1", *[str(k)] * 39]) + "\n")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "truth.json").write_text("{}")
    numbers = lambda paths: [c.frame["C1"][0] for c in open_source("criteo", paths).chunks()]  # noqa: E731
    assert numbers(tmp_path) == ["0", "2", "10"]
    assert numbers([tmp_path / "part-10.txt", str(tmp_path / "part-0.txt")]) == ["10", "0"]
    with pytest.raises(UserError, match=r"part-0.txt is named twice in --input"):
        open_source("criteo", [tmp_path, tmp_path / "part-0.txt"])
    (tmp_path / "other").hardlink_to(tmp_path / "part-2.txt")  # another name, the same rows
    with pytest.raises(UserError, match=r"part-2.txt is named twice in --input"):
        numbers(tmp_path)
    (tmp_path / "other").unlink()
    with pytest.raises(UserError, match=r"format movielens_1m takes one --input, not 2"):
        open_source("movielens_1m", [tmp_path, tmp_path])
    (tmp_path / "train.txt").write_text("\t".join(["1", *["7"] * 39]) + "\n")
    assert numbers(tmp_path) == ["7"], "the usual name stands alone"
    (tmp_path / "part-2.txt").write_text((tmp_path / "part-2.txt").read_text() + "1\t2\n")
    with pytest.raises(UserError, match=r"part-2.txt, line 2: 2 columns"):
        numbers([tmp_path / "part-0.txt", tmp_path / "part-2.txt"])


@pytest.mark.parametrize("block_bytes", [1, 5, 40, 1 << 20])
@pytest.mark.parametrize("text", ["a\tb\n1\t2\n\u00fc\t4\n5\t6", "a\tb\r\n1\t2\r\n\u00fc\t4\r\n5\t6\r\n\r\n\n"])
def test_files_cut_by_seeking_give_the_same_records_and_lines(tmp_path: Path, text: str, block_bytes: int) -> None:
    path, layout = tmp_path / "t.tsv", Layout(("a", "b"), "\t", header=True)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = list(read_blocks(path, layout, block_bytes))
    assert pl.concat([parse(b, layout) for b in found]).rows() == [("1", "2"), ("\u00fc", "4"), ("5", "6")]
    assert [b.line(k) for b in found for k in range(len(b.ends))] == [2, 3, 4]
    packed = tmp_path / "t.tsv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    streamed = [parse(b, layout) for b in read_blocks(packed, layout, block_bytes)]
    assert pl.concat(streamed).rows() == [("1", "2"), ("\u00fc", "4"), ("5", "6")]
    path.write_bytes(path.read_bytes().rstrip() + b"\n7\t\xff\n")
    with pytest.raises(UserError, match=r"t.tsv, line 5: byte 0xff is not UTF-8"):
        [parse(b, layout) for b in read_blocks(path, layout, block_bytes)]


def test_avazu_hour_and_fields(data_dir: Path, tmp_path: Path) -> None:
    raw = data_dir / "avazu" / "train_first_9999.csv"
    frame = read_all(raw, "avazu")
    assert frame.shape == (9_999, 24) and "id" not in frame.columns
    assert round(float(frame[LABEL].mean()), 4) == 0.1706  # type: ignore[arg-type]
    assert frame["hour"].unique().to_list() == ["0"] and frame[TIME].unique().to_list() == [14102100.0]
    assert (frame["device_ip"].n_unique(), frame["device_model"].n_unique(), frame["site_id"].n_unique()) == (
        7302,
        1168,
        381,
    )
    lines = raw.read_text().splitlines(keepends=True)[:4]
    (tmp_path / "train.csv").write_text("".join(lines).replace("14102100", "14102177"))
    with pytest.raises(UserError, match=r"line 2, column 'hour': 14102177 is not YYMMDDHH"):
        read_all(tmp_path, "avazu")
    (tmp_path / "train.csv").write_text("".join(lines).replace("click", "clicked"))
    with pytest.raises(UserError, match=r"line 1: column 'clicked' is not Avazu's"):
        read_all(tmp_path, "avazu")


def test_movielens_1m_joins_users_and_movies(data_dir: Path) -> None:
    frame = read_all(data_dir / "movielens-1m", "movielens_1m")
    assert frame.height == 1_000_209 and TIME not in frame.columns
    assert round(float(frame[LABEL].mean()), 4) == 0.5752  # type: ignore[arg-type]
    assert int(frame[LABEL].sum()) == 348_971 + 226_310
    expected = {"user_id": 6040, "gender": 2, "age": 7, "occupation": 21, "zip": 3439, "movie_id": 3706, "genres": 301}
    assert {name: frame[name].n_unique() for name in expected} == expected
    assert frame.row(0)[1:] == ("1", "F", "1", "10", "48067", "1193", "1975", "Drama")


def test_movielens_timestamps(data_dir: Path) -> None:
    frame = read_all(data_dir / "movielens-1m" / "ratings_first_50440.dat", "movielens_1m")
    # 978300760 is 2000-12-31 22:12:40 UTC, a Sunday.
    assert frame.height == 50_440
    assert frame.row(0, named=True)["weekday"] == "weekend" and frame.row(0, named=True)["hour_in_day"] == "22"
    small = read_all(data_dir / "movielens-100k", "movielens_100k")
    assert small.height == 100_000 and int(small[LABEL].sum()) == 55_375
    assert (small["user_id"].n_unique(), small["movie_id"].n_unique()) == (943, 1682)
    toy_story = small.filter(pl.col("movie_id") == "1").row(0, named=True)
    assert (toy_story["year"], toy_story["genres"]) == ("1995", "Animation|Children's|Comedy")


def test_movielens_names_a_rating_of_an_unknown_user(tmp_path: Path) -> None:
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n")
    (tmp_path / "movies.dat").write_bytes("7::Ol\xe9 (1999)::Drama\n".encode("latin-1"))
    (tmp_path / "ratings.dat").write_text("1::7::5::978300760\n")
    assert read_all(tmp_path, "movielens_1m")["year"].to_list() == ["1999"]
    (tmp_path / "ratings.dat").write_text("1::7::5::978300760\n2::7::5::978300760\n")
    with pytest.raises(UserError, match=r"ratings.dat, line 2: user_id '2' is not in users.dat"):
        read_all(tmp_path, "movielens_1m")
    (tmp_path / "ratings.dat").write_text("1::7::5\n")
    with pytest.raises(UserError, match=r"ratings.dat, line 1: 3 columns \(separator: '::'\), expected 4"):
        read_all(tmp_path, "movielens_1m")


def test_a_movie_without_any_genre_has_none(tmp_path: Path) -> None:
    """Not a text without letters, which would be a value with an id of its own."""
    (tmp_path / "u.data").write_text("1\t5\t4\t881250949\n1\t6\t2\t881250950\n")
    (tmp_path / "u.user").write_text("1|24|M|writer|85711\n")
    flags = ["|".join("1" if k in on else "0" for k in range(19)) for on in ((), (1, 4))]
    movies = [f"{5 + k}|Thing (1990)|01-Jan-1990||http://x|{f}\n" for k, f in enumerate(flags)]
    (tmp_path / "u.item").write_text("".join(movies))
    assert read_all(tmp_path, "movielens_100k")["genres"].to_list() == [None, "Action|Children's"]


@pytest.mark.parametrize("hour", ["2014102113", "141021", "1413213", "14103213", "1413984000", "-14102113"])
def test_an_hour_of_avazu_is_of_one_form(hour: str, tmp_path: Path) -> None:
    """Another form has another order, so that later rows would train, and its last digits are no hour."""
    head = ",".join(AVAZU.columns)
    rows = [",".join(["7", "1", time, *["x"] * 21]) for time in ("14102113", hour)]
    (tmp_path / "train.csv").write_text("\n".join([head, *rows]) + "\n")
    with pytest.raises(UserError, match=f"line 3, column 'hour': {hour} is not YYMMDDHH"):
        read_all(tmp_path, "avazu")


@pytest.mark.parametrize("time", ["978300760000", "-1"])
def test_a_time_of_movielens_is_in_seconds(time: str, tmp_path: Path) -> None:
    """In milliseconds it has an hour and a weekday, too, but others."""
    (tmp_path / "ratings.dat").write_text(f"1::5::4::978300760\n1::5::4::{time}\n")
    (tmp_path / "users.dat").write_text("1::F::25::3::12345\n")
    (tmp_path / "movies.dat").write_text("5::Thing (1990)::Drama\n")
    with pytest.raises(UserError, match=f"line 2, column 'timestamp': {time} is not in seconds since 1970"):
        read_all(tmp_path, "movielens_1m")
