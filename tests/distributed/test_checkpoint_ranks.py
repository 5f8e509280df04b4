"""Checkpoints on two ranks: continued bitwise, read by any number of ranks, refused when they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
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
# Every kind of sharding in one model: what no case above has is in these.
EVERY_KIND = "dist.tables={left: data_parallel, big: row_wise, right: table_wise, idle: column_wise}"
MIXED = [[EVERY_KIND, f"optim.embedding={name}"] for name in ("adam", "adagrad", "rowwise_adagrad", "sgd")]
ALL = [*CASES, *MIXED]
STOPPED = [1, 5, *range(len(CASES), len(ALL))]
"""Those that are stopped and go on: two kinds alone, and all that there are in one model with every optimizer."""
STEPS = 7
"""Of a training, whose first checkpoint is that of step 4. Who goes on elsewhere makes two or four more."""


class Stopped(Exception):
    """Raised in place of a kill."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


def fit(rank: int, world_size: int, data: str, directory: str, stop_at: int, overrides: list[str]) -> dict[str, Any]:
    config = small_config(
        data, directory, f"train.steps={STEPS}", "train.evals_per_epoch=3", "train.patience=0", *overrides
    )
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


def fit_many(
    rank: int, world_size: int, data: str, directory: str, stop_at: int, cases: list[int]
) -> list[dict[str, Any]]:
    return [fit(rank, world_size, data, f"{directory}/{i}", stop_at, ALL[i]) for i in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """Under ``broken``, two ranks were stopped two steps past the checkpoint of step 4, and went on."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(fit_many, 2, folder, data, str(folder / "broken"), 6, STOPPED, timeout=280)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, data: str) -> tuple[list[Any], list[Any]]:
    every = list(range(len(ALL)))
    unbroken = run_ranks(fit_many, 2, folder, data, str(folder / "unbroken"), 0, every, timeout=280)
    continued = run_ranks(fit_many, 2, folder, data, str(folder / "broken"), 0, STOPPED, timeout=280)
    return unbroken, continued


@pytest.mark.parametrize("case", STOPPED, ids=[" ".join(ALL[i]) for i in STOPPED])
def test_two_ranks_continue_bitwise(results: tuple[list[Any], list[Any]], folder: Path, case: int) -> None:
    unbroken, continued = results
    for rank in range(2):
        assert continued[rank][STOPPED.index(case)] == unbroken[rank][case]
    same_losses(folder, case)


def same_losses(folder: Path, case: int) -> None:
    losses = [recorded(folder / name / str(case), STAGE, "loss") for name in ("unbroken", "broken")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


@pytest.mark.slow  # the mixed models above have every kind of sharding with every optimizer
def test_two_ranks_continue_bitwise_with_each_kind_alone(
    results: tuple[list[Any], list[Any]], folder: Path, data: str
) -> None:
    others = [i for i in range(len(CASES)) if i not in STOPPED]
    run_ranks(fit_many, 2, folder, data, str(folder / "broken"), 6, others, timeout=280)
    continued = run_ranks(fit_many, 2, folder, data, str(folder / "broken"), 0, others, timeout=280)
    for rank in range(2):
        for case, found in zip(others, continued[rank], strict=True):
            assert found == results[0][rank][case], ALL[case]
    for case in others:
        same_losses(folder, case)


def evaluate_many(rank: int, world_size: int, data: str, directory: str) -> list[dict[str, float]]:
    found = []
    for i, case in enumerate(CASES):
        run = open_run(small_config(data, f"{directory}/{i}", *case), rank_context(rank, world_size))
        allocation = Allocation.uniform(run.schema, 8)
        write_json(Path(directory, str(i), "training.json"), {})  # as retrain.py leaves it at the end
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
        fit(rank, world_size, data, directory, 0, ["train.epochs=3", f"train.steps={STEPS + 2}", *overrides])
    except UserError as e:
        return str(e)
    return "no error"


Job = tuple[str, str, int, list[str]]


def go_on_elsewhere(rank: int, world_size: int, data: str, folder: str, jobs: list[Job]) -> list[Any]:
    """Per job (run to copy, name, steps, overrides): how it ended, and the losses of all its steps."""
    found = []
    for source, name, steps, overrides in jobs:
        directory = f"{folder}/{name}"
        if rank == 0:
            shutil.copytree(source, directory)
        rank_context(rank, world_size).share(None)
        message = go_on(rank, world_size, data, directory, [*overrides, f"train.steps={steps}"])
        found.append([message, recorded(directory, STAGE, "loss") if rank == 0 else []])
    return found


# What each case is continued as on two ranks; False: its state cannot be spread anew.
OTHERS = [
    (0, "row_wise", True),
    (1, "table_wise", True),
    (3, "row_wise", True),
    (4, "row_wise", True),
    (4, "data_parallel", False),
    (5, "table_wise", True),
    (5, "column_wise", False),
    (7, "table_wise", False),
    (8, "data_parallel", True),
]
DOWN = {i: i != 7 for i in range(len(CASES))}  # case 7: replicated tables with a fused optimizer elsewhere


@pytest.fixture(scope="module")
def elsewhere(results: tuple[list[Any], list[Any]], folder: Path, data: str) -> dict[str, Any]:
    """Two ranks made all steps. ``same`` two go on; ``down`` one does, then ``up`` two; ``to-KIND`` other sharding."""
    begun = [str(folder / "unbroken" / str(i)) for i in range(len(CASES))]
    target = str(folder / "elsewhere")
    jobs: list[Job] = [(begun[i], f"down-{i}", STEPS + 2, CASES[i]) for i in DOWN]
    found = dict(zip([j[1] for j in jobs], run_ranks(go_on_elsewhere, 1, folder, data, target, jobs)[0], strict=True))
    jobs = [(begun[i], f"same-{i}", STEPS + 4, CASES[i]) for i in DOWN]
    jobs += [(f"{target}/down-{i}", f"up-{i}", STEPS + 4, CASES[i]) for i, good in DOWN.items() if good]
    jobs += [(begun[i], f"{i}-to-{kind}", STEPS + 4, [*CASES[i], f"dist.sharding={kind}"]) for i, kind, _ in OTHERS]
    two = run_ranks(go_on_elsewhere, 2, folder, data, target, jobs, timeout=280)
    for (_, name, _, _), first, second in zip(jobs, *two, strict=True):
        assert first[0].split(":")[0] == second[0].split(":")[0], name  # both ranks end alike
        found[name] = first
    return found


@pytest.mark.parametrize("case", [i for i, good in DOWN.items() if good])
def test_another_number_of_ranks_goes_on_where_it_was(elsewhere: dict[str, Any], case: int) -> None:
    """Down to one rank and up again to two: a lost optimizer state would show in the first step."""
    (same, expected), (down, fewer), (up, again) = (elsewhere[f"{name}-{case}"] for name in ("same", "down", "up"))
    assert same == down == up == "no error"
    assert (len(fewer), len(again)) == (STEPS + 2, STEPS + 4)
    assert fewer == pytest.approx(expected[: STEPS + 2], rel=1e-5)
    assert again == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("case", "kind"), [(i, kind) for i, kind, good in OTHERS if good])
def test_another_sharding_goes_on_where_it_was(elsewhere: dict[str, Any], case: int, kind: str) -> None:
    message, losses = elsewhere[f"{case}-to-{kind}"]
    assert message == "no error"
    assert len(losses) == STEPS + 4
    assert losses == pytest.approx(elsewhere[f"same-{case}"][1], rel=1e-5)


@pytest.mark.parametrize(
    "name", [f"down-{i}" for i, good in DOWN.items() if not good] + [f"{i}-to-{k}" for i, k, good in OTHERS if not good]
)
def test_a_state_that_cannot_be_spread_anew_is_refused(elsewhere: dict[str, Any], name: str) -> None:
    message, losses = elsewhere[name]
    assert "does not fit this run of " in message
    assert "(made with 2 rank(s), " in message
    assert message.endswith("Continue with the number of ranks, sharding and optimizer it was made with")
    assert len(losses) == STEPS  # and nothing was trained


def test_state_that_does_not_fit_is_refused_on_every_rank(
    results: tuple[list[Any], list[Any]], folder: Path, tmp_path: Path, data: str
) -> None:
    directory = str(folder / "broken" / "5")  # trained with rowwise_adagrad
    for message in run_ranks(go_on, 2, tmp_path, data, directory, ["dist.sharding=row_wise", "optim.embedding=adam"]):
        assert "does not fit this run of 2" in message


def damage(rank: int, world_size: int, data: str, directory: str) -> str:
    return go_on(rank, world_size, data, directory, CASES[1])


def test_when_every_checkpoint_is_damaged_every_rank_says_so(
    results: tuple[list[Any], list[Any]], folder: Path, tmp_path: Path, data: str
) -> None:
    root = folder / "broken" / "1" / "checkpoints" / STAGE
    for path in root.glob("step-*/data/__1_*"):  # rank 1's files
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 255
        path.write_bytes(body)
    first, second = run_ranks(damage, 2, tmp_path, data, str(folder / "broken" / "1"))
    newest = next((root / f"step-{STEPS}" / "data").glob("__1_*"))
    assert f"no whole checkpoint is left under {root}: checkpoint file {newest} is damaged" in first
    assert "rank 0 failed while checking the checkpoints" in second
    assert str(newest) in second
