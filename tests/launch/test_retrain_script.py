"""``retrain.py``, ``evaluate.py`` and ``report.py`` on a finished search, with one process and with two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.schema import Schema
from tests.factories import recorded, write_config
from tests.launch.processes import LAUNCH, TORCHRUN, finish

WIDTHS = {"left": 4, "big": 2, "right": 8, "idle": 0}


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    """A run directory as a search leaves it: config, schema and allocation."""
    directory = tmp_path / "run"
    directory.mkdir()
    schema = Schema.load(data)
    config = write_config(directory / "config.yaml")
    named = config.read_text().replace("path: to-be-named", f"path: {data}")
    config.write_text(named.replace("dir: to-be-named", f"dir: {directory}"))
    schema.save(directory)
    Allocation(schema, WIDTHS, {"method": "adass", "name": "adass"}).save(directory / "allocation.json")
    return directory


def test_retrain_evaluate_report(run: Path, run_script: Callable) -> None:
    done = run_script("retrain.py", "--run", run, "--train.epochs", 1)
    own = run / "retrain" / "adass"
    assert f"-> {own}" in done.stdout
    result = json.loads((own / "evaluation.json").read_text())
    assert result["widths"] == WIDTHS
    assert result["split"] == "test"
    assert 0 < result["auc"] < 1
    schema = Schema.load(run)
    assert result["embedding_parameters"] == Allocation(schema, WIDTHS).total("parameters")
    assert len(recorded(own, "retrain", "loss")) == 12

    values = ["--model.first_order", "value"]
    done = run_script("retrain.py", "--run", run, "--train.epochs", 1, "--allocation", "ues-8", *values)
    assert set(json.loads((run / "retrain" / "ues-8" / "allocation.json").read_text())["widths"].values()) == {8}
    uniform = json.loads((run / "retrain" / "ues-8" / "evaluation.json").read_text())
    assert uniform["embedding_parameters"] == 9 * sum(schema.cardinalities)  # each value has a weight of its own
    assert "(27.3% of UES-32)" in done.stdout  # 9 of 33 columns

    assert len(recorded(own, "retrain", "ne", "validation")) == len(
        recorded(own, "retrain", "calibration", "validation")
    )
    shown = run_script("evaluate.py", "--run", own, "--group", "left", "--against", run / "retrain" / "ues-8")
    again = json.loads(shown.stdout)
    assert {k: again[k] for k in ("auc", "ne", "ece", "reliability")} == {
        k: result[k] for k in ("auc", "ne", "ece", "reliability")
    }
    assert again["by_group"]["field"] == "left" and again["by_group"]["groups"] > 5
    assert again["intervals"]["auc"]["low"] < result["auc"] < again["intervals"]["auc"]["high"]
    difference = json.loads((own / "difference-to-ues-8.json").read_text())
    assert difference["auc"]["value"] == pytest.approx(result["auc"] - uniform["auc"], abs=1e-12)
    assert difference["logloss"]["value"] == pytest.approx(result["logloss"] - uniform["logloss"], abs=1e-6)
    assert difference["drawn"] == "left" and difference["resamples"] == 200 and difference["against"] == "ues-8"
    refused = run_script("evaluate.py", "--run", own, "--group", "x", check=False)
    assert refused.returncode == 2 and "'x' is a dense column" in refused.stderr
    run_script("evaluate.py", "--run", own, "--split", "validation")
    validation = json.loads((own / "evaluation-validation.json").read_text())
    assert validation["auc"] == max(recorded(own, "retrain", "auc", "validation"))

    page = run_script("report.py", run)
    html = Path(page.stdout.strip()).read_text()
    assert "ues-8" in html
    assert "adass" in html
    assert "Calibration" in html and "by left" in html


def test_the_same_training_continues_and_another_one_is_refused(run: Path, run_script: Callable) -> None:
    run_script("retrain.py", "--run", run, "--train.epochs", 1, "--name", "mine")
    own = run / "retrain" / "mine"
    before = (own / "evaluation.json").read_bytes(), (own / "allocation.json").read_bytes()
    again = run_script("retrain.py", "--run", run, "--train.epochs", 1, "--name", "mine")
    assert "continuing from" in again.stdout
    assert len(recorded(own, "retrain", "loss")) == 12
    refused = run_script("retrain.py", "--run", run, "--allocation", "ues-4", "--name", "mine", check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith(f"error: {own} holds another training; give --name")
    assert (own / "allocation.json").read_bytes() == before[1]
    seeded = run_script("retrain.py", "--run", run, "--train.epochs", 1, "--name", "mine", "--run.seed", 5)
    assert (run / "retrain" / "mine-seed5" / "evaluation.json").exists()
    assert "mine-seed5: test auc" in seeded.stdout


def test_the_uniform_widths_around_the_found_size_and_the_choice_between_two(run: Path, run_script: Callable) -> None:
    schema, short = Schema.load(run), ["--train.epochs", 1, "--train.steps", 3]
    size = Allocation(schema, WIDTHS).total("parameters")
    below = size // sum(schema.cardinalities)
    run_script("retrain.py", "--run", run, *short, "--allocation", "bracket")
    assert {p.name for p in (run / "retrain").iterdir()} == {f"ues-{below}", f"ues-{below + 1}"}
    for seed in (0, 0, 3):  # the second time both trainings are there
        done = run_script("retrain.py", "--run", run, *short, "--or-uniform", "--run.seed", seed)
        suffix = "" if seed == 0 else f"-seed{seed}"
        final = json.loads((run / f"final{suffix}.json").read_text())
        assert f"final model: {final['reason']}" in done.stdout
        assert final["name"] in (f"adass{suffix}", f"ues-{below}{suffix}")
        assert (run / final["model"] / "evaluation.json").exists()
        assert set(final["size"]) == {f"adass{suffix}", f"ues-{below}{suffix}"}
    chosen = json.loads((run / "final.json").read_text())["name"]
    assert json.loads(run_script("evaluate.py", "--run", run).stdout)["name"] == chosen
    run_script("retrain.py", "--run", run, *short, "--or-uniform", "--run.seed", 4, "--search.precision", "int8")
    final = json.loads((run / "final-seed4.json").read_text())
    # What was found without a precision is compared by its size in parameters, and both as served.
    assert final["unit"] == "bytes at int8"
    assert final["size"]["adass-seed4"] == Allocation(schema, WIDTHS).total("served_int8")
    refused = run_script("retrain.py", "--run", run, "--allocation", "bracket", "--name", "x", check=False)
    assert "names its results ues-WIDTH" in refused.stderr


@pytest.mark.slow
def test_two_ranks_under_torchrun_get_what_one_gets(run: Path, run_script: Callable, start: Callable) -> None:
    short = ["--train.epochs", 1, "--search.precision", "int8"]
    finish(start(*TORCHRUN, "--", LAUNCH / "retrain.py", "--run", run, *short, "--name", "two"))
    run_script("retrain.py", "--run", run, *short, "--name", "one")
    results = [json.loads((run / "retrain" / n / "evaluation.json").read_text()) for n in ("one", "two")]
    assert results[1]["auc"] == pytest.approx(results[0]["auc"], abs=1e-3)
    assert results[1]["logloss"] == pytest.approx(results[0]["logloss"], rel=1e-4)
    served = [r["served"] for r in results]
    assert served[0]["precision"] == "int8" and served[0]["bytes"] == served[1]["bytes"]
    assert served[1]["logloss"] == pytest.approx(served[0]["logloss"], rel=1e-4)
    assert served[0]["logloss"] != results[0]["logloss"]
    losses = [recorded(run / "retrain" / n, "retrain", "loss") for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # What two ranks have trained, one evaluates: in other batches, so that rows as good as equal may change places.
    shown = json.loads(run_script("evaluate.py", "--run", run / "retrain" / "two", "--precision", "int4").stdout)
    assert shown["auc"] == pytest.approx(results[1]["auc"], abs=1e-4)
    assert shown["served"]["precision"] == "int4" and shown["served"]["bytes"] <= served[1]["bytes"]
