"""AdaFS on two ranks is AdaFS on one: losses, tables, both BatchNorms, and what the stages leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embsearch_dist.methods.adafs.method import STAGE, AdaFS, load_searched
from embsearch_dist.methods.gated.result import evaluate_gated
from embsearch_dist.methods.stages import run_stages
from tests.factories import one_rank, open_run, prepared, rank_context, recorded, small_config, whole_tables
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow  # that the method finds on two ranks what it finds on one is tested with all others

# Twelve steps: four without the controller, eight with it, of which a held-out batch follows every other.
SEARCH = [
    "search.width=4",
    "search.training.batch_size=256",
    "search.training.eval_batch_size=200",
    "search.training.epochs=1",
    "search.training.evals_per_epoch=3",
    "search.training.log_every=1",
    "search.outer.pretrain_epochs=0.34",
    "search.outer.every=2",
    "search.outer.lr=0.02",
    "search.dropout=0",
    "dist.sharding=row_wise",
    "dist.tables.left=table_wise",
]
CASES = {"soft": ["search.mode=soft"], "hard": ["search.mode=hard", "search.norm=width", "optim.embedding=adagrad"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


def search(rank: int, world_size: int, data: str, directory: str) -> dict[str, Any]:
    """The whole method, for each case; squared sums of all that it ended with."""
    found = {}
    for name, overrides in CASES.items():
        config = small_config(data, f"{directory}/{name}", *SEARCH, *overrides, method="adafs")
        run = open_run(config, rank_context(rank, world_size))
        run_stages(AdaFS(), run)
        model = load_searched(run).model
        state = {n: t.double().square().sum() for n, t in model.replicated.state_dict().items()}
        tables = {n: t.double().square().sum() for n, t in whole_tables(model.sharded).items()}
        sums = {key: {n: float(v) for n, v in part.items()} for key, part in (("state", state), ("tables", tables))}
        found[name] = {**sums, "kinds": model.sharded.kinds}
    return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, data: str) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("adafs")
    one = run_ranks(search, 1, folder, data, str(folder / "one"))
    return folder, one[0], run_ranks(search, 2, folder, data, str(folder / "two"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_search_as_one(searched: tuple[Path, Any, Any], case: str) -> None:
    folder, alone, both = searched
    one, two = alone[case], both[0][case]
    assert two == both[1][case]  # running statistics among it
    assert two["kinds"]["big"] == "row_wise"
    losses = [recorded(folder / name / case, STAGE, "loss") for name in ("one", "two")]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert two["tables"] == pytest.approx(one["tables"], rel=1e-3)
    assert two["state"] == pytest.approx(one["state"], rel=1e-2, abs=1e-5)
    assert one["state"]["selector.norm.shift"] > 0  # it did learn
    results = [
        json.loads((folder / n / case / "retrain" / f"adafs-{case}" / "evaluation.json").read_text())
        for n in ("one", "two")
    ]
    assert results[1]["auc"] == pytest.approx(results[0]["auc"], abs=1e-3)
    for key in ("rows", "dense_parameters", "flops_per_sample", "embedding_parameters", "widths"):
        assert results[0][key] == results[1][key]
    maps = [
        [json.loads(line) for line in (folder / n / case / "heatmaps.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert len(maps[0]) == len(maps[1]) == (4 if case == "soft" else 8)
    for a, b in zip(*maps, strict=True):
        np.testing.assert_allclose(b["values"], a["values"], atol=5e-3)


def test_one_rank_measures_what_two_have_trained(searched: tuple[Path, Any, Any], data: str) -> None:
    folder = searched[0] / "two" / "soft"
    config = small_config(data, folder, *SEARCH, method="adafs")
    run = open_run(config, one_rank())
    stream = run.stream("test", 200, shuffle=False)
    found = evaluate_gated(load_searched(run), stream, run.context, config, "adafs-soft")
    before = json.loads((folder / "retrain" / "adafs-soft" / "evaluation.json").read_text())
    # Batches of other sizes may be added up in another order; of 400 rows a pair that changes places is 2.5e-5.
    assert found["auc"] == pytest.approx(before["auc"], abs=1e-4)
    assert found["logloss"] == pytest.approx(before["logloss"], rel=1e-5)
