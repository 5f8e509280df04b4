"""torchrun's exit code: what the ranks ended with, and what Slurm is told of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from embsearch_dist.ranks.torchrun import ENDS, code_of, forbid_requeue, launch

HERE = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "1", "--no-python", "sh", "-c"]


@pytest.mark.parametrize(
    ("ranks", "error", "code"),
    [
        ([2, 75], False, 2),
        ([], True, 2),  # the launcher was told to end by a rank that ended in an error
        ([-15, 75], False, 75),
        ([-9], False, 75),  # killed, perhaps with its host
        ([], False, 75),  # the launcher was told to end
        ([-6, 1, 75], False, 1),
        ([130], False, 130),
    ],
)
def test_code_says_whether_the_same_command_would_help(ranks: list[int], error: bool, code: int) -> None:
    assert code_of(ranks, error) == code


@pytest.fixture
def own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchrun takes signals of its process, and its variables stay."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    for name in (ENDS, "TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize(
    ("script", "code"),
    [
        pytest.param("exit 0", 0, marks=pytest.mark.slow),
        pytest.param("exit 2", 2, marks=pytest.mark.slow),
        ("exit 75", 75),
        ("exit 1", 1),
        (f"touch ${ENDS}/error; kill -TERM $PPID", 2),
    ],
)
def test_launch_ends_as_its_ranks_do(script: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch([*HERE, script]) == code
    assert ("FAILED" in capsys.readouterr().err) == (code == 1)  # torchrun's table, where no rank has told
    assert not Path(os.environ[ENDS]).exists()


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that notes what it is told."""
    tool, told = tmp_path / "scontrol", tmp_path / "told"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {told}\n[ -z "$REFUSES" ] || {{ echo "no way" >&2; exit 1; }}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return told


def test_only_a_job_that_would_be_repeated_is_forbidden_to(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_requeue({})
    forbid_requeue({"SLURM_JOB_ID": "7", "TORCHX_MAX_RETRIES": "0"})
    assert not scontrol.exists()
    forbid_requeue({"SLURM_JOB_ID": "7", "TORCHX_MAX_RETRIES": "3"})
    assert scontrol.read_text() == "update JobId=7 Requeue=0\n"
    monkeypatch.setenv("REFUSES", "1")
    forbid_requeue({"SLURM_JOB_ID": "7", "TORCHX_MAX_RETRIES": "3"})
    assert "may be started again though that cannot help: no way" in capsys.readouterr().err
