"""One rank and two train alike: the same global batches give the same losses, metrics and probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.adass import layout as layouts
from embsearch_dist.methods.adass.knapsack import make_measured
from embsearch_dist.methods.adass.scored_rows import make_scorer
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.methods.budget import parse_budget
from embsearch_dist.schema import Schema
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.task import Task
from tests.factories import (
    open_run,
    prepared,
    random_batch,
    rank_context,
    recorded,
    small_config,
    small_schema,
    train_and_measure,
)
from tests.ranks import run_ranks

STEPS = "train.steps=10"
PAIRS = [
    ("table_wise", "adam"),
    ("row_wise", "adam"),
    ("column_wise", "adam"),
    ("data_parallel", "adam"),
    ("table_wise", "rowwise_adagrad"),
    ("row_wise", "rowwise_adagrad"),
    ("row_wise", "adagrad"),
    ("column_wise", "adagrad"),
    ("column_wise", "sgd"),
    ("data_parallel", "adagrad"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


def train(rank: int, world_size: int, data: str, directory: str, kind: str, *overrides: str) -> dict[str, Any]:
    """A short training; returns what the ranks ended with. The losses are in ``metrics.jsonl``."""
    config = small_config(data, directory, STEPS, *overrides)
    run = open_run(config, rank_context(rank, world_size))
    task: Task
    if kind == "supernet":
        task = SupernetTask(run)
    else:
        task = SubnetTask(config, Allocation.uniform(run.schema, 8), run.context)
    found = train_and_measure(run, task, directory)
    head = {n: float(p.double().square().sum()) for n, p in task.model.bare_head.named_parameters()}
    return {**found, "head": head, "state": task.state()}


def train_many(rank: int, world_size: int, data: str, directory: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Several trainings in one set of processes, for starting those takes longer than a training."""
    return [train(rank, world_size, data, f"{directory}/{i}", "subnet", *case) for i, case in enumerate(cases)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[tuple[str, str], Any]:
    """(sharding, optimizer) -> what two ranks got, their losses, and both of one rank."""
    folder = tmp_path_factory.mktemp("trained")
    optimizers = sorted({optimizer for _, optimizer in PAIRS})
    alone = [[f"optim.embedding={o}"] for o in optimizers]
    shared = [[f"dist.sharding={s}", f"optim.embedding={o}"] for s, o in PAIRS]
    ones = run_ranks(train_many, 1, folder, data, str(folder / "one"), alone)[0]
    both = run_ranks(train_many, 2, folder, data, str(folder / "two"), shared)
    found = {}
    for i, (sharding, optimizer) in enumerate(PAIRS):
        k = optimizers.index(optimizer)
        directories = (folder / "one" / str(k), folder / "two" / str(i))
        found[sharding, optimizer] = (ones[k], [rank[i] for rank in both], directories)
    return found


@pytest.mark.parametrize(("sharding", "optimizer"), PAIRS)
def test_two_ranks_train_as_one(trained: dict[tuple[str, str], Any], sharding: str, optimizer: str) -> None:
    one, two, directories = trained[sharding, optimizer]
    check(one, two, *directories)
    assert two[0]["kinds"]["big"] == sharding  # the others may be too small to be split
    assert one["kinds"]["big"] == "table_wise"


def check(one: dict[str, Any], two: list[dict[str, Any]], one_dir: Path, two_dir: Path, rtol: float = 1e-4) -> None:
    assert two[0] == two[1]  # whatever ranks ended with, they agree on it
    losses = [recorded(directory, "fit", "loss") for directory in (one_dir, two_dir)]
    assert len(losses[0]) == 10
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert two[0]["metrics"]["rows"] == one["metrics"]["rows"]
    assert two[0]["metrics"]["logloss"] == pytest.approx(one["metrics"]["logloss"], rel=1e-5)
    assert two[0]["metrics"]["auc"] == pytest.approx(one["metrics"]["auc"], abs=1e-4)
    assert two[0]["tables"] == pytest.approx(one["tables"], rel=rtol)
    assert two[0]["head"] == pytest.approx(one["head"], rel=1e-3, abs=1e-6)


def compare(
    tmp_path: Path, data: str, kind: str, *overrides: str, rtol: float = 1e-4
) -> tuple[dict[str, Any], dict[str, Any]]:
    one = run_ranks(train, 1, tmp_path, data, str(tmp_path / "one"), kind, *overrides)[0]
    two = run_ranks(train, 2, tmp_path, data, str(tmp_path / "two"), kind, *overrides)
    check(one, two, tmp_path / "one", tmp_path / "two", rtol)
    return one, two[0]


@pytest.mark.parametrize("norm", ["field", "width"])
def test_batch_statistics_are_those_of_the_global_batch(tmp_path: Path, data: str, norm: str) -> None:
    compare(tmp_path, data, "subnet", f"model.norm={norm}", "optim.embedding_l2=0.01")


@pytest.mark.parametrize("model", [["optim.embedding_l2=0.01"], ["model.norm=field"]])
def test_a_rank_with_a_row_more_counts_by_its_rows(tmp_path: Path, data: str, model: list[str]) -> None:
    compare(tmp_path, data, "subnet", "train.batch_size=5", *model)


@pytest.mark.parametrize(
    ("model", "subnets"),
    [(["model.transform=mlp", "model.first_order=value"], 1), (["model.norm=field"], 1), ([], 4)],
)
def test_a_supernet_with_the_same_subnets_on_all_ranks_trains_as_on_one(
    tmp_path: Path, data: str, model: list[str], subnets: int
) -> None:
    """With four subnets DDP's head is called four times before one backward."""
    overrides = ["dist.sharding=row_wise", "dist.tables.left=table_wise", *model]
    overrides += [f"search.sampling.subnets={subnets}", "search.supernet.panel=4", "search.supernet.panel_rows=100"]
    one, two = compare(tmp_path, data, "supernet", *overrides, rtol=1e-3)
    for name in ("logloss", "logloss_narrowest", "rows"):  # of the panel, on the same rows
        of_one, of_two = (recorded(tmp_path / n, "fit", name, "validation") for n in ("one", "two"))
        np.testing.assert_allclose(of_two, of_one, rtol=1e-5)
    for key, near in (("logits_e", 1e-4), ("logits_f", 1e-3), ("initial", 0.0)):
        torch.testing.assert_close(
            torch.tensor(two["state"]["sampler"][key]), torch.tensor(one["state"]["sampler"][key]), rtol=1e-3, atol=near
        )
    assert torch.tensor(one["state"]["sampler"]["logits_e"]).unique().numel() > 1


@pytest.mark.parametrize(("model", "subnets"), [("model.transform=field", 3), ("model.norm=field", 1)])
def test_ranks_with_subnets_of_their_own_agree_on_probabilities(
    tmp_path: Path, data: str, model: str, subnets: int
) -> None:
    overrides = ["search.sampling.same_subnet=false", model, f"search.sampling.subnets={subnets}"]
    two = run_ranks(train, 2, tmp_path, data, str(tmp_path / "run"), "supernet", *overrides)
    assert two[0] == two[1]
    assert all(np.isfinite(recorded(tmp_path / "run", "fit", "loss")))


def test_a_run_on_two_ranks_repeats_bitwise(tmp_path: Path, data: str) -> None:
    results = [
        run_ranks(train, 2, tmp_path, data, str(tmp_path / name), "supernet", "dist.sharding=row_wise")[0]
        for name in ("a", "b")
    ]
    assert results[0] == results[1]
    assert recorded(tmp_path / "a", "fit", "loss") == recorded(tmp_path / "b", "fit", "loss")


def evaluate_scores(rank: int, world_size: int, ties: bool) -> dict[str, float]:
    """Rank r holds every world_size-th batch of a fixed list: the same rows on any number of ranks."""
    schema = small_schema(5)
    batches = [random_batch(schema, rows, rows) for rows in (20, 7, 33, 12, 9, 41)]

    def predict(batch: Any) -> torch.Tensor:
        return batch.dense[:, 0].round() if ties else batch.dense[:, 0]

    return evaluate(predict, batches[rank::world_size], rank_context(rank, world_size))


@pytest.mark.parametrize("ties", [False, True])
def test_the_auc_over_two_ranks_is_exactly_that_of_one(tmp_path: Path, ties: bool) -> None:
    one = run_ranks(evaluate_scores, 1, tmp_path, ties)[0]
    two = run_ranks(evaluate_scores, 2, tmp_path, ties)
    assert two[0] == two[1]
    assert two[0]["auc"] == one["auc"]
    assert two[0]["rows"] == one["rows"] == 122
    assert two[0]["logloss"] == pytest.approx(one["logloss"], rel=1e-12)


def score_subnets(rank: int, world_size: int, data: str, directory: str, norm: str) -> list[dict[str, float]]:
    run = open_run(small_config(data, directory, f"model.norm={norm}"), rank_context(rank, world_size))
    choices = torch.tensor([[a, b, (a + b) % 4, 3 - a] for a in range(4) for b in range(4)])
    found = []
    for layout in (layouts.CPU, layouts.ACCELERATOR):
        layouts.CPU = layout
        subnets = make_scorer(run, SupernetTask(run))
        scores = subnets.score(choices)
        assert subnets.score(choices) == scores
        found += scores + subnets.score(torch.tensor([[3, 3, 3, 0]]))  # fewer candidates than ranks
        found += subnets.score_near([3, 2, 1, 0], choices)
    # Terms of each pass, and heads fitted on half of each rank's rows.
    run.config.search.policy.cache_mb, run.config.search.policy.refit = 1, "linear"
    fitted = make_scorer(run, SupernetTask(run)).score(choices)
    return [*found, *fitted]


def measure_by_losses(rank: int, world_size: int, data: str, directory: str) -> dict[str, Any]:
    words = ["model.init_std=0.5", "model.gain=1", "search.policy.finder=knapsack"]
    run = open_run(small_config(data, directory, *words), rank_context(rank, world_size))
    task = SupernetTask(run)
    measured = make_measured(run, task, make_scorer(run, task), task.distinct.cpu())
    base = [3, 2, 3, 1]
    around, trained = measured.around(base), measured.trained
    assert trained is not None and measured.alone is not None
    return {
        "loss": around.loss,
        "more": around.more.flatten().tolist(),
        "counts": [] if around.counts is None else around.counts.tolist(),
        "known": trained.known_shares().tolist(),
        "alone": measured.alone.tolist(),
        "found": measured.find(parse_budget("40%", run.schema)),
    }


def test_measured_losses_of_subnets_are_alike_on_one_rank_and_two(tmp_path: Path, data: str) -> None:
    one = run_ranks(measure_by_losses, 1, tmp_path, data, str(tmp_path))[0]
    two = run_ranks(measure_by_losses, 2, tmp_path, data, str(tmp_path))
    assert two[0] == two[1]
    for name, expected in one.items():
        assert two[0][name] == pytest.approx(expected, abs=2e-6), name


def score_whole(rank: int, world_size: int, data: str, directory: str) -> list[dict[str, float]]:
    words = ["model.backbone=masknet", "model.norm=field", "model.init_std=0.5", "model.gain=1"]
    run = open_run(small_config(data, directory, *words), rank_context(rank, world_size))
    scorer = make_scorer(run, SupernetTask(run))
    choices = torch.tensor([[a, b, (a + b) % 4, 3 - a] for a in range(4) for b in range(2)])
    few = scorer.part(100)
    return [*scorer.score(choices), *scorer.score_near([3, 2, 1, 0], choices), *few.score(choices[:3])]


def test_subnets_of_any_backbone_score_alike_on_one_rank_and_two(tmp_path: Path, data: str) -> None:
    one = run_ranks(score_whole, 1, tmp_path, data, str(tmp_path))[0]
    two = run_ranks(score_whole, 2, tmp_path, data, str(tmp_path))
    assert two[0] == two[1] and one[-1]["rows"] == two[0][-1]["rows"] == 100
    for a, b in zip(one[:-3], two[0][:-3], strict=True):  # which rows are the first hundred depends on the ranks
        assert b == pytest.approx(a, abs=2e-4)


@pytest.mark.parametrize("norm", ["none", "field"])
def test_subnets_score_alike_on_one_rank_and_two(tmp_path: Path, data: str, norm: str) -> None:
    arguments, rows = (data, str(tmp_path), norm), Schema.load(data).rows["validation"]
    one = run_ranks(score_subnets, 1, tmp_path, *arguments)[0]
    two = run_ranks(score_subnets, 2, tmp_path, *arguments)
    assert two[0] == two[1]
    assert all(m["rows"] < 0.7 * rows for m in (*one[-16:], *two[0][-16:]))  # which rows fit depends on the ranks
    for a, b in zip(one[:-16], two[0][:-16], strict=True):
        assert a["rows"] == b["rows"] == rows
        assert b.get("gain", 0) == pytest.approx(a.get("gain", 0), abs=1e-5)
        assert b.get("gain_se", 0) == pytest.approx(a.get("gain_se", 0), rel=1e-2)
        assert b["auc"] == pytest.approx(a["auc"], abs=2e-4)
        assert b["logloss"] == pytest.approx(a["logloss"], rel=1e-5)
