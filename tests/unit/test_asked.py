"""What is finished in the folder of a study is not run again: the folder is held to the settings that it came from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.factories import small_schema
from tools.studies import compare_budgets, compare_methods, consistency, group_widths
from tools.studies.asked import body_of, keep_to

RECIPE = {
    "method": "adass",
    "model": {"backbone": "deepfm"},
    "train": {"epochs": 2},
    "search": {"candidates": [0, 4, 8]},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A config, a plan of one run, and two data sets of other cardinalities."""
    write(tmp_path / "c.yaml", RECIPE)
    run = {"config": str(tmp_path / "c.yaml"), "search": {}, "retrain": {"a": {}}}
    write(tmp_path / "plan.yaml", {"against": "a", "runs": {"a": run}})
    small_schema(60, 30).save(tmp_path / "data")
    small_schema(60, 31).save(tmp_path / "other")
    return tmp_path


def write(path: Path, body: object) -> None:
    path.write_text(yaml.safe_dump(body))


def budgets(home: Path, *words: str) -> None:
    given = ["--config", str(home / "c.yaml"), "--data", str(home / "data"), "--out", str(home / "out"), *words]
    compare_budgets.Plan(compare_budgets.parser().parse_args(given)).keep_to()


def methods(home: Path, *words: str) -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--data", default=str(home / "data"))
    given.add_argument("--extra", nargs="*", default=[])
    _, runs, _ = compare_methods.read_plan(home / "plan.yaml", [])
    keep_to(home / "out", **compare_methods.asked_of(given.parse_args(words), runs))


def groups(home: Path, *words: str) -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--data", type=Path, default=home / "data")
    args = given.parse_args(words)
    args.small, args.ihas, args.widths, args.utilities = False, *[home / "c.yaml"] * 3
    keep_to(home / "out", **group_widths.asked_of(args))


def ranking(home: Path, *words: str) -> None:
    given = ["--config", str(home / "c.yaml"), "--data", str(home / "data"), "--out", str(home / "out"), *words]
    consistency.Study(consistency.parser().parse_args(given)).keep_to()


@pytest.mark.parametrize("tool", [budgets, methods, groups, ranking])
def test_a_folder_is_held_to_its_recipe_and_data(home: Path, tool: Callable[..., None]) -> None:
    tool(home)
    tool(home)
    with pytest.raises(SystemExit, match="holds results of other settings: --data"):
        tool(home, "--data", str(home / "other"))
    write(home / "c.yaml", {**RECIPE, "train": {"epochs": 3}})
    with pytest.raises(SystemExit, match=r"(--config|--ihas|run a) .*Give another --out"):
        tool(home)
    write(home / "c.yaml", RECIPE)
    tool(home)


@pytest.mark.parametrize("tool", [budgets, methods, ranking])
def test_a_folder_is_held_to_its_overrides(home: Path, tool: Callable[..., None]) -> None:
    tool(home, "--extra", "train.epochs=3")
    with pytest.raises(SystemExit, match=r"--extra \['train.epochs=3'\], now \[\]"):
        tool(home)


def test_a_comparison_may_be_given_more_and_no_other_settings_of_what_it_has(home: Path) -> None:
    budgets(home, "--methods", "adass,mde", "--settings", "mde:search.alpha=1", "--variants", "plain:model.unify=mixed")
    budgets(home, "--methods", "mde,fdo,auto", "--settings", "mde:search.alpha=1", "--seeds", "9", "--budgets", "5%")
    with pytest.raises(SystemExit, match="settings of mde .'search.alpha=1'., now .'search.alpha=2'."):
        budgets(home, "--methods", "mde", "--settings", "mde:search.alpha=2")
    with pytest.raises(SystemExit, match="variant plain"):
        budgets(home, "--methods", "", "--variants", "plain:model.unify=always")
    write(home / "c.yaml", {**RECIPE, "search": {"candidates": [0, 4, 16]}})
    with pytest.raises(SystemExit, match="search of adass"):
        budgets(home, "--methods", "adass")
    write(home / "c.yaml", RECIPE)


def test_another_plan_may_have_more_runs_and_no_other_settings_of_a_result(home: Path) -> None:
    methods(home)
    plan = yaml.safe_load((home / "plan.yaml").read_text())
    plan["runs"]["b"] = {"config": str(home / "c.yaml"), "retrain": {"b": {"allocation": "ues-4"}}}
    write(home / "plan.yaml", plan)
    methods(home)
    plan["runs"]["a"]["retrain"]["a"] = {"train.epochs": 9}
    write(home / "plan.yaml", plan)
    with pytest.raises(SystemExit, match="result a .*'train.epochs': 9"):
        methods(home)


def test_the_body_of_a_config_counts_and_not_its_text() -> None:
    assert body_of("c", {"a": 1, "b": [2]}) == body_of("c", {"b": [2], "a": 1}) != body_of("c", {"a": 1, "b": [3]})
    assert sys.getsizeof(body_of("c", {})) < 200
