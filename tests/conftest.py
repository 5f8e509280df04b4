"""Fixtures and markers shared by all tests: a test's folder decides its marker."""

from __future__ import annotations

import functools
import gc
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.scripts import fork_script, read, start_script

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("unit", "distributed", "launch", "pretend", "cluster", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder; skip GPU tests where there is no GPU."""
    for item in items:
        parts = item.path.relative_to(ROOT / "tests").parts if item.path.is_relative_to(ROOT / "tests") else ("",)
        if parts[0] not in FOLDERS:
            continue
        item.add_marker(parts[0])
        if parts[0] == "gpu" and not _gpu():
            item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))


def pytest_collection_finish() -> None:
    """Leave what the libraries hold out of every later collection: to go through it took a fifth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@functools.cache
def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, so that what failed once fails again."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what a test that takes no generator reads)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_backbones() -> Iterator[None]:
    """A backbone that a test registers is gone after it; its module is imported anew by who names it again."""
    yield
    if backbones := sys.modules.get("embsearch_dist.config.backbones"):
        for name in [n for n, known in backbones._known.items() if "/embsearch_dist/" not in known.source]:
            del backbones._known[name]
    if own_module := sys.modules.get("embsearch_dist.config.own_module"):
        own_module._loaded.clear()


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
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_script("search.py", *args, timeout=120, check=True, env=None, cwd=None, fresh=False)``.

    Runs ``launch/<script>`` in a process of its own and returns it with ``stdout`` and ``stderr``.
    With ``check``, a non-zero exit fails the test and shows both. On a timeout the script and all
    its children are killed. The process is a fork of one that has torch loaded, unless ``fresh``: then it is
    started as from a shell. So it is on a machine with a GPU, since CUDA does not survive a fork.
    """

    printed = tmp_path_factory.mktemp("script")

    def run(
        script: str,
        *args: object,
        timeout: float = 120,
        check: bool = True,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        path = ROOT / "launch" / Path(script).name
        full_env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        start = start_script if fresh or _gpu() else fork_script
        done = start(path, [*map(str, args)], cwd or ROOT, full_env | (env or {}), timeout, printed)
        if done is None or (check and done.returncode != 0):
            ended = f"not done after {timeout} s" if done is None else f"exited with {done.returncode}"
            pytest.fail(f"{script} {ended}\n--- stdout\n{read(printed, 'out')}\n--- stderr\n{read(printed, 'err')}")
        return done

    return run


@pytest.fixture
def gloo2(tmp_path: Path) -> Callable[..., list[Any]]:
    """``gloo2(fn, *args, timeout=120)``: ``fn(rank, 2, *args)`` on two gloo ranks; see ``tests/ranks.py``."""

    def run(fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        return run_ranks(fn, 2, tmp_path, *args, **options)

    return run
