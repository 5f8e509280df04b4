"""A signal ends an entry script with its own exit code, whatever the packages between make of what it raises."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from embsearch_dist import rundir
from embsearch_dist.allocation import Allocation
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.train import signals
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.signals import StoppedBySignal
from embsearch_dist.train.warm.fill import HEAD, Saved
from launch.common import run_main
from tests.factories import one_rank, small_config, small_schema

SCHEMA = small_schema(20, 9)


@pytest.fixture
def caught() -> Iterator[None]:
    """The answers of entry scripts to signals."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signals.catch()
    yield
    signals.catch()  # forgets what has come
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


@pytest.mark.parametrize("error", [AttributeError, OSError])
def test_an_error_that_something_makes_of_a_signal_is_not_told(
    error: type[Exception], caught: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As OmegaConf does while a config is read."""

    def main(words: Sequence[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise error("no attribute") from None

    monkeypatch.setattr(sys, "argv", ["search.py"])
    monkeypatch.setattr(rundir, "_anew", set())  # other tests of this process empty directories, which would be told
    with pytest.raises(SystemExit) as ended:
        run_main(main, None)
    assert ended.value.code == signals.EXIT_CODE
    assert capsys.readouterr().err == "stopped by SIGTERM; give the same command again to continue\n"


def test_a_signal_that_something_drops_is_noted_by_the_next_training(caught: None) -> None:
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGUSR1)
    with signals.noted() as asked:
        assert asked.name == "SIGUSR1"
