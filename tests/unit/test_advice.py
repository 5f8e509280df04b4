"""What prepare warns of: splits of one class, few clicks and steps, fields that decide the label, ids of two texts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embsearch_dist.data.formats.cells import Spelling
from embsearch_dist.data.prepare import advice
from embsearch_dist.data.prepare.encode import Encoder
from embsearch_dist.data.prepare.pipeline import prepare, summary
from embsearch_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": 100_000, "validation": 1000, "test": 1000}


@pytest.mark.parametrize(
    ("rows", "clicks", "expected"),
    [
        (SPLITS, {"train": 40_000, "validation": 400, "test": 400}, []),
        (
            SPLITS,
            {"train": 900, "validation": 0, "test": 1000},
            ["validation split has no click", "test .* clicks only"],
        ),
        (
            SPLITS,
            {"train": 50_000, "validation": 199, "test": 801},
            [
                "only 199 clicks in the validation split, 199 rows without a click in the test split: AUC",
                "share of clicks changes: 0.5 of the train rows, 0.199 of the validation rows, 0.801 of the test rows",
            ],
        ),
        (SPLITS, {"train": 25_000, "validation": 400, "test": 380}, []),  # the odds do not double
        (SPLITS, {"train": 25_000, "validation": 250, "test": 500}, ["share of clicks changes: 0.25 of the train"]),
        (dict.fromkeys(SPLITS, 20_000), {"train": 10, "validation": 25, "test": 25}, ["only 10 clicks in the train"]),
        (
            SPLITS | {"train": 512 * 20 - 1},
            {"train": 4096, "validation": 400, "test": 400},
            ["10,239 training rows are 19 steps .* 512"],
        ),
    ],
)
def test_splits_that_say_little(rows: dict[str, int], clicks: dict[str, int], expected: list[str]) -> None:
    found = advice.of_splits(rows, clicks)
    assert len(found) == len(expected)
    for text, pattern in zip(found, expected, strict=True):
        assert pl.Series([text]).str.contains(pattern)[0], text


def make(folder: Path, rows: int = 4000) -> Path:
    """``seen`` gives the label away, as ``after`` does by its size; ``hint`` only tells something of it."""
    rng = np.random.default_rng(0)
    click = rng.integers(0, 2, rows)
    columns = {
        "click": click,
        "user": rng.integers(0, 2000, rows),
        "hint": np.where(rng.random(rows) < 0.9, click, 1 - click),
        "seen": click * 50 + rng.integers(0, 40, rows),
        "after": np.where(click == 1, rng.normal(0, 0.1, rows), rng.choice([-5.0, 5.0], rows) + rng.normal(0, 1, rows)),
        "x": rng.normal(0, 1, rows) + click,
    }
    pl.DataFrame(columns).write_csv(folder / "a.csv")
    fields = "user: categorical, hint: categorical, seen: bucketed, code: {column: seen}, after: dense, x: dense"
    (folder / "s.yaml").write_text(f"files: a.csv\nlabel: click\nfields: {{{fields}}}\n")
    return folder / "s.yaml"


def test_columns_that_decide_the_label_are_named_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path)
    for sample in (advice.SAMPLE, 1500):
        monkeypatch.setattr(advice, "SAMPLE", sample)
        schema = prepare("table", source, tmp_path / "out", overwrite=True, quiet=True)
        found = schema.provenance["warnings"]
        assert isinstance(found, list)
        assert [w.split("'")[1] for w in found if "decides" in w] == ["seen", "code", "after"]
    assert "4,000 rows read from 1 file, 4,000 written" in summary(schema)


def test_ids_written_in_two_ways_are_told_with_the_cure() -> None:
    found = advice.of_spellings("user", pl.Series(["1", "2", "10", "10.0", "2.0", "7.0", "1.5", "x.0"]))
    assert found is not None and found.startswith("'user' has 2 values written in two ways, such as 10 and 10.0")
    assert "whole_numbers: true" in found
    assert advice.of_spellings("user", pl.Series(["1", "2.0", "2.5"])) is None
    commas = pl.Series(["1", "2", "1,0", "2.0"])
    found = advice.of_spellings("user", commas, Spelling(decimal=","), lists=True)
    assert found is not None and found.startswith("'user' has 1 values written in two ways, such as 1 and 1,0")
    assert "kind: list, whole_numbers: true" in found


def test_a_column_of_one_value_a_row_is_named(tmp_path: Path) -> None:
    rows = [f"{i % 2},s{i},{'' if i % 3 else f'q{i}'},u{i % 700},{i}" for i in range(4000)]
    (tmp_path / "a.csv").write_text("y,session,rare,user,at\n" + "\n".join(rows) + "\n")
    kinds = "{session: categorical, rare: categorical, user: categorical, at: bucketed}"
    (tmp_path / "s.yaml").write_text(f"files: a.csv\nlabel: y\nfields: {kinds}\n")
    told = prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True).provenance["warnings"]
    named = [text for text in told if "almost a value for each row" in text]  # type: ignore[attr-defined]
    assert [text.split()[0] for text in named] == ["'session'", "'rare'"]
    assert advice.of_identity("few", 900, 900) is None and advice.of_identity("many", 9400, 10_000) is None


def test_a_row_that_is_lost_stops_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path)
    whole = pl.read_csv
    with monkeypatch.context() as patch:
        patch.setattr(pl, "read_csv", lambda *a, **k: whole(*a, **k).head(-1))
        with pytest.raises(UserError, match="a.csv, lines 2 to 4001: 4000 rows, but 3999 were read"):
            prepare("table", source, tmp_path / "out", quiet=True)
    write = Encoder.write
    with monkeypatch.context() as patch:
        shorter = lambda self, shard, *a: write(self, replace(shard, stop=shard.stop - 1), *a)  # noqa: E731
        patch.setattr(Encoder, "write", shorter)
        with pytest.raises(UserError, match="4,000 rows were read but 3,997 written"):
            prepare("table", source, tmp_path / "out", quiet=True)


def test_the_script_prints_warnings_even_when_quiet(tmp_path: Path) -> None:
    rows = "".join(f"{int(i < 70)},{i},u{i % 3}\n" for i in range(100))
    (tmp_path / "a.csv").write_text("y,t,u\n" + rows)
    (tmp_path / "s.yaml").write_text("files: a.csv\nlabel: y\ntime: t\nfields: {u: categorical}\n")
    command = [sys.executable, ROOT / "launch/prepare.py", "--format", "table", "--input", tmp_path / "s.yaml"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out", "--split", "time", "--quiet"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == ""
    assert "warning: the validation split has no click: AUC is undefined there" in done.stderr


def test_ids_that_are_all_written_with_a_point_are_told() -> None:
    found = advice.of_spellings("user", pl.Series(["17.0", "2.0"]))
    assert found is not None and found.startswith("all values of 'user' are written like 17.0") and "say 17," in found
    assert "user: {kind: categorical, whole_numbers: true}" in found
    assert advice.of_spellings("user", pl.Series(["7,0"]), Spelling(decimal=","), lists=True) is not None
    for values in (["17.0", "x"], ["17.0", "2.5"], ["10", "20"], ["7.0", "10"], []):
        assert advice.of_spellings("user", pl.Series(values, dtype=pl.String)) is None


def test_a_field_without_any_id_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,u,v,w\n" + "".join(f"{i % 2},{i % 3},{i},\n" for i in range(120)))
    (tmp_path / "s.yaml").write_text(
        "files: a.csv\nlabel: y\nfields: {u: categorical, v: categorical, w: categorical}\n"
    )
    found = prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True, min_count=5).provenance["warnings"]
    told = [text for text in found if "nothing can be learned" in text]  # type: ignore[attr-defined]
    assert len(told) == 2 and "values of 'v' in the training rows has an id" in told[0]
    assert told[1].startswith("'w' has no value in the training rows")


def test_a_value_with_and_without_blanks_is_told() -> None:
    found = advice.of_spellings("shop", pl.Series([" a", "a", "b ", " c", "c", "10"]))
    assert found is not None and found.startswith("'shop' has 2 values with and without blanks") and "' a'" in found
    assert advice.of_spellings("shop", pl.Series([" a", " b", "c"])) is None


def test_ids_that_floats_may_have_merged_are_told() -> None:
    found = advice.of_floats("user", pl.Series(["16777216", "-16777218", "7", "0.5", "inf-1"]), 2.0**24)
    assert found is not None and "'user' has 2 values from 2^24 on, such as 16777216" in found
    assert advice.of_floats("user", pl.Series(["16777215", "7"]), 2.0**24) is None


def test_prepare_warns_of_ids_in_narrow_floats(tmp_path: Path) -> None:
    rows = {"y": [0, 1] * 100, "u": [2.0**24 + 2 * (k % 5) for k in range(200)], "v": [k % 7.0 for k in range(200)]}
    pl.DataFrame(rows, schema_overrides={"u": pl.Float32, "v": pl.Float32}).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "s.yaml").write_text("files: a.parquet\nlabel: y\nfields: {u: categorical, v: categorical}\n")
    told = prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True).provenance["warnings"]
    assert [text.split()[:3] for text in told if "floats" in text] == [["'u'", "has", "5"]]  # type: ignore[attr-defined]


def test_prepare_warns_of_ids_written_in_two_ways_with_a_decimal_comma(tmp_path: Path) -> None:
    rows = "".join(f"{i % 2};{i % 3}{',0' if i % 4 else ''}\n" for i in range(60))
    (tmp_path / "a.csv").write_text("y;u\n" + rows)
    source = tmp_path / "s.yaml"
    source.write_text("files: a.csv\nlabel: y\nfields: {u: categorical}\ndelimiter: ;\ndecimal: ','\n")
    told = prepare("table", source, tmp_path / "out", quiet=True).provenance["warnings"]
    assert any("'u' has 3 values written in two ways" in text for text in told)  # type: ignore[attr-defined]
