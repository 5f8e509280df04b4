"""The first rows of Criteo and Avazu through the whole chain with their own configs: no code knows a data set.

Also what the shipped configs promise each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.methods import CONFIGS
from embsearch_dist.methods.adass.supernet_stage import SupernetStage
from embsearch_dist.methods.stages import flatten
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema

# (format, raw file, config, rows, fields)
SAMPLES = [
    ("criteo", "criteo/train_first_10000.txt", "criteo/adass_deepfm_sample.yaml", 10_000, 39),
    ("avazu", "avazu/train_first_9999.csv", "avazu/adass_wide_deep_sample.yaml", 9_999, 22),
]
TINY = {
    "model.hidden": "[16]",
    "model.unified_width": 8,
    "train.epochs": 1,
    "search.supernet.epochs": 1,
    "search.policy.steps": 2,
    "search.policy.batch": 4,
    "search.policy.refine": "false",
}
BUDGET = 0.8  # of UES-32, in both configs


@pytest.mark.parametrize(
    ("form", "raw", "config", "rows", "fields"),
    [pytest.param(*s, id=s[0], marks=[pytest.mark.slow] if s[0] == "avazu" else []) for s in SAMPLES],
)
def test_prepare_search_retrain_evaluate_report(
    form: str,
    raw: str,
    config: str,
    rows: int,
    fields: int,
    data_dir: Path,
    repo_root: Path,
    tmp_path: Path,
    run_script: Callable,
) -> None:
    source = data_dir / raw
    if not source.exists():
        pytest.skip(f"no {form} sample at {source}")
    data, run = tmp_path / "data", tmp_path / "run"
    options = ["--split", "time", "--min-count", 4, "--quiet"]
    run_script("prepare.py", "--format", form, "--input", source, "--out", data, *options)
    schema = Schema.load(data)
    assert (sum(schema.rows.values()), len(schema.fields)) == (rows, fields)

    tiny = [f"--{key}={value}" for key, value in TINY.items()]
    where = [f"--data.path={data}", f"--run.dir={run}"]
    run_script("search.py", "--config", repo_root / "configs" / config, *where, *tiny)
    run_script("retrain.py", "--run", run)
    run_script("retrain.py", "--run", run, "--allocation", "ues-32")
    run_script("evaluate.py", "--run", run / "retrain" / "adass", "--split", "validation")
    run_script("report.py", run)

    found = result(run, "adass/evaluation.json")
    uniform = result(run, "ues-32/evaluation.json")
    assert list(found["widths"]) == schema.names
    assert found["embedding_parameters"] <= BUDGET * uniform["embedding_parameters"]
    assert uniform["embedding_parameters"] == 32 * sum(schema.cardinalities)
    assert found["rows"] == schema.rows["test"]
    assert result(run, "adass/evaluation-validation.json")["rows"] == schema.rows["validation"]
    for body in (found, uniform):
        assert 0 < body["auc"] < 1 and 0 < body["logloss"] < 2
    page = (run / "report" / "index.html").read_text()
    assert "ues-32" in page and schema.names[-1] in page


def result(run: Path, name: str) -> dict:
    return json.loads((run / "retrain" / name).read_text())


def test_resource_first_config_shares_the_supernet(repo_root: Path) -> None:
    """Both modes of the paper search one supernet: same run directory, same inputs of the supernet stage."""
    folder, schema = repo_root / "configs" / "movielens_1m", Schema("any", (Field("user_id", 3),))
    runs = []
    for name in ("adass_deepfm.yaml", "adass_deepfm_resource.yaml"):
        runs.append(Run(load_config(CONFIGS, folder / name), schema, Context(0, 1, torch.device("cpu"))))
    effect, resource = runs
    assert flatten(SupernetStage().inputs(effect)) == flatten(SupernetStage().inputs(resource))
    assert effect.dir == resource.dir
    policy = resource.config.search.policy
    assert (policy.lambda_r, policy.lambda_c, resource.config.search.budget) == (0.005, 0.04, "70%")
    assert effect.config.search.name != resource.config.search.name
