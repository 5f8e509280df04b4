"""The performance environment: nothing the user set is changed, and a script restarts itself at most once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embsearch_dist.config import RunConfig
from embsearch_dist.dist.context import set_products
from embsearch_dist.dist.environment import (
    GLIBC_TUNABLES,
    available_cores,
    launcher_environment,
    tuned_environment,
)


@pytest.mark.parametrize(
    ("ranks", "cores", "threads"),
    [(1, 1, "1"), (1, 2, "2"), (2, 2, "1"), (8, 2, "1"), (3, 16, "5"), (8, 64, "8")],
)
def test_cores_are_shared_among_ranks(ranks: int, cores: int, threads: str) -> None:
    env = tuned_environment(ranks, cores, {})
    assert env["OMP_NUM_THREADS"] == threads
    assert env["GLIBC_TUNABLES"] == GLIBC_TUNABLES
    assert ("OMP_WAIT_POLICY" in env) == (ranks > cores)


def test_what_the_user_set_is_not_in_the_answer() -> None:
    base = {"GLIBC_TUNABLES": "", "OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active", "OTHER": "x"}
    assert tuned_environment(8, 2, base) == {}
    assert launcher_environment(8, 2, base | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}) == {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }


def test_cores_are_within_the_affinity() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


SCRIPT = """
import os, sys
from embsearch_dist.dist.environment import reexec_with_tuned_environment
print("start", flush=True)
reexec_with_tuned_environment()
import json
names = ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "EMBSEARCH_TUNED")
heavy = [m for m in ("torch", "torchrec", "numpy") if m in sys.modules]
print(json.dumps({"argv": sys.argv[1:], "optimize": sys.flags.optimize, "utf8": sys.flags.utf8_mode,
                  "heavy": heavy, **{n: os.environ.get(n) for n in names}}))
"""


def run_script(tmp_path: Path, repo_root: Path, **env: str) -> tuple[int, dict]:
    """How often the script started, and what it saw at last."""
    script = tmp_path / "script with space.py"
    script.write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "RANK")}
    clean.pop("EMBSEARCH_TUNED", None)
    done = subprocess.run(
        [sys.executable, "-O", "-X", "utf8", str(script), "--a", "x y", "", "$HOME"],
        env=clean | {"PYTHONPATH": str(repo_root)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *starts, last = done.stdout.splitlines()
    return len(starts), json.loads(last)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only done on Linux")
def test_a_script_restarts_once_with_its_arguments_and_flags(tmp_path: Path, repo_root: Path) -> None:
    starts, seen = run_script(tmp_path, repo_root)
    assert starts == 2
    assert (seen["argv"], seen["optimize"], seen["utf8"]) == (["--a", "x y", "", "$HOME"], 1, 1)
    assert (seen["GLIBC_TUNABLES"], seen["EMBSEARCH_TUNED"]) == (GLIBC_TUNABLES, "1")
    assert int(seen["OMP_NUM_THREADS"]) == available_cores()
    assert seen["heavy"] == []  # else the restart would load torch twice


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only done on Linux")
def test_ranks_of_plain_torchrun_restart_too(tmp_path: Path, repo_root: Path) -> None:
    many = str(4 * available_cores())
    starts, seen = run_script(tmp_path, repo_root, RANK="1", LOCAL_WORLD_SIZE=many)
    assert (starts, seen["GLIBC_TUNABLES"], seen["OMP_NUM_THREADS"]) == (2, GLIBC_TUNABLES, "1")


@pytest.mark.parametrize("env", [{"EMBSEARCH_TUNED": "0"}, {"RANK": "0", "GLIBC_TUNABLES": "", "OMP_NUM_THREADS": "1"}])
def test_no_restart(tmp_path: Path, repo_root: Path, env: dict[str, str]) -> None:
    starts, seen = run_script(tmp_path, repo_root, **env)
    assert starts == 1
    assert seen["GLIBC_TUNABLES"] == env.get("GLIBC_TUNABLES")


def test_tf32_is_a_gpus_alone_and_off_unless_asked_for() -> None:
    products = torch.backends.cuda.matmul
    try:
        for tf32, device, allowed in ((True, "cuda:0", True), (False, "cuda:0", False), (True, "cpu", False)):
            products.allow_tf32 = not allowed
            set_products(RunConfig(tf32=tf32), torch.device(device))
            assert products.allow_tf32 is allowed
        assert not RunConfig().tf32
    finally:
        products.allow_tf32 = False
