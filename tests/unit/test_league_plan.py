"""Plans of the league: those that ship, wrong ones, and what a dry run lists."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from embsearch_dist.config.read import load_config
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema
from launch import prepare_arguments
from tests.factories import CONFIGS
from tools.league import costs
from tools.league.plan import ROOT, LeaguePlan, read_plan
from tools.make import planted
from tools.studies.asked import slug
from tools.studies.comparable import comparable

SHIPPED = sorted((ROOT / "tools" / "league" / "plans").glob("*.yaml"))
GOOD = {"data_set": "x", "config": "configs/synthetic/adass_deepfm.yaml", "budgets": ["10%"], "widths": [4], "seeds": 1}


@pytest.fixture
def tool() -> ModuleType:
    return importlib.import_module("tools.studies.league")


def plan_of(folder: Path, **keys: object) -> LeaguePlan:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (GOOD | keys).items() if v is not None}))
    return read_plan(path)


def test_there_is_a_plan_for_every_kind_of_data() -> None:
    kinds = ("movielens_1m_time", "movielens_100k_time", "planted_widths", "planted_idle", "populations",
             "criteo_like_pairs", "criteo_like_crosses", "tiny")  # fmt: skip
    assert {read_plan(p).data_set for p in SHIPPED} == set(kinds)
    for path in SHIPPED:
        plan = read_plan(path)
        assert path.stem == plan.data_set
        assert plan.data_set == "tiny" or set(plan.methods) == set(comparable())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_dry_run_lists_every_command_of_a_shipped_plan(
    path: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read_plan(path)
    words = ["run", "--plan", str(path), "--out", str(tmp_path), "--raw", "RAW", "--seeds", "1", "--dry-run"]
    assert tool.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0] for line in lines[1:]]
    alone = (len(plan.budgets) - 1) * ("auto" in plan.methods)  # it searches for each budget
    searches, trainings = len(plan.methods) + alone, len(plan.widths) + len(plan.methods) * len(plan.budgets)
    assert len(names) == len(set(names)) == len(plan.prepare) + searches + trainings
    assert names[0] == "prepare-1" and names[len(plan.prepare)].startswith("seed0-search-")
    data = tmp_path / plan.data_set / "data"
    assert f"--out {data}" in lines[len(plan.prepare)]
    runs = [line for line in lines[1 + len(plan.prepare) :] if "retrain.py --run" not in line]
    assert all(f"--data.path={data}" in line for line in runs)
    assert not data.exists()
    for method in plan.methods:  # what the searches are started with can be read, overrides included
        line = next(x for x in lines if x.startswith((f"seed0-search-{method}:", f"seed0-search-{method}-")))
        own = [w.strip("'").removeprefix("--") for w in line.split(" ") if w.strip("'").startswith("--search.name")]
        own += [f"{k}={v}" for k, v in plan.settings.get(method, {}).items()]
        file = plan.config if method == "adass" else tmp_path / plan.data_set / "configs" / f"{method}.yaml"
        name = load_config(CONFIGS, ROOT / file, own).search.name
        assert name == (method if method == "auto" else f"{method}-{slug(plan.budgets[0])}")


def test_searches_alone_train_nothing_that_is_found(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``auto`` chooses between trained models, which is a part of its search: under one budget it runs to its end."""
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"methods": ["fdo", "auto"], "budgets": ["10%", "50%"], "widths": [4, 8]}))
    data = tmp_path / "data"
    data.mkdir()
    (data / "schema.json").touch()
    words = ["run", "--plan", str(path), "--out", str(tmp_path), "--data", str(data), "--searches", "--dry-run"]
    assert tool.main(words) == 0
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["seed0-ues-8", "seed0-search-fdo", "seed0-search-auto-10pct", "seed0-auto-10pct"]


