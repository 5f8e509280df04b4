"""Checkpoints on two ranks: continued bitwise, read by any number of ranks, refused when they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import STAGE, SubnetTask, load_best
from embsearch_dist.train.trainer import Trainer
from tests.factories import open_run, prepared, rank_context, recorded, small_config, streams, whole_tables
from tests.ranks import run_ranks

CASES = [
    ["dist.sharding=table_wise", "optim.embedding=adam"],
    ["dist.sharding=row_wise", "optim.embedding=adam"],
    ["dist.sharding=column_wise", "optim.embedding=adam"],
    ["dist.sharding=data_parallel", "optim.embedding=adam"],
    ["dist.sharding=table_wise", "optim.embedding=adagrad"],
    ["dist.sharding=row_wise", "optim.embedding=rowwise_adagrad"],
    ["dist.sharding=column_wise", "optim.embedding=adagrad"],
    ["dist.sharding=data_parallel", "optim.embedding=adagrad"],
    ["dist.sharding=row_wise", "optim.embedding=sgd"],
]


class Stopped(Exception):
    """Raised in place of a kill."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


def fit(rank: int, world_size: int, data: str, directory: str, stop_at: int, overrides: list[str]) -> dict[str, Any]:
    config = small_config(data, directory, "train.steps=10", "train.evals_per_epoch=3", "train.patience=0", *overrides)
    run = open_run(config, rank_context(rank, world_size))

    class Task(SubnetTask):
        def after_step(self, step: int, monitor: Monitor) -> None:
            if step == stop_at:
                raise Stopped

    task = Task(config, Allocation.uniform(run.schema, 8), run.context)
    with Monitor(directory, STAGE, rank, quiet=True) as monitor:
        root = Path(directory, "checkpoints", STAGE)
        trainer = Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root)
        try:
            trainer.fit()
        except Stopped:
            return {}
        trainer.restore_best()
    head = {n: p.double().sum().item() for n, p in task.model.bare_head.named_parameters()}
    return {"tables": {n: t.double().sum().item() for n, t in whole_tables(task.model.sharded).items()}, "head": head}


def fit_many(rank: int, world_size: int, data: str, directory: str, stop_at: int) -> list[dict[str, Any]]:
    return [fit(rank, world_size, data, f"{directory}/{i}", stop_at, case) for i, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """Under ``broken``, two ranks were stopped two steps past the checkpoint of step 4, and went on."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(fit_many, 2, folder, data, str(folder / "broken"), 6)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, data: str) -> tuple[list[Any], list[Any]]:
    unbroken = run_ranks(fit_many, 2, folder, data, str(folder / "unbroken"), 0)
    continued = run_ranks(fit_many, 2, folder, data, str(folder / "broken"), 0)
    return unbroken, continued


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(c) for c in CASES])
def test_two_ranks_continue_bitwise(results: tuple[list[Any], list[Any]], folder: Path, case: int) -> None:
    unbroken, continued = results
    for rank in range(2):
        assert continued[rank][case] == unbroken[rank][case]
    losses = [recorded(folder / name / str(case), STAGE, "loss") for name in ("unbroken", "broken")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def evaluate_many(rank: int, world_size: int, data: str, directory: str) -> list[dict[str, float]]:
    found = []
    for i, case in enumerate(CASES):
        run = open_run(small_config(data, f"{directory}/{i}", *case), rank_context(rank, world_size))
        allocation = Allocation.uniform(run.schema, 8)
        task = load_best(run.config, allocation, run.context, Path(directory, str(i)))
        task.model.eval()
        found.append(evaluate(task.predict, streams(run)[1].epoch(0), run.context))
    return found


def test_one_rank_evaluates_what_two_have_trained(
    results: tuple[list[Any], list[Any]], folder: Path, tmp_path: Path, data: str
) -> None:
    one = run_ranks(evaluate_many, 1, tmp_path, data, str(folder / "unbroken"))[0]
    for i, found in enumerate(one):
        curve = recorded(folder / "unbroken" / str(i), STAGE, "auc", "validation")
        assert found["auc"] == pytest.approx(max(curve), abs=1e-4), CASES[i]


def go_on(rank: int, world_size: int, data: str, directory: str, overrides: list[str]) -> str:
    try:
        fit(rank, world_size, data, directory, 0, ["train.epochs=3", "train.steps=12", *overrides])
    except UserError as e:
        return str(e)
    return "no error"


@pytest.mark.parametrize("case", [0, 1, 2])
def test_one_rank_goes_on_with_what_two_began(
    results: tuple[list[Any], list[Any]], folder: Path, tmp_path: Path, data: str, case: int
) -> None:
    directory = folder / "unbroken" / str(case)
    assert run_ranks(go_on, 1, tmp_path, data, str(directory), CASES[case]) == ["no error"]
    assert len(recorded(directory, STAGE, "loss")) == 12


def test_state_that_does_not_fit_is_refused_on_every_rank(
    results: tuple[list[Any], list[Any]], folder: Path, tmp_path: Path, data: str
) -> None:
    directory = str(folder / "broken" / "5")  # trained with rowwise_adagrad
    for message in run_ranks(go_on, 2, tmp_path, data, directory, ["dist.sharding=row_wise", "optim.embedding=adam"]):
        assert "does not fit this run of 2" in message


def damage(rank: int, world_size: int, data: str, directory: str) -> str:
    return go_on(rank, world_size, data, directory, CASES[1])


def test_a_damaged_checkpoint_is_refused_on_every_rank(
    results: tuple[list[Any], list[Any]], folder: Path, tmp_path: Path, data: str
) -> None:
    root = folder / "broken" / "1" / "checkpoints" / STAGE
    path = next((root / "step-10" / "data").glob("__1_*"))  # rank 1's file
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 255
    path.write_bytes(body)
    first, second = run_ranks(damage, 2, tmp_path, data, str(folder / "broken" / "1"))
    assert f"checkpoint file {path} is damaged" in first
    assert "rank 0 failed while checking a checkpoint" in second
    assert str(path) in second
