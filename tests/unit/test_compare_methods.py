"""The scripts that compare methods and rank supernets: plans, chains of jobs, copies, statistics."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from embsearch_dist.config.read import load_config
from embsearch_dist.schema import Field, Schema
from tests.factories import CONFIGS
from tools.studies import method_tables
from tools.studies.budget_tables import kept_logloss

ROOT = Path(__file__).resolve().parents[2]
PLANS = sorted((ROOT / "configs" / "comparisons").glob("*.yaml"))


@pytest.fixture
def tool() -> ModuleType:
    return importlib.import_module("tools.studies.compare_methods")


@pytest.fixture
def ranks() -> ModuleType:
    return importlib.import_module("tools.studies.nasrec_ranks")


def write_plan(path: Path, runs: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"against": "a", "runs": runs}))
    return path


def arguments(out: Path) -> argparse.Namespace:
    return argparse.Namespace(out=out, data="DATA", extra=["train.epochs=1"])


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.stem)
def test_every_shipped_plan_names_configs_and_keys_that_are_there(tool: ModuleType, plan: Path) -> None:
    against, runs, _ = tool.read_plan(plan, [])
    assert against in [name for run in runs for name in [*run.leaves, *run.retrain]]
    for run in runs:
        for overrides in [run.search or {}, *run.retrain.values()]:
            given = [f"{k}={v}".replace("{run}", "RUN") for k, v in overrides.items() if "." in k]
            if "model.architecture" in overrides:
                given.append("model.backbone=nasrec")  # as retrain.py does behind a search of NASRec
            load_config(CONFIGS, ROOT / run.config, given)


def test_a_run_that_begins_as_another_is_behind_it_in_one_chain(tool: ModuleType, tmp_path: Path) -> None:
    runs = {
        "a": {"config": "c.yaml", "search": {}, "retrain": {"a": {}}},
        "b": {"config": "c.yaml", "search": {}, "leaves": ["b"]},
        "again": {"config": "c.yaml", "begin_as": "a", "search": {"search.name": "x"}, "retrain": {"again": {}}},
    }
    _, planned, _ = tool.read_plan(write_plan(tmp_path / "p.yaml", runs), [])
    chains = tool.chains_of(arguments(tmp_path / "out"), planned, 2)
    names = [[job.name for job in chain] for chain in chains]
    assert names == [["seed2-a-search", "seed2-a-a", "seed2-again-search", "seed2-again-again"], ["seed2-b-search"]]
    assert chains[0][2].before is not None and chains[0][0].before is None


def test_a_copy_leaves_out_what_was_retrained_and_is_made_once(tool: ModuleType, tmp_path: Path) -> None:
    source, copy = tmp_path / "a", tmp_path / "b"
    for file in ("config.yaml", "retrain/x/evaluation.json", "checkpoints/supernet/s"):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_text("one")
    tool.begin_as(source, copy)
    found = sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file())
    assert found == ["checkpoints/supernet/s", "config.yaml"]
    (source / "config.yaml").write_text("two")
    tool.begin_as(source, copy)
    assert (copy / "config.yaml").read_text() == "one"


@pytest.mark.parametrize("begin", ["later", "nobody"])
def test_a_run_begins_as_one_that_comes_before_it(tool: ModuleType, tmp_path: Path, begin: str) -> None:
    runs = {"a": {"config": "c", "begin_as": begin}, "later": {"config": "c"}}
    with pytest.raises(SystemExit, match=f"run a: begin_as: {begin} is no run that comes before it"):
        tool.read_plan(write_plan(tmp_path / "p.yaml", runs), [])


def test_the_gain_is_paired_by_seed_and_falls_back_to_the_one_reference(tool: ModuleType, tmp_path: Path) -> None:
    runs = [tool.Planned("r", "c.yaml", {}, {"a": {}, "b": {}})]
    aucs = {("a", 0): 0.5, ("a", 1): 0.6, ("b", 0): 0.52, ("b", 1): 0.63}
    for (name, seed), auc in aucs.items():
        path = tmp_path / f"seed{seed}" / "r" / "retrain" / name / "evaluation.json"
        path.parent.mkdir(parents=True)
        rest = dict.fromkeys(["logloss", "embedding_parameters", "dense_parameters", "flops_per_sample"], 1.0)
        path.write_text(json.dumps({"auc": auc, "backbone": {"a": "dlrm", "b": "nasrec"}[name], **rest}))
    rows = {row["name"]: row for row in tool.summarise(tmp_path, runs, 2, "a")}
    assert rows["b"]["gain"] == pytest.approx([0.025, 0.00707], abs=1e-5)
    assert rows["a"]["gain"] == [0.0, 0.0]
    text = tool.table(tool.summarise(tmp_path, runs, 2, "a"), "a")
    assert "0.5750 +- 0.0778" in text and "+0.0250 (s.e. 0.0050)" in text
    one = tool.table(tool.summarise(tmp_path, runs, 1, "a"), "a")
    assert "| 0.5200 | 1.0000 | +0.0200 (one seed) |" in one and "+-" not in one
    tool.draw(tool.summarise(tmp_path, runs, 1, "a"), "a", tmp_path / "one.png")


def test_a_result_that_some_seeds_lack_says_so(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As evaluate.py --router leaves it, which was given for one seed of three, not the first."""
    aucs = [{"a": 0.5}, {"a": 0.6, "a (fields router)": 0.63}, {"a": 0.7}]

    def results(out: Path, run: Any, seed: int) -> dict[str, dict[str, Any]]:
        own = {**dict.fromkeys(tool.FIGURES, 1.0), "backbone": "dlrm"}
        return {name: {**own, "auc": auc} for name, auc in aucs[seed].items()}

    monkeypatch.setattr(tool, "results_of", results)
    rows = tool.summarise(tmp_path, [tool.Planned("r", "c.yaml", {}, {"a": {}})], 3, "a")
    lines = tool.table(rows, "a").splitlines()
    assert lines[2].startswith("| a | dlrm | 0.6000 +- 0.1000 |")
    assert lines[3].startswith("| a (fields router) (1 of 3 seeds) | dlrm | 0.6300 | 1.0000 | +0.0300 (one seed) |")
    tool.draw(rows, "a", tmp_path / "some.png")