def test_costs_of_searches_are_told_the_cheapest_first() -> None:
    same = {"data_set": "x", "backbone": "fm", "data": "x 0f 9 training rows", "commit": "abc", "hardware": "CPU"}
    same |= {"cost_clock": "processor", "cost_reference": "UES-32", "search_memory_gib": "1.25"}
    rows = [
        same | {"method": method, "seed": str(seed), "search_cost": str(cost), "search_cost_seconds": str(600 * cost)}
        for method, cost in (("auto", 4.0), ("mde", 0.5))
        for seed, cost in ((0, cost), (1, cost + 1))
    ]
    text = costs.markdown(rows)
    assert text.index("| mde | 1.00 +- 0.71 | 600 | 1.2 |") < text.index("| auto | 4.50 +- 0.71 | 2,700 | 1.2 |")
    assert "seeds 0, 1, commit abc; CPU. Whole commands, processor time." in text and costs.AUTO_TOLD in text
    assert costs.AUTO_TOLD not in costs.markdown(rows[2:])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budget": ["10%"]}, "unknown key budget; there are data_set, config"),
        ({"widths": None}, "key widths is missing"),
        ({"seeds": 0}, "seeds: must be a number from 1 on, got 0"),
        ({"methods": ["mde", "nasrec"]}, "methods: nasrec is none of adass, utilities"),
        ({"methods": ["mde"], "settings": {"pep": {}}}, "settings: pep is not among the methods mde"),
        ({"config": "configs/none.yaml"}, "config: no file configs/none.yaml"),
        ({"prepare": [{"command": "x"}]}, "prepare, command 1: key leaves is missing"),
    ],
)
def test_a_wrong_plan_is_told_with_its_key(keys: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"plan.yaml: {message}"):
        plan_of(tmp_path, **keys)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_last_command_of_a_plan_prepares_data_where_its_runs_look_for_them(path: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    jobs = read_plan(path).preparation(out, data, "RAW")
    for job in jobs:
        assert (ROOT / job.script).exists()
        if job.script == "launch/prepare.py":
            args = prepare_arguments.parser("").parse_args([*job.arguments])
            prepare_arguments.check(args)
            assert args.out == data
    assert jobs[-1].result == data / "schema.json" and str(data) in jobs[-1].arguments


def test_planted_data_have_the_idle_fields_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, idle in (("none", []), ("two", ["20", "40"])):
        assert planted.main(["--out", str(tmp_path / name), "--rows", "300", "--idle", *idle]) == 0
    fields = Schema.load(tmp_path / "none").names
    assert len(fields) == 10 and not any(n.startswith("idle") for n in fields)
    assert set(Schema.load(tmp_path / "two").names) - set(fields) == {"idle0", "idle1"}
    assert planted.main(["--out", str(tmp_path / "one"), "--idle", "1"]) == 2
    assert "--idle 1: a field has at least 2 values" in capsys.readouterr().err


def test_settings_become_words_of_the_comparison(tmp_path: Path) -> None:
    settings = {"utilities": {"search.candidates": [0, 4, 8], "search.evidence": 2.0}, "mde": {}}
    plan = plan_of(tmp_path, methods=["mde", "utilities"], settings=settings, extra={"train.epochs": 1})
    args = plan.arguments(tmp_path / "out", tmp_path / "data", jobs=3, seeds=4)
    assert (args.seeds, args.jobs, args.methods, args.budgets, args.widths) == (4, 3, "mde,utilities", "10%", "4")
    assert args.settings == ["utilities:search.candidates=[0, 4, 8],search.evidence=2.0"]
    assert args.extra == ["train.epochs=1"]
    assert plan.arguments(tmp_path, tmp_path, jobs=1, seeds=0).seeds == 1


def test_raw_data_and_prepared_data_are_asked_for_before_anything_runs(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: object) -> str:
        assert tool.main(["run", "--out", str(tmp_path), "--dry-run", *map(str, words)]) == 2
        return capsys.readouterr().err

    tiny, movielens = (ROOT / "tools" / "league" / "plans" / f"{n}.yaml" for n in ("tiny", "movielens_1m_time"))
    assert "movielens_1m_time: its data are made from raw files. Give their folder (--raw)" in told("--plan", movielens)
    assert "no prepared data are there" in told("--plan", movielens, "--data", tmp_path)
    assert "--data is the data of one plan" in told("--plan", movielens, tiny, "--data", tmp_path)
    assert "two plans are of the data set tiny" in told("--plan", tiny, tiny)
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(GOOD))
    assert "x: the plan does not say how its data are prepared" in told("--plan", tmp_path / "bare.yaml")
    (tmp_path / "schema.json").write_text("{}")
    given = ["--plan", str(tiny), "--data", str(tmp_path), "--dry-run"]
    assert tool.main(["run", "--out", str(tmp_path / "out"), *given]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("seed0-search-")
