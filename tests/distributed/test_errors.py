"""An error on one rank reaches all of them within seconds, told as what it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import DistConfig, RunConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import start
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer
from tests.factories import open_run, prepared, rank_context, small_config, streams, whole_tables
from tests.ranks import run_ranks


def fail_together(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    context = rank_context(rank, world_size)
    begin = time.monotonic()
    found: dict[str, Any] = {}
    try:
        with context.together("reading"):
            if rank == 1:
                raise UserError("file x is broken") if kind == "user" else ValueError("a bug")
    except Exception as e:
        found = {"type": type(e).__name__, "text": str(e), "seconds": time.monotonic() - begin}
    total = float(context.sum(torch.ones(1)))  # the group still works
    return found | {"sum": total}


def test_a_users_mistake_on_one_rank_raises_on_both(tmp_path: Path) -> None:
    other, own = run_ranks(fail_together, 2, tmp_path, "user")
    assert (own["type"], own["text"]) == ("UserError", "file x is broken")
    assert (other["type"], other["text"]) == ("UserError", "rank 1 failed while reading: file x is broken")
    assert max(own["seconds"], other["seconds"]) < 10
    assert own["sum"] == other["sum"] == 2


def test_a_bug_on_one_rank_raises_on_both_and_keeps_its_type(tmp_path: Path) -> None:
    other, own = run_ranks(fail_together, 2, tmp_path, "bug")
    assert (own["type"], own["text"]) == ("ValueError", "a bug")
    assert other["text"] == "rank 1 failed while reading: ValueError('a bug')"


def succeed_together(rank: int, world_size: int) -> list[Any]:
    context = rank_context(rank, world_size)
    calls: list[int] = []
    with context.together("nothing"):
        pass
    first = context.first("making", lambda: calls.append(rank) or "made")
    gathered = context.gather(torch.arange(rank + 1).float())
    return [first, calls, context.share({"rank": rank}), gathered.tolist()]


def test_what_rank_zero_does_alone_happens_once(tmp_path: Path) -> None:
    assert run_ranks(succeed_together, 2, tmp_path) == [
        ["made", [0], {"rank": 0}, [0, 0, 1]],
        [None, [], {"rank": 0}, [0, 0, 1]],
    ]


def fail_first(rank: int, world_size: int) -> str:
    def make() -> None:
        raise UserError("the disk is full")

    try:
        rank_context(rank, world_size).first("writing", make)
    except UserError as e:
        return str(e)
    return "no error"


def test_rank_zeros_failure_is_told_to_all(tmp_path: Path) -> None:
    found = run_ranks(fail_first, 2, tmp_path)
    assert found == ["the disk is full", "rank 0 failed while writing: the disk is full"]


def train_with_nan(rank: int, world_size: int, data: str, directory: str, optimizer: str) -> dict[str, Any]:
    """Rank 1 alone meets a loss that is not finite in its third step."""
    config = small_config(data, directory, f"optim.embedding={optimizer}", "dist.sharding=row_wise")
    run = open_run(config, rank_context(rank, world_size))
    before: dict[str, torch.Tensor] = {}

    class Task(SubnetTask):
        def loss(self, batch: Batch, step: int) -> torch.Tensor:
            loss = super().loss(batch, step)
            if step == 2:
                before.update({n: t.clone() for n, t in whole_tables(self.model.sharded).items()})
                before.update({n: p.detach().clone() for n, p in self.model.bare_head.named_parameters()})
            return loss * float("nan") if step == 2 and rank == 1 else loss

    task = Task(config, Allocation.uniform(run.schema, 8), run.context)
    begin, message = time.monotonic(), "no error"
    with Monitor(directory, "fit", rank, quiet=True) as monitor:
        root = Path(directory, "checkpoints")
        try:
            Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root).fit()
        except UserError as e:
            message = str(e)
    seconds = time.monotonic() - begin
    after = whole_tables(task.model.sharded) | dict(task.model.bare_head.named_parameters())
    same = all(torch.equal(after[n], before[n]) for n in before)
    return {"message": message, "same": same, "compared": len(before), "seconds": seconds}


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_nan_on_one_rank_stops_both_and_writes_no_table(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, optimizer: str
) -> None:
    data = str(prepared(tmp_path_factory))
    for found in run_ranks(train_with_nan, 2, tmp_path, data, str(tmp_path / "run"), optimizer):
        assert found["message"].startswith("loss is not finite at step 2 on rank 1 (epoch 0, batch 2)")
        assert found["same"]
        assert found["compared"] > 4
        assert found["seconds"] < 60


def open_too_small(rank: int, world_size: int, data: str) -> str:
    """A batch smaller than the ranks is refused on all of them."""
    config = small_config(data, "no-run", "train.batch_size=1")
    try:
        streams(open_run(config, rank_context(rank, world_size)))
    except UserError as e:
        return str(e)
    return "no error"


def test_a_global_batch_smaller_than_the_ranks_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for message in run_ranks(open_too_small, 2, tmp_path, str(prepared(tmp_path_factory))):
        assert "a global batch of 1 is too small for 2 ranks" in message


def open_cuda(rank: int, world_size: int) -> str:
    try:
        with start(RunConfig(device="cuda"), DistConfig(timeout_s=10)):
            return "opened"
    except UserError as e:
        return str(e)


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="this machine has the GPUs")
def test_fewer_gpus_than_processes_is_refused_before_the_group_opens(tmp_path: Path) -> None:
    for message in run_ranks(open_cuda, 2, tmp_path, init=False):
        assert "2 processes on this machine need as many GPUs" in message


def open_group(rank: int, world_size: int) -> list[Any]:
    with start(RunConfig(device="cpu", threads=2), DistConfig(timeout_s=30)) as context:
        total = float(context.sum(torch.ones(1)))
        return [context.rank, context.world_size, context.device.type, total, torch.get_num_threads()]


def test_the_group_of_the_launcher_is_joined(tmp_path: Path) -> None:
    assert run_ranks(open_group, 2, tmp_path, init=False) == [[0, 2, "cpu", 2, 2], [1, 2, "cpu", 2, 2]]
