"""The study of several days: how time is cut, what its table says, and a whole chain where the ratings are at hand."""

from __future__ import annotations

import csv
import gzip
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.rundir import release

daily: Any = importlib.import_module("tools.studies.daily")
tables: Any = importlib.import_module("tools.studies.daily_tables")


def test_ratings_are_put_in_order_of_time_and_cut(tmp_path: Path) -> None:
    lines = [f"{k}::7::5::{t}".encode() for k, t in enumerate([30, 10, 20, 10, 50, 40, 60, 80, 70, 90])]
    (tmp_path / "r.dat").write_bytes(b"\n".join(lines))
    (tmp_path / "r.dat.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    ordered = daily.read_lines(tmp_path / "r.dat")
    assert [int(line.split(b"::")[0]) for line in ordered] == [1, 3, 2, 0, 5, 4, 6, 8, 7, 9], "equal times as they were"
    assert daily.read_lines(tmp_path / "r.dat.gz") == ordered
    parts = daily.cut(ordered, 0.6, 3)
    assert [len(p) for p in parts] == [6, 1, 2, 1] and sum(parts, []) == ordered
    (tmp_path / "r.dat").write_text("1::2::3\n1\n")
    with pytest.raises(UserError, match="a line has no time behind its last '::'"):
        daily.read_lines(tmp_path / "r.dat")


def test_the_table_compares_with_cold_seed_by_seed() -> None:
    values = {("warm", 0): 0.75, ("warm", 1): 0.77, ("cold", 0): 0.70, ("cold", 1): 0.74}
    other = {"logloss": 0.6, "steps": 1200, "train_s": 1.25, "prepare_s": 0.5, "day": 1}
    lines = [{"arm": arm, "seed": seed, "auc": auc, **other} for (arm, seed), auc in values.items()]
    assert tables.difference(lines, "warm", 1, "auc") == "+0.04000 +- 0.01000"
    text = tables.table(lines)
    assert text.startswith("2 seeds.")
    assert "| 1 | warm | 0.76000 | +0.04000 +- 0.01000 | 0.60000 | +0.00000 +- 0.00000 | 1,200 | 1.2 | 0.5 |" in text
    assert "| 1 | cold | 0.72000 |  | 0.60000 |  | 1,200 |" in text


@pytest.mark.slow
def test_a_chain_of_days_on_real_ratings(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data_dir / "movielens-1m-time" / "ratings_exact_time_subset.dat.gz"
    if not whole.exists():
        pytest.skip(f"{whole} is missing: MovieLens-1M by time")
    (tmp_path / "r.dat").write_bytes(b"\n".join(gzip.decompress(whole.read_bytes()).splitlines()[::40]))
    words = ["--ratings", tmp_path / "r.dat", "--movielens", data_dir / "movielens-1m", "--out", tmp_path / "out"]
    short = ["--days", 3, "--seeds", 1, "--width", 8, "--set", "train.batch_size=128"]
    monkeypatch.setattr(sys, "argv", ["daily.py", *map(str, [*words, *short])])
    written = []
    for _ in range(2):  # the second time all is there
        daily.main()
        release()
        written.append((tmp_path / "out" / "daily.csv").read_text())
    assert written[0] == written[1]
    lines = list(csv.DictReader((tmp_path / "out" / "daily.csv").open()))
    assert [(r["day"], r["arm"]) for r in lines] == [(d, arm) for d in "12" for arm in daily.ARMS]
    auc = {(r["day"], r["arm"]): float(r["auc"]) for r in lines}
    for day in "12":
        assert auc[day, "warm"] > auc[day, "cold"] + 0.03, "after so few steps a fresh model knows almost nothing"
    assert (tmp_path / "out" / "daily.png").stat().st_size > 10_000
