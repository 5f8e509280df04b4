"""Data, a config, and what two ranks on one host make of them; once for all tests of this folder."""

from __future__ import annotations

import fcntl
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.cluster.training import ROOT, TORCHRUN, arguments, result
from tests.factories import prepared, write_config


@contextmanager
def two_hosts() -> Iterator[ModuleType]:
    """The tool, its hosts up. There is one pair a machine: who comes later, of another file or checkout, waits."""
    sys.path.insert(0, str(ROOT))
    tool = importlib.import_module("tools.cluster.two_hosts")
    if problem := tool.lacking():
        pytest.skip(f"no two hosts here: {problem}")
    with open(Path(tempfile.gettempdir()) / "embsearch-two-hosts.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tool.up()
        try:
            yield tool
        finally:
            tool.down()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="session")
def one_host(data: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks on one host."""
    run = tmp_path_factory.mktemp("one") / "run"
    start = [*TORCHRUN, "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", "--"]
    command = [*start, str(ROOT / "launch" / "retrain.py"), *arguments(data, config, run)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=200)
    return result(run)
