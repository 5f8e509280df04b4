"""A signal that comes while a checkpoint is read ends the process as anywhere else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from embsearch_dist.allocation import Allocation
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.train import signals
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.signals import StoppedBySignal
from embsearch_dist.train.warm.fill import HEAD, Saved
from tests.factories import one_rank, small_config, small_schema

SCHEMA = small_schema(20, 9)


@pytest.fixture
def caught() -> Iterator[None]:
    """The answers of entry scripts to signals."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.catch()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.received.clear()


@pytest.fixture
def saved(tmp_path: Path) -> Checkpointer:
    """One checkpoint, ``step-1``."""
    model = SubnetModel(small_config("no-data", tmp_path), Allocation(SCHEMA, {"f0": 6, "f1": 2}), one_rank())
    checkpoints = Checkpointer(tmp_path, model, torch.optim.Adam(model.bare_head.parameters(), lr=0.01), one_rank())
    checkpoints.save(1, {})
    return checkpoints


@pytest.mark.parametrize("moment", ["read_data", "prepare_local_plan"])
def test_a_signal_while_a_checkpoint_is_read_is_no_damage(
    saved: Checkpointer, caught: None, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = getattr(FileSystemReader, moment)

    def told_to_end(self: FileSystemReader, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *given)

    earlier = Saved(saved.root / "step-1")
    monkeypatch.setattr(FileSystemReader, moment, told_to_end)
    with pytest.raises(StoppedBySignal, match="stopped by SIGTERM"):
        saved.load(1)
    with pytest.raises(StoppedBySignal, match="stopped by SIGTERM"):
        earlier.all(HEAD)