def test_the_error_of_a_gain_counts_the_seeds_that_are_paired(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that seed 0 lacks pairs two seeds of three."""
    aucs = [{"b": 0.6}, {"b": 0.52, "a": 0.5}, {"b": 0.63, "a": 0.6}]

    def results(out: Path, run: Any, seed: int) -> dict[str, dict[str, Any]]:
        own = {**dict.fromkeys(tool.FIGURES, 1.0), "backbone": "dlrm"}
        return {name: {**own, "auc": auc} for name, auc in aucs[seed].items()}

    monkeypatch.setattr(tool, "results_of", results)
    runs = [tool.Planned("r", "c.yaml", {}, {"b": {}})]
    rows = tool.summarise(tmp_path, runs, 3, "a")
    assert rows[0]["pairs"] == 2 and "+0.0250 (s.e. 0.0050)" in tool.table(rows, "a")


def test_two_results_of_one_name_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    runs = {k: {"config": "c", "retrain": {"ues-32": {}}} for k in ("a", "b")}
    with pytest.raises(SystemExit, match="2 runs have a result ues-32"):
        tool.read_plan(write_plan(tmp_path / "p.yaml", runs), [])


def test_a_pool_is_shown_by_its_mean_and_by_what_validation_chooses(tool: ModuleType, tmp_path: Path) -> None:
    runs = [tool.Planned("r", "c.yaml", {}, {"a": {}, "b": {}})]
    for name, auc, validation in (("a", 0.6, [0.5, 0.3]), ("b", 0.7, [0.4, 0.35])):
        folder = tmp_path / "seed0" / "r" / "retrain" / name
        folder.mkdir(parents=True)
        figures = {**dict.fromkeys(tool.FIGURES, 1.0), "auc": auc, "backbone": "nasrec"}
        (folder / "evaluation.json").write_text(json.dumps(figures))
        write_curve(folder, validation, 2)
    rows = {row["name"]: row for row in tool.summarise(tmp_path, runs, 1, "a", {"found": ["a", "b"]})}
    assert rows["mean of 2 found"]["auc"][0] == pytest.approx(0.65)
    assert rows["best of 2 found, by validation"]["auc"][0] == 0.6


def write_curve(folder: Path, validation: list[float], kept: int) -> None:
    """Logloss of the first, second, ... evaluation, and which of them has the weights that were kept."""
    lines: list[dict[str, Any]] = [{"split": "train", "step": 1, "loss": 0.1}]
    lines += [{"split": "validation", "step": k + 1, "logloss": v, "auc": 0.5} for k, v in enumerate(validation)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "training.json").write_text(json.dumps({"seconds": 1.0, "best_step": kept}))


def test_a_pool_and_the_page_choose_by_the_weights_that_are_measured(tool: ModuleType, tmp_path: Path) -> None:
    """AUC kept the last evaluation of the first one, whose logloss was best in the middle."""
    runs = [tool.Planned("r", "c.yaml", {}, {"found-1": {}, "found-2": {}})]
    for name, auc, validation, kept in (("found-1", 0.6, [0.5, 0.3, 0.4], 3), ("found-2", 0.7, [0.4, 0.35], 2)):
        folder = tmp_path / "seed0" / "r" / "retrain" / name
        folder.mkdir(parents=True)
        figures = {**dict.fromkeys(tool.FIGURES, 1.0), "auc": auc, "backbone": "nasrec"}
        (folder / "evaluation.json").write_text(json.dumps(figures))
        write_curve(folder, validation, kept)
    pools = {"found": ["found-1", "found-2"]}
    rows = {row["name"]: row for row in tool.summarise(tmp_path, runs, 1, "found-1", pools)}
    lines = [{k: str(v) for k, v in line.items()} for line in tool.lines_of(tmp_path, runs, 1)]
    page = method_tables.results_of(lines)
    assert rows["best of 2 found, by validation"]["auc"][0] == page["found: by validation"]["test_auc"] == 0.7
    path = tmp_path / "alone" / "retrain" / "k"
    path.mkdir(parents=True)
    write_curve(path, [0.5, 0.3, 0.4], 3)
    assert kept_logloss(path) == 0.4
    (path / "training.json").unlink()
    with pytest.raises(SystemExit, match="retrain/k: no finished training tells a validation logloss"):
        kept_logloss(path)


def test_each_model_has_a_line_with_its_origin(tool: ModuleType, tmp_path: Path) -> None:
    """One that was trained by itself, and two routings of what a search has left."""
    runs = [tool.Planned("r", "c.yaml", {}, {"a": {}}, ["gated"])]
    figures = {**dict.fromkeys(tool.FIGURES, 1.0), "auc": 0.6, "backbone": "fm"}
    for file in ("a/evaluation.json", "gated/evaluation-exact.json", "gated/evaluation-fields.json"):
        path = tmp_path / "seed0" / "r" / "retrain" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures))
    folder = tmp_path / "seed0" / "r" / "retrain" / "a"
    (folder / "training.json").write_text(json.dumps({"seconds": 12.34, "best_step": 20}))
    curve = [{"step": s, "split": "validation", "auc": 0.01 * s, "logloss": 0.4} for s in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    Schema("small", (Field("f", 3),), rows={"train": 7}).save(folder)
    (tmp_path / "logs").mkdir()
    jobs = [{"job": f"seed0-r-{name}", "seconds": 1.0, "exit": 0, "commit": name} for name in ("a", "search")]
    jobs = [{**job, "command": f"x --run.dir={tmp_path}/seed0 --data.path=/data"} for job in jobs]
    (tmp_path / "logs" / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    lines = tool.lines_of(tmp_path, runs, 1)
    found = [(line["model"], line["commit"], line["validation_auc"], line["training_seconds"]) for line in lines]
    rest = [(f"gated ({kind} router)", "search", "", "") for kind in ("exact", "fields")]
    assert sorted(found) == [("a", "a", pytest.approx(0.2), 12.3), *rest]
    assert {line["command"] for line in lines} == {"x --run.dir=OUT/seed0 --data.path=PREPARED"}
    assert {tuple(line) for line in lines} == {tool.COLUMNS} and lines[-1]["test_auc"] == 0.6
    assert any(line["data"].endswith(" 7 training rows") for line in lines)


def test_an_evaluation_of_another_split_is_no_result_of_its_own(tool: ModuleType, tmp_path: Path) -> None:
    runs = [tool.Planned("r", "c.yaml", {}, {"a": {}})]
    folder = tmp_path / "seed0" / "r" / "retrain" / "a"
    folder.mkdir(parents=True)
    for file, split, auc in (("evaluation", "test", 0.6), ("evaluation-validation", "validation", 0.9)):
        figures = {**dict.fromkeys(tool.FIGURES, 1.0), "auc": auc, "backbone": "fm", "split": split}
        (folder / f"{file}.json").write_text(json.dumps(figures))
    assert [(row["name"], row["auc"][0]) for row in tool.summarise(tmp_path, runs, 1, "a")] == [("a", 0.6)]
    assert [line["test_auc"] for line in tool.lines_of(tmp_path, runs, 1)] == [0.6]


def test_a_refitted_model_has_no_validation_figures(tool: ModuleType, tmp_path: Path) -> None:
    """Nothing stopped it, and a short training without evaluations leaves no curve at all."""
    runs = [tool.Planned("r", "c.yaml", {}, {"a": {}})]
    folder = tmp_path / "seed0" / "r" / "retrain" / "a"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({**dict.fromkeys(tool.FIGURES, 0.6), "backbone": "nasrec"}))
    (folder / "training.json").write_text(json.dumps({"seconds": 1.0, "best_step": None}))
    (line,) = tool.lines_of(tmp_path, runs, 1)
    assert (line["validation_auc"], line["test_auc"]) == ("", 0.6)


def test_a_pool_of_an_unknown_result_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    plan = {"against": "a", "runs": {"r": {"config": "c", "retrain": {"a": {}}}}, "pools": {"p": ["a", "b"]}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(SystemExit, match="pool p: no run has a result b"):
        tool.read_plan(tmp_path / "p.yaml", [])


def test_an_override_may_name_the_run_directory(tool: ModuleType, tmp_path: Path) -> None:
    run = tool.Planned("r", "c.yaml", {}, {"second": {"model.architecture": "{run}/architectures/rank-2.json"}})
    job = tool.chain_of(arguments(tmp_path), run, 1)[1]
    assert str(tmp_path / "seed1" / "r" / "architectures" / "rank-2.json") in job.arguments


def test_rank_statistics_know_the_same_and_the_opposite_order(
    ranks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "RESAMPLED", 100)
    trained = {f"k{i}": 0.1 * i for i in range(9)}
    same = ranks.measure(("s", "tuned"), {k: 2 * v for k, v in trained.items()}, trained)
    other = ranks.measure(("s", "plain"), {k: -v for k, v in trained.items()}, trained)
    assert [same[k][0] for k in ranks.STATISTICS] == pytest.approx([1, 1, 1])
    assert [other[k][0] for k in ranks.STATISTICS] == pytest.approx([-1, -1, -1])
    assert "| s | tuned | 1.00 (1.00 to 1.00) |" in ranks.table([same, other], 9)


def test_scores_of_another_measurement_are_not_taken(ranks: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    signature = {"supernet": json.dumps({"run.seed": 1}), "evolution": {"population": 4}}
    path.write_text(json.dumps({"signature": signature}))
    ranks.check_asked(argparse.Namespace(seed=1, networks=4), path)
    for seed, networks, told in ((0, 4, "--seed 1, not 0"), (1, 6, "--networks 4, not 6")):
        with pytest.raises(SystemExit, match=f"tuned.json: scored with {told}; give each measurement its --out"):
            ranks.check_asked(argparse.Namespace(seed=seed, networks=networks), path)


def test_networks_are_trained_alone_behind_tables_of_their_spaces_width(ranks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    body = {"signature": {"space": {"width": 8}}, "seen": [{"key": "k", "blocks": []}]}
    (tmp_path / "s" / "tuned.json").write_text(json.dumps(body))
    args = argparse.Namespace(config="c.yaml", data="DATA", out=tmp_path, seed=0, extra=[])
    ((job,),) = ranks.alone_chains(args, "s")
    words = list(job.arguments)
    assert words[words.index("--allocation") + 1] == "ues-8"
    assert words[words.index("--model.unified_width") + 1] == "8"
