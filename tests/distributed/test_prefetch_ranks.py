"""The next batch's ids set out before they are needed: the same training to the bit, whatever comes in between."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.sharding.prefetch import InputExchange
from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.signals import StoppedBySignal
from embsearch_dist.train.trainer import Trainer
from tests.factories import open_run, prepared, rank_context, recorded, small_config, streams, whole_tables
from tests.ranks import run_ranks

KINDS = ["table_wise", "row_wise"]
STEPS, STOP = 15, 7
# A batch that is skipped, evaluations amid the epochs of 12 steps, and a signal to one rank after step 7.
BETWEEN = [f"train.steps={STEPS}", "train.skip_bad_batches=1", "train.evals_per_epoch=4", "train.patience=0"]
FAULTS = f"nan rank=1 step=3; usr1 rank=1 step={STOP - 1}"


def fit(rank: int, world_size: int, data: str, directory: str, kind: str, ahead: bool, faults: str) -> dict[str, Any]:
    """Train from where the directory stands; what came of it, and how many look-ups found their ids on the way."""
    config = small_config(data, directory, *BETWEEN, f"dist.sharding={kind}", "optim.embedding=adagrad")
    run = open_run(config, rank_context(rank, world_size))
    task = SubnetTask(config, Allocation.uniform(run.schema, 8), run.context)
    exchange = task.model.sharded.exchange
    exchange.ahead, taken, ended = ahead, 0, "at its end"
    look_up = InputExchange.look_up

    def counted(self: InputExchange, sparse: Any) -> Any:
        nonlocal taken
        taken += self._begun is not None and self._begun[0] is sparse
        return look_up(self, sparse)

    root = Path(directory, "checkpoints", "fit")
    with (
        mock.patch.object(InputExchange, "look_up", counted),
        mock.patch.dict(os.environ, {VARIABLE: faults}),
        Monitor(directory, "fit", rank, quiet=True) as monitor,
    ):
        trainer = Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root)
        try:
            trainer.fit()
        except StoppedBySignal:
            ended = "by a signal"
    tables = {n: t.double().square().sum().item().hex() for n, t in whole_tables(task.model.sharded).items()}
    head = {n: p.double().square().sum().item().hex() for n, p in task.model.bare_head.named_parameters()}
    step, skipped = trainer.progress.step, trainer.progress.skipped
    return {"tables": tables, "head": head, "step": step, "skipped": skipped, "taken": taken, "ended": ended}


def both(rank: int, world_size: int, data: str, folder: str) -> list[list[dict[str, Any]]]:
    """Per sharding and with or without: the training up to the signal, and the continued one."""
    found = []
    for kind in KINDS:
        for ahead in (False, True):
            directory = f"{folder}/{kind} {ahead}"
            found.append([fit(rank, world_size, data, directory, kind, ahead, faults) for faults in (FAULTS, "")])
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("ahead")
    first, second = run_ranks(both, 2, folder, str(prepared(tmp_path_factory)), str(folder))
    assert first == second
    return folder, first


@pytest.mark.parametrize("k", range(len(KINDS)), ids=KINDS)
def test_ids_that_set_out_early_change_no_bit(trained: tuple[Path, list[Any]], k: int) -> None:
    folder, found = trained
    plain, ahead = found[2 * k : 2 * k + 2]
    for one, other in zip(plain, ahead, strict=True):
        assert {**one, "taken": 0} == {**other, "taken": 0}
    assert [part["step"] for part in ahead] == [STOP, STEPS]
    assert [part["skipped"] for part in ahead] == [1, 1]
    assert [part["ended"] for part in ahead] == ["by a signal", "at its end"]
    logs = [recorded(folder / f"{KINDS[k]} {on}", "fit", "loss") for on in (False, True)]
    assert len(logs[0]) == STEPS
    assert str(logs[0]) == str(logs[1])  # as text, since that of the skipped batch is NaN


@pytest.mark.parametrize("k", range(len(KINDS)), ids=KINDS)
def test_all_batches_but_the_first_of_a_start_or_an_epoch_are_expected(trained: tuple[Path, list[Any]], k: int) -> None:
    plain, ahead = trained[1][2 * k : 2 * k + 2]
    assert [part["taken"] for part in plain] == [0, 0]
    assert [part["taken"] for part in ahead] == [STOP - 1, STEPS - STOP - 2]
