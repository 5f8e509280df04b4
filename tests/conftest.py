"""Fixtures and markers shared by all tests: a test's folder decides its marker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("unit", "distributed", "launch", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder; skip GPU tests where there is no GPU."""
    no_gpu = None
    for item in items:
        parts = item.path.relative_to(ROOT / "tests").parts if item.path.is_relative_to(ROOT / "tests") else ("",)
        if parts[0] not in FOLDERS:
            continue
        item.add_marker(parts[0])
        if parts[0] == "gpu":
            if no_gpu is None:
                import torch

                no_gpu = not torch.cuda.is_available()
            if no_gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public data samples: ``$EMBSEARCH_DATA``, else ``../shared/data``; skips without one."""
    folder = Path(os.environ.get("EMBSEARCH_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data samples at {folder}: set EMBSEARCH_DATA")
    return folder


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_script("search.py", *args, timeout=120, check=True, env=None, cwd=None)``.

    Runs ``launch/<script>`` in a process of its own and returns it with ``stdout`` and ``stderr``.
    With ``check``, a non-zero exit fails the test and shows both. On a timeout the script and all
    its children are killed.
    """

    def run(
        script: str,
        *args: object,
        timeout: float = 120,
        check: bool = True,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        path = ROOT / "launch" / Path(script).name
        command = [sys.executable, str(path), *map(str, args)]
        full_env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(
            command,
            cwd=cwd or ROOT,
            env=full_env | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{script} not done after {timeout} s\n--- stdout\n{out}\n--- stderr\n{err}")
        if check and process.returncode != 0:
            pytest.fail(f"{script} exited with {process.returncode}\n--- stdout\n{out}\n--- stderr\n{err}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


@pytest.fixture
def gloo2(tmp_path: Path) -> Callable[..., list[Any]]:
    """``gloo2(fn, *args, timeout=120)``: ``fn(rank, 2, *args)`` on two gloo ranks; see ``tests/ranks.py``."""

    def run(fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        return run_ranks(fn, 2, tmp_path, *args, **options)

    return run
