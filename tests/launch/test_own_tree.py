"""Scripts run the code that they lie beside, also where another checkout is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.ranks.environment import TUNED
from tests.launch.processes import ROOT, TORCHRUN, finish

# One write: the ranks of torchrun print unbuffered, into one pipe.
STOP = 'print(f"stopped in {__file__}\\n", end="", flush=True)\nraise SystemExit\n'
TUNABLES = (TUNED, "GLIBC_TUNABLES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Another checkout: its scripts and what starts them over are real, the first modules after that tell and stop."""
    tree = tmp_path / "copy"
    shutil.copytree(ROOT / "launch", tree / "launch")
    (tree / "embsearch_dist" / "ranks").mkdir(parents=True)
    for name in ("__init__.py", "ranks/__init__.py", "ranks/environment.py"):
        shutil.copy(ROOT / "embsearch_dist" / name, tree / "embsearch_dist" / name)
    (tree / "embsearch_dist" / "config").mkdir()
    for name in ("allocation.py", "config/__init__.py"):
        (tree / "embsearch_dist" / name).write_text(STOP)
    return tree


@pytest.mark.parametrize("script", ["search.py", "retrain.py", "evaluate.py", "plan.py"])
def test_a_script_takes_its_own_tree(copy: Path, script: str) -> None:
    """Started over with tuned variables or not, and from any folder."""
    clean = {name: value for name, value in os.environ.items() if name not in TUNABLES}
    for env in (clean, clean | {TUNED: "0"}):
        done = subprocess.run(
            [sys.executable, str(copy / "launch" / script), "--help"],
            env=env | {"PYTHONPATH": str(ROOT)},  # before all that is installed
            cwd=copy.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert f"stopped in {copy / 'embsearch_dist'}" in done.stdout, done.stdout + done.stderr


def test_so_do_the_ranks_of_torchrun(copy: Path, start: Callable) -> None:
    told = finish(start(*TORCHRUN, "--", copy / "launch" / "search.py", "--help"))
    assert told.count(f"stopped in {copy / 'embsearch_dist'}") == 2


def test_torchx_starts_the_scripts_of_the_tree_one_stands_in(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchx")
    from launch.ddp import _find_script

    monkeypatch.chdir(copy)
    assert _find_script("search.py") == "launch/search.py"
    monkeypatch.chdir(copy.parent)
    assert Path(_find_script("search.py")) == ROOT / "launch" / "search.py"
