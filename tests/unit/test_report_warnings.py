"""What the report says of results that are none, of speeds, and of what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist.files import write_sealed
from embsearch_dist.report import history
from embsearch_dist.report.following import commands
from embsearch_dist.report.groups import differing_columns, found
from embsearch_dist.report.result import Result
from embsearch_dist.report.runs import Group, Retrain, Run, load_run


@pytest.mark.parametrize(
    "lost", ["retrain/soft/evaluation.json", "retrain/ues-4/training.json", "architecture.json", "search/pareto.json"]
)
def test_a_result_that_was_written_and_is_gone_is_told(tmp_path: Path, lost: str) -> None:
    for home in (tmp_path, tmp_path / "retrain" / "ues-4"):
        home.mkdir(parents=True, exist_ok=True)
        (home / "run.lock").touch()
    (tmp_path / "metrics.jsonl").touch()
    write_sealed(tmp_path / lost, {"auc": 0.5})
    (tmp_path / lost).unlink()
    assert load_run(tmp_path).damaged == [f"{tmp_path / lost} is gone: it was written there"]


def test_groups_that_are_alike_are_called_nothing_found(tmp_path: Path) -> None:
    rows = {"train": 100, "validation": 10, "test": 10}
    groups = [Group(rows, {"a": 20, "b": 10}), Group(rows, {"a": 20, "b": 9})]
    assert differing_columns([g.widths for g in groups]) == (1, 30)
    section = found([Run(tmp_path, "one", groups=groups)], tmp_path)
    assert section is not None and "groups of one differ in 1 of 30 columns" in section.body
    groups[1].widths["a"] = 5
    section = found([Run(tmp_path, "one", groups=groups)], tmp_path)
    assert section is not None and "Nothing found" not in section.body


@pytest.mark.parametrize(("last", "said"), [(0.9, True), (0.1, False)])
def test_a_policy_that_stays_undecided_is_told(tmp_path: Path, last: float, said: bool) -> None:
    lines = [{"stage": "search", "step": k, "entropy": e} for k, e in enumerate([1.1, 1.0, last])]
    section = history.search([Run(tmp_path, "mine", metrics=lines)], tmp_path)
    assert section is not None and ("the policy of mine is still undecided" in section.body) == said


def test_speed_is_a_median_of_two_digits_with_its_middle_half(tmp_path: Path) -> None:
    lines = [{"stage": "fit", "step": k, "time": k, "samples_per_s": 1000.0 + 111 * k} for k in range(9)]
    assert ">1,400 (1,200 to 1,700)<" in history.learning([Run(tmp_path, "mine", metrics=lines)], tmp_path).body


def test_the_next_commands_fit_what_is_there(tmp_path: Path) -> None:
    run = Run(tmp_path / "my run")
    assert [c for _, c in commands(run)] == [f"python launch/search.py --run.dir '{tmp_path}/my run'"]
    run.widths = {"a": 4}
    assert [c.split("'")[-1] for _, c in commands(run)] == ["", " --allocation bracket"]
    run.retrains = [Retrain("adass", 0, [])]
    run.results = [Result(n, "test", 0, {}, {}, tmp_path) for n in ("adass", "ues-4")]
    assert [c.split("'")[-1] for _, c in commands(run)] == [" --run.seed 1"]
