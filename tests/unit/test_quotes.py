"""Text held to RFC 4180: what is valid is read cell for cell wherever blocks end, the rest is named by its line."""

from __future__ import annotations

import csv
import io
import itertools
import re
from pathlib import Path

import polars as pl
import pytest

from embsearch_dist.data.formats.blocks import Layout, parse, read_blocks
from embsearch_dist.errors import UserError

NAMES = ("a", "b", "c")


def cells(path: Path, quoted: bool = True, separator: str = ",", block_bytes: int = 1 << 20) -> list[tuple]:
    layout = Layout(NAMES, separator, header=True, quoted=quoted)
    return pl.concat([parse(b, layout) for b in read_blocks(path, layout, block_bytes)]).rows()


def write(folder: Path, body: str, separator: str = ",") -> Path:
    path = folder / "t.csv"
    path.write_bytes((separator.join(NAMES) + "\n" + body).encode())
    return path


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ('1,"7\\" b",x\n2,"7\\" c",y\n', 2, "followed by ' ', neither .*a backslash does not escape it.*quotes: none"),
        ('1,"7\\"",x\n2,"7\\"",y\n', 3, r"\(of the cell that begins 1 line before\) is followed by '7'"),
        ('1,"x\\",y",z\n', 2, "inside a cell that does not begin with one"),
        ('1,2,3\n1,12" disc,x\n1,14" disc,y\n', 3, "inside a cell that does not begin with one"),
        ("1,2,3\n" * 9 + '1,12" disc,x\n', 11, "inside a cell"),
        ('1, "a",2\n', 2, "inside a cell"),
        ('1,"a" ,2\n', 2, "followed by ' '"),
        ('1,"a\nb"x,2\n', 3, "followed by 'x'"),
        ('1,"a"\r,2\n', 2, r"followed by '\\r'"),
        ('1,2,"é"é\n', 2, "followed by 'é'"),
        ('1,2,3\n1,"never,3\n4,5,6\n', 3, "opens here and is never closed"),
        ('1,2,3\n1,"a""\n4,"",6\n', 3, "opens here and is never closed"),
        ("1,2,3\n1,x\ry,3\n", 3, "a carriage return without a line feed"),
        ('1,"a"\n', 2, "2 columns .*expected 3"),
    ],
)
@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_the_first_offence_is_named_by_its_line(
    tmp_path: Path, body: str, line: int, message: str, block_bytes: int
) -> None:
    with pytest.raises(UserError) as e:
        cells(write(tmp_path, body), block_bytes=block_bytes)
    assert f"t.csv, line {line}: " in str(e.value) and re.search(message, str(e.value)), e.value
    assert "\n" not in str(e.value)


def test_quotes_none_reads_quotes_as_text(tmp_path: Path) -> None:
    path = write(tmp_path, '1\t12" disc\t"x\n2\t"\t""\n', "\t")
    assert cells(path, quoted=False, separator="\t") == [("1", '12" disc', '"x'), ("2", '"', '""')]
    with pytest.raises(UserError, match="line 2: .*quotes: none"):
        cells(path, separator="\t")


@pytest.mark.parametrize("length", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_every_short_text_is_read_as_the_grammar_says_or_refused(tmp_path: Path, length: int) -> None:
    """All bodies of a small alphabet, against a reader of the grammar in plain Python."""
    layout, seen = Layout(("a", "b"), ",", header=True, quoted=True), {True: 0, False: 0}
    for letters in itertools.product('",\nx', repeat=length):
        body = "".join(letters)
        path = write(tmp_path, body)
        try:
            found = pl.concat([parse(b, layout) for b in read_blocks(path, layout, 2)]).rows()
        except UserError:
            found = None
        assert found == grammar(body, 2), body
        seen[found is not None] += 1
    assert seen[True] > 20 and seen[False] > 700


CELL = re.compile(r'"(?:[^"]|"")*"|[^",\n]*')


def grammar(body: str, columns: int) -> list[tuple] | None:
    """Rows of cells (None: empty) by RFC 4180's grammar, or None where it does not hold."""
    text, rows, place = body.rstrip("\n") + "\n", [], 0
    if text == "\n":
        return None
    row: list[str] = []
    while place < len(text):
        cell = CELL.match(text, place)
        assert cell is not None
        place = cell.end()
        row.append(cell[0])
        if place >= len(text) or text[place] not in ",\n":
            return None
        if text[place] == "\n":
            rows.append(row)
            row = []
        place += 1
    if row or any(len(r) != columns for r in rows):
        return None
    found = [tuple(c[1:-1].replace('""', '"') if c[:1] == '"' else c or None for c in r) for r in rows]
    assert [[c or "" for c in r] for r in found] == list(csv.reader(io.StringIO(text), strict=True))
    return found
