"""tools/make/from_libfm.py: a table that prepare.py takes, and lines that it cannot be made of."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from embsearch_dist.data.formats.source_file import read_source_file
from tools.make import from_libfm

FIELDS = ["user", "item", "city"]


def call(tmp_path: Path, *texts: str, fields: list[str] = FIELDS) -> int:
    files = []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"{number}.libfm")
        files[-1].write_text(text)
    words = ["--input", *map(str, files), "--fields", *fields, "--out", str(tmp_path / "out"), "--name", "apps"]
    return from_libfm.main(words)


def test_files_become_one_table(tmp_path: Path) -> None:
    assert call(tmp_path, "1 3:1 10:1 20:1\n-1 4:1 11:1.0 20:1\n\n", "0 3:1 12:1 21:1\n") == 0
    rows = pl.read_csv(tmp_path / "out" / "rows.csv")
    assert rows.to_dict(as_series=False) == {
        "label": [1, 0, 0],
        "user": [3, 4, 3],
        "item": [10, 11, 12],
        "city": [20, 20, 21],
    }
    source = read_source_file(tmp_path / "out" / "source.yaml")
    assert source.name == "apps" and list(source.raw) == FIELDS


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("1 3:1 10:1", "1.libfm, line 2: 2 values, and --fields names 3"),
        ("yes 3:1 10:1 20:1", "1.libfm, line 2: the label 'yes' is no number"),
        ("nan 3:1 10:1 20:1", "1.libfm, line 2: the label 'nan' is no number"),
        ("1 3:1 10:0.5 20:1", "1.libfm, line 2: '10:0.5' is not INDEX:1"),
        ("1 3:1 ten:1 20:1", "1.libfm, line 2: 'ten:1' is not INDEX:1"),
        ("1 3:1 10 20:1", "1.libfm, line 2: '10' is not INDEX:1"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "1 3:1 10:1 20:1\n", f"1 3:1 10:1 20:1\n{line}\n") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "source.yaml").exists()


def test_names_and_files_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "1 3:1\n", fields=["label"]) == 2
    assert call(tmp_path, "\n", fields=["user"]) == 2
    words = ["--input", str(tmp_path / "none"), "--fields", "user", "--out", str(tmp_path / "out")]
    assert from_libfm.main(words) == 2
    told = capsys.readouterr().err.splitlines()
    assert "a name of its own, other than label" in told[0] and "no rows" in told[1] and "cannot be read" in told[2]


def test_a_call_that_fails_leaves_no_source_file_of_an_earlier_one(tmp_path: Path) -> None:
    assert call(tmp_path, "1 3:1 10:1 20:1\n") == 0 and list(tmp_path.rglob("source.yaml"))
    assert call(tmp_path, "1 3:1 10:1 20:1\n1 3:1\n") == 2 and not list(tmp_path.rglob("source.yaml"))
