"""A disk that takes no more is told with the name of the file, and what lay there stays."""

from __future__ import annotations

import errno
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json
from embsearch_dist.rundir import write_text
from embsearch_dist.serving import programs
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.written import listed

LIMIT = 2000


@contextmanager
def small_disk() -> Iterator[None]:
    """No file grows beyond so many bytes: as a full disk, but only inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def list_many(folder: Path) -> None:
    for k in range(40):
        with listed(folder / f"{k}.json", "0" * 64):
            pass


@pytest.mark.parametrize("save", [programs.save_torch, programs.save_aoti])
def test_a_limit_beside_the_free_space_is_told_before_torch_writes(
    tmp_path: Path, save: Callable[[Any, Path], None]
) -> None:
    """torch's writer of archives would end the process, as under a quota."""
    traced = SimpleNamespace(state_dict={"table": torch.zeros(9, 4)}, constants={})
    with (
        small_disk(),
        pytest.raises(UserError, match=r"p\.pt2 takes up to 8 MB, which the system does not give \(File"),
    ):
        save(traced, tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("allocation.json", lambda folder: write_json(folder / "allocation.json", list(range(LIMIT)))),
        ("config.yaml", lambda folder: write_text(folder / "config.yaml", "x" * LIMIT)),
        ("written.json", list_many),
    ],
)
def test_the_file_is_named(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    (tmp_path / "run.lock").touch()
    write_json(tmp_path / "allocation.json", {"whole": 1})
    with small_disk(), pytest.raises(OSError) as caught:
        write(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
    assert read_json(tmp_path / "allocation.json") == {"whole": 1}


def test_a_line_of_metrics_that_finds_no_room_names_its_file(tmp_path: Path) -> None:
    with Monitor(tmp_path, "fit", quiet=True) as monitor:
        monitor._tensorboard = False
        with small_disk(), pytest.raises(OSError) as caught:
            for step in range(LIMIT):
                monitor.scalars(step, {"loss": 0.5})
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "metrics.jsonl"))
        monitor.resume_at(3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
