"""List fields through every script: made-up weighted lists, and MovieLens's genres as one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.schema import Schema
from tests.factories import command_line
from tests.raw_lists import make_lists

SMALL = ["train.epochs=1", "search.supernet.epochs=1", "search.policy.steps=2"]


def search_and_train(data: Path, config: Path, run: Path, run_script: Callable, *overrides: str) -> dict:
    """What the evaluation of the found widths says."""
    run_script("search.py", "--config", config, *command_line(data, run, *SMALL, *overrides))
    run_script("retrain.py", "--run", run)
    body = json.loads((run / "retrain" / "adass" / "evaluation.json").read_text())
    assert list(body["widths"]) == Schema.load(data).names
    assert body["rows"] == Schema.load(data).rows["test"] and 0 < body["logloss"] < 2
    return body


@pytest.mark.slow
def test_weighted_and_averaged_lists_go_from_the_file_to_the_report(
    config: Path, tmp_path: Path, run_script: Callable
) -> None:
    source, _ = make_lists(tmp_path / "raw", rows=4000)
    out = run_script("prepare.py", "--format", "table", "--input", source, "--out", tmp_path / "data", "--min-count", 2)
    assert re.search(r"^likes +list: 1\.\d+ values a training row, weighted sum$", out.stdout, re.MULTILINE)
    run = tmp_path / "run"
    assert search_and_train(tmp_path / "data", config, run, run_script, "train.epochs=4")["auc"] > 0.7
    run_script("evaluate.py", "--run", run / "retrain" / "adass", "--split", "validation")
    assert (run / "retrain" / "adass" / "evaluation-validation.json").exists()
    run_script("report.py", run)
    assert "likes" in (run / "report" / "index.html").read_text()
    again = run_script("prepare.py", "--verify", tmp_path / "data")
    assert "all as in manifest.json" in again.stdout


def test_movielens_genres_as_a_list_are_searched_and_trained(
    data_dir: Path, config: Path, tmp_path: Path, run_script: Callable
) -> None:
    ratings = data_dir / "movielens-1m" / "ratings_first_50440.dat"
    if not ratings.exists():
        pytest.skip(f"no MovieLens-1M sample at {ratings}")
    words = ["--format", "movielens_1m", "--input", ratings, "--genres", "list", "--split", "time"]
    run_script("prepare.py", *words, "--out", tmp_path / "data", "--quiet")
    genres = Schema.load(tmp_path / "data").fields[7]
    assert (genres.name, genres.pooling, genres.weighted) == ("genres", "mean", False) and genres.mean_length > 1.5
    large = ["train.batch_size=2048", "search.supernet.batch_size=2048", "search.supernet.eval_batch_size=2048"]
    assert search_and_train(tmp_path / "data", config, tmp_path / "run", run_script, *large)["auc"] > 0.55


def test_genres_of_other_data_are_refused(tmp_path: Path, run_script: Callable) -> None:
    for words in (["synthetic", "--rows", 2000], ["criteo", "--input", tmp_path]):
        done = run_script("prepare.py", "--format", *words, "--genres", "list", "--out", tmp_path / "o", check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: --genres ") and "Leave it out" in done.stderr
