"""Random tables, written in many ways by writers of others, are read back cell for cell."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: requirements/test.txt")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embsearch_dist.data.formats import blocks as blocks_module
from embsearch_dist.data.formats import open_source
from embsearch_dist.data.formats.blocks import Layout, parse, read_blocks

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=1200)  # half a minute each on an idle core, minutes on one that others use
# Quotes, separators, line ends and what looks like them come often; surrogates cannot be written.
LETTERS = st.one_of(
    st.sampled_from(list('",;\t|\n\\ x0é"')), st.characters(exclude_categories=("Cs",), exclude_characters="\r\0")
)
CELLS = st.text(LETTERS, max_size=6)
PLAIN = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n\t\0"), max_size=6)


@st.composite
def tables(draw: st.DrawFn, cell: st.SearchStrategy[str]) -> list[tuple[str, str, str]]:
    return draw(st.lists(st.tuples(st.sampled_from("01"), cell, cell), min_size=1, max_size=12))


def read(folder: Path, source: str) -> list[tuple]:
    (folder / "s.yaml").write_text(source + "\nlabel: y\nfields: {u: categorical, v: categorical}\n")
    return pl.concat([c.frame for c in open_source("table", folder / "s.yaml").chunks()]).rows()


def expected(rows: list[tuple[str, str, str]]) -> list[tuple]:
    return [(float(y), u or None, v or None) for y, u, v in rows]


def check_csv(
    rows: list, delimiter: str, end: str, quoting: int, bom: bool, packed: bool, block: int, files: int
) -> None:
    """Written by Python's csv module, read in blocks of ``block`` bytes."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(blocks_module, "BLOCK_BYTES", block)
        cuts = [len(rows) * k // files for k in range(files + 1)]
        for k in range(files):
            text = io.StringIO()
            writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
            writer.writerows([("y", "u", "v"), *rows[cuts[k] : cuts[k + 1]]])
            data = (b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode()
            (folder / f"part-{k}.csv").write_bytes(gzip.compress(data) if packed else data)
        delimiter = "tab" if delimiter == "\t" else delimiter
        assert read(folder, f'files: "part-*.csv"\ndelimiter: "{delimiter}"') == expected(rows)


CSV = given(
    tables(CELLS),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 60),
    st.integers(1, 3),
)
test_csv = FEW(CSV(check_csv))
test_csv_often = pytest.mark.slow(pytest.mark.timeout(1200)(MANY(CSV(check_csv))))


def check_tsv(rows: list, end: str, block: int) -> None:
    """No quoting: every cell without tabs and line ends is text as it stands."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(blocks_module, "BLOCK_BYTES", block)
        (folder / "t.tsv").write_bytes(end.join("\t".join(r) for r in [("y", "u", "v"), *rows]).encode())
        assert read(folder, "files: t.tsv\nquotes: none") == expected(rows)


TSV = given(tables(PLAIN), st.sampled_from(["\n", "\r\n"]), st.integers(1, 60))
test_tsv = FEW(TSV(check_tsv))
test_tsv_often = pytest.mark.slow(pytest.mark.timeout(1200)(MANY(TSV(check_tsv))))

WHOLE = {
    "int8": pa.int8(),
    "int64": pa.int64(),
    "uint16": pa.uint16(),
    "float": pa.float64(),
    "decimal": pa.decimal128(21, 2),
}
TEXT = {"text": pa.string(), "large": pa.large_string(), "dictionary": pa.dictionary(pa.int32(), pa.string())}


def check_parquet(drawn: tuple[list, list, list, int]) -> None:
    """Parts of any types that hold the same values give the same texts."""
    numbers, texts, types, group = drawn
    with tempfile.TemporaryDirectory() as name:
        folder, wanted = Path(name), []
        for k, (number, text) in enumerate(types):
            u, v = pa.array(numbers, pa.int64()).cast(WHOLE[number]), pa.array(texts, pa.string()).cast(TEXT[text])
            y = pa.array([i % 2 for i in range(len(numbers))])
            pq.write_table(pa.table({"y": y, "u": u, "v": v}), folder / f"{k}.parquet", row_group_size=group)
            wanted += [
                (float(i % 2), None if n is None else str(n), t or None)
                for i, (n, t) in enumerate(zip(numbers, texts, strict=True))
            ]
        assert read(folder, 'files: "*.parquet"') == wanted


@st.composite
def columns(draw: st.DrawFn) -> tuple[list, list, list, int]:
    n = draw(st.integers(1, 9))
    numbers = draw(st.lists(st.one_of(st.none(), st.integers(0, 127)), min_size=n, max_size=n))
    texts = draw(st.lists(st.one_of(st.none(), CELLS), min_size=n, max_size=n))
    kinds = st.tuples(st.sampled_from(sorted(WHOLE)), st.sampled_from(sorted(TEXT)))
    return numbers, texts, draw(st.lists(kinds, min_size=1, max_size=4)), draw(st.integers(1, 5))


PARQUET = given(columns())
test_parquet = FEW(PARQUET(check_parquet))
test_parquet_often = pytest.mark.slow(pytest.mark.timeout(1200)(MANY(PARQUET(check_parquet))))


def check_any_text(body: str, block: int) -> None:
    """Of any text at all, what is read is what Python's strict reader reads, wherever blocks end."""
    layout = Layout(("y", "u"), ",", header=True, quoted=True)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "t.csv"
        path.write_bytes(("y,u\n" + body).encode())
        found = []
        for size in (block, 1 << 20):
            try:
                frame = pl.concat([parse(b, layout) for b in read_blocks(path, layout, size)])
                found.append([[c or "" for c in row] for row in frame.rows()])
            except Exception as e:
                assert type(e).__name__ == "UserError" and "\n" not in str(e), e
                found.append([])
        assert found[0] == found[1]
        if found[0]:
            assert found[0] == list(csv.reader(io.StringIO(body.rstrip("\r\n"), newline=""), strict=True))


ANY = given(st.text(st.sampled_from(list('",,\n\nxé\r')), max_size=14), st.integers(1, 9))
test_any_text = FEW(ANY(check_any_text))
test_any_text_often = pytest.mark.slow(pytest.mark.timeout(1200)(MANY(ANY(check_any_text))))
