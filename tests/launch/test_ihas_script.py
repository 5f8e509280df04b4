"""iHAS through the scripts: search, one training per group, and all groups evaluated as one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embsearch_dist.files import read_json, read_sealed, write_json, write_sealed
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.schema import Schema
from tests.factories import command_line, recorded, small_config

SEARCH = [
    "search.width=4",
    "search.training.batch_size=256",
    "search.training.eval_batch_size=200",
    "search.training.epochs=2",
    "search.training.log_every=1",
    "search.outer.pretrain_epochs=0.5",
    "search.outer.every=2",
    "search.outer.lr=0.02",
    "search.groups.batch_size=200",
    "search.groups.min_rows=50",
    "train.epochs=1",
]
UNEQUAL = ("inference_rows_per_s", "share_of_time")  # from run to run


@pytest.fixture(scope="module")
def searched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of two groups; tests work on copies of it."""
    return tmp_path_factory.mktemp("searched") / "run"


@pytest.fixture
def run(searched: Path, data: Path, tmp_path: Path, run_script: Callable) -> Path:
    if not searched.exists():
        config = searched.parent / "ihas.yaml"
        config.write_text(small_config("to-be-named", "to-be-named", *SEARCH, method="ihas").to_yaml())
        done = run_script("search.py", "--config", config, *command_line(data, searched))
        assert f"next: python launch/retrain.py --run {searched}" in done.stdout
    return Path(shutil.copytree(searched, tmp_path / "run"))


def figures(path: Path) -> dict[str, Any]:
    body = read_sealed(path)
    return {k: {n: v for n, v in body[k].items() if n not in UNEQUAL} if k == "router" else body[k] for k in body} | {
        "inference_rows_per_s": None,
    }


