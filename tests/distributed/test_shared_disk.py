"""A run directory that not all ranks see is refused at start, and no checkpoint is sealed without every rank's part."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.ranks.shared import check_shared
from embsearch_dist.train.checkpoint import Checkpointer, SaveError
from embsearch_dist.train.retrain import SubnetTask
from tests.factories import open_run, prepared, rank_context, small_config
from tests.ranks import run_ranks


def see(rank: int, world_size: int, folder: str, private: bool) -> str:
    own = Path(folder) / (f"disk{rank}" if private else "disk")
    own.mkdir(parents=True, exist_ok=True)
    try:
        check_shared(rank_context(rank, world_size), own, patience_s=0.5)
    except UserError as e:
        return f"{e.everywhere} {e}"
    return ""


def test_a_disk_that_only_one_rank_sees_is_refused_on_all(tmp_path: Path) -> None:
    assert run_ranks(see, 2, tmp_path, str(tmp_path / "shared"), False) == ["", ""]
    first, second = run_ranks(see, 2, tmp_path, str(tmp_path / "private"), True)
    assert "disk1 of rank 1 on " in second and "is not the one of rank 0" in second
    assert first.startswith("True rank 1 failed while looking for the run directory:") and second.startswith("True ")
    assert not list(tmp_path.glob("*/disk*/*.tmp"))  # the mark is gone


def save(rank: int, world_size: int, data: str, directory: str) -> str:
    """A save after which rank 1's files are gone, as if they lay on its own disk."""
    run = open_run(small_config(data, directory, "dist.sharding=row_wise"), rank_context(rank, world_size))
    task = SubnetTask(run.config, Allocation.uniform(run.schema, 4), run.context)

    class Private(Checkpointer):
        def _write(self, tensors: object, partial: Path, group: object) -> None:
            super()._write(tensors, partial, group)
            if rank == 1:
                for path in (partial / "data").glob("__1_*"):
                    shutil.move(path, Path(directory) / path.name)
            run.context.every(0)

    head = torch.optim.Adam(task.model.replicated.parameters())
    checkpoints = Private(Path(directory) / "checkpoints", task.model, head, run.context, settings=task.settings)
    try:
        checkpoints.save(1, {})
    except SaveError as e:
        return str(e)
    return f"saved {checkpoints.steps()}"


def test_a_checkpoint_without_the_part_of_a_rank_is_not_sealed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = str(prepared(tmp_path_factory))
    for told in run_ranks(save, 2, tmp_path, data, str(tmp_path / "run")):
        assert "__1_0.distcp is missing" in told and "on a disk that all ranks share" in told
    assert not list((tmp_path / "run" / "checkpoints").glob("step-1/manifest.json"))
