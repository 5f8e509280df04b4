"""Fixtures of the launch tests: prepared data, a config for it, and launchers that leave nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.factories import prepared, write_config
from tests.launch.processes import LAUNCH, ROOT, end, launcher_home
from tests.scripts import fork_ranks


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data set of ``tests/factories.py``."""
    return prepared(tmp_path_factory)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file for it."""
    return write_config(tmp_path / "tiny.yaml")


@pytest.fixture
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """``on_two_ranks("search.py", *words, cwd=None)``: two ranks as torchrun makes them, without its start."""

    def run(script: str, *words: object, cwd: Path = ROOT) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = fork_ranks(2, LAUNCH / script, [*map(str, words)], cwd, env, 120, tmp_path_factory.mktemp("two"))
        assert all(one is not None and one.returncode == 0 for one in done), [one and one.stderr for one in done]

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start(*words, **env)``: a process in ``tmp_path`` that pipes out all it prints; ended with the test."""
    home = launcher_home(tmp_path)
    started: list[subprocess.Popen[str]] = []

    def run(*words: object, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            list(map(str, words)),
            cwd=tmp_path,
            env=os.environ | home | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        end(process)