def test_groups_are_trained_and_evaluated_as_one(run: Path, run_script: Callable, on_two_ranks: Callable) -> None:
    schema = Schema.load(run)
    grouped = GroupedAllocation.load(run / GROUPS, schema)
    done = run_script("retrain.py", "--run", run)
    own = run / "retrain" / "ihas"
    assert f"-> {own}" in done.stdout
    assert "ihas (router: fields): test auc" in done.stdout
    for k, rows in enumerate(grouped.rows):
        one = own / f"group-{k}"
        assert read_json(one / "allocation.json")["widths"] == grouped.allocations[k].widths
        assert len(recorded(one, "retrain", "loss")) == max(1, rows["train"] // 256)
        assert f"path: {run / 'groups' / f'group-{k}'}" in (one / "config.yaml").read_text()
    assert not (own / "allocation.json").exists() and not (own / "checkpoints").exists()
    result = read_json(own / "evaluation.json")
    assert result["rows"] == schema.rows["test"] == sum(g["rows"] for g in result["groups"])
    assert [g["rows"] for g in result["groups"]] == [r["test"] for r in grouped.rows]
    assert result["router"]["agreement"] == 1 and result["router"]["kind"] == "centres"
    base = 4 * sum(schema.cardinalities)
    assert result["router"]["embedding_parameters"] == base
    assert result["embedding_parameters"] == base + grouped.total("parameters")
    fields = read_json(own / "evaluation-fields.json")
    assert fields["router"]["kind"] == "fields" and 0.5 < fields["router"]["agreement"] <= 1
    assert fields["dense_parameters"] < result["dense_parameters"]

    # Given again: nothing is trained any more, and the figures are the same.
    again = run_script("retrain.py", "--run", run)
    assert again.stdout.count("continuing from") == 2
    assert read_json(own / "evaluation.json")["auc"] == result["auc"]
    before = figures(own / "evaluation.json")
    shown = run_script("evaluate.py", "--run", own)
    assert json.loads(shown.stdout)["auc"] == result["auc"]
    assert figures(own / "evaluation.json") == before
    run_script("evaluate.py", "--run", own, "--router", "fields", "--split", "validation")
    assert read_json(own / "evaluation-validation-fields.json")["rows"] == schema.rows["validation"]
    on_two_ranks("evaluate.py", "--run", own, "--group", "left", "--against", own)
    two = figures(own / "evaluation.json")
    assert two["auc"] == pytest.approx(before["auc"], abs=1e-4)
    assert two["router"]["agreement"] > 0.99
    assert two["by_group"]["groups"] > 5 and two["by_group"]["rows"] > 0.9
    itself = read_json(own / "difference-to-ihas.json")
    assert {itself[key][end] for key in ("auc", "logloss", "group_auc") for end in ("value", "low", "high")} == {0}

    run_script("report.py", run)
    assert "ihas" in (run / "report" / "index.html").read_text()


@pytest.mark.slow
def test_frozen_gates_go_to_another_model_and_tables_are_handed_down(run: Path, run_script: Callable) -> None:
    words = ["--run", run, "--model.backbone", "fm", "--model.hidden", "[]", "--search.groups.inherit", "true"]
    run_script("retrain.py", *words, "--name", "other", "--run.seed", 4)
    own = run / "retrain" / "other-seed4"
    result = read_json(own / "evaluation.json")
    assert (result["name"], result["seed"], result["backbone"]) == ("other", 4, "fm")
    assert result["router"]["agreement"] == 1  # the router is still the search's, of the search's model
    told = run_script("retrain.py", "--run", run, "--name", "other", "--run.seed", 4, check=False)
    assert told.returncode == 2 and "holds another training; give --name" in told.stderr
    alone = run_script("retrain.py", "--run", run, "--allocation", "ues-4", "--name", "other", check=False)
    assert alone.returncode == 0
    clash = run_script("retrain.py", "--run", run, "--allocation", "ues-4", "--name", "other-seed4", check=False)
    assert clash.returncode == 2 and "holds another training" in clash.stderr


def test_a_killed_training_of_groups_goes_on(run: Path, run_script: Callable) -> None:
    run_script("retrain.py", "--run", run, "--name", "whole")
    words = ["--run", run, "--name", "broken", "--train.save_every", 2]
    killed = run_script("retrain.py", *words, check=False, env={"EMBSEARCH_FAULTS": "kill step=3 stage=retrain"})
    assert killed.returncode != 0 and not (run / "retrain" / "broken" / "group-1").exists()
    run_script("retrain.py", *words)
    whole, broken = (figures(run / "retrain" / name / "evaluation.json") for name in ("whole", "broken"))
    assert {**broken, "name": "whole"} == whole


def test_a_group_too_small_to_train_on_is_dissolved(run: Path, run_script: Callable) -> None:
    def cluster(min_rows: int) -> tuple[np.ndarray, str]:
        words = ["--config", run / "config.yaml", "--run.dir", run]
        done = run_script("search.py", *words, "--search.groups.k", 3, "--search.groups.min_rows", min_rows)
        return np.load(run / "groups" / "assignment" / "train.npy"), done.stdout

    before, said = cluster(1)
    sizes = np.bincount(before)
    assert len(sizes) == 3 and "dissolved" not in said and list(sizes) == sorted(sizes, reverse=True)
    after, said = cluster(int(sizes[2]) + 1)
    assert f"group 2 has {sizes[2]:,} training rows: dissolved (search.groups.min_rows)" in said
    # Its rows have gone to the centre next to them, and no other row has moved (the numbers of the two may have).
    assert set(after) == {0, 1}
    pairs = {(int(b), int(a)) for b, a in zip(before, after, strict=True) if b != 2}
    assert pairs in ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})
    grouped = GroupedAllocation.load(run / GROUPS, Schema.load(run))
    assert [r["train"] for r in grouped.rows] == list(np.bincount(after))


@pytest.mark.slow  # a script is started again and again
def test_what_does_not_fit_is_refused(run: Path, data: Path, tmp_path: Path, run_script: Callable) -> None:
    def refused(script: str, *words: object) -> str:
        done = run_script(script, *words, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return str(done.stderr.strip().splitlines()[-1])

    assert "not a directory of retrain.py" in refused("evaluate.py", "--run", run)
    shutil.copytree(data, tmp_path / "other")
    schema = read_json(data / "schema.json")
    write_sealed(tmp_path / "other" / "schema.json", {**schema, "dataset": "else"})
    assert "holds other rows than those that" in refused("retrain.py", "--run", run, "--data.path", tmp_path / "other")
    run_script("retrain.py", "--run", run)
    own = run / "retrain" / "ihas"
    told = refused("evaluate.py", "--run", own, "--router", "field")
    assert "--router: 'field' is none of centres, fields (did you mean 'fields'?)" in told
    on_other = run_script("evaluate.py", "--run", own, "--data.path", tmp_path / "other")
    assert json.loads(on_other.stdout)["router"]["agreement"] is None

    groups = read_json(run / GROUPS)
    write_json(run / GROUPS, {**groups, "groups": groups["groups"][::-1]})
    assert "has other groups than those that" in refused("evaluate.py", "--run", own)
    write_json(run / GROUPS, {**groups, "schema": "0123"})
    assert "(schema 0123), not for" in refused("retrain.py", "--run", run)
    run_script("retrain.py", "--run", run, "--allocation", "ues-4")
    assert "holds one model, not models of groups" in refused(
        "evaluate.py", "--run", run / "retrain" / "ues-4", "--router", "fields"
    )
