"""The performance environment: nothing the user set is changed, and a script restarts itself at most once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embsearch_dist.config.sections import DistConfig, RunConfig
from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import set_products, start
from embsearch_dist.ranks.environment import (
    GLIBC_TUNABLES,
    OWN_STORE,
    available_cores,
    check_restarts,
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
    local = base | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60", "TORCHX_JOB_ID": "local_cwd://torchx/a"}
    assert launcher_environment(8, 2, local) == {OWN_STORE: "1"}


def test_a_node_of_a_cluster_has_its_cores_alone_and_time_to_save() -> None:
    slurm = launcher_environment(2, 8, {"TORCHX_JOB_ID": "slurm://torchx/17"}, nodes=4)
    assert slurm["OMP_NUM_THREADS"] == "4" and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in slurm
    local = launcher_environment(2, 8, {"TORCHX_JOB_ID": "local_cwd://torchx/17"}, nodes=4)
    assert local["OMP_NUM_THREADS"] == "1" and local["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "5"


def test_a_shell_takes_the_variables_over(repo_root: Path) -> None:
    script = f'eval "$({sys.executable} -m embsearch_dist.ranks.environment --ranks 3 --cores 13)"; '
    script += "echo $OMP_NUM_THREADS $GLIBC_TUNABLES $TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    unset = ("OMP_NUM_THREADS", "GLIBC_TUNABLES", OWN_STORE)
    env = {k: v for k, v in os.environ.items() if k not in unset} | {"PYTHONPATH": str(repo_root)}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True, cwd=repo_root)
    assert done.stdout.split() == ["4", GLIBC_TUNABLES, "1"]


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}, True),
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, False),
        ({"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}, False),
        ({}, False),
    ],
)
def test_restarts_on_several_hosts_need_a_store_of_their_own(variables: dict[str, str], refused: bool) -> None:
    problem = check_restarts(variables)
    assert bool(problem) == refused
    assert not refused or f"export {OWN_STORE}=1" in problem


def test_cores_are_within_the_affinity() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


SCRIPT = """
import os, sys
from embsearch_dist.ranks.environment import reexec_with_tuned_environment
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_job_that_asked_for_gpus_does_not_fall_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBSEARCH_GPUS", "2")
    opened = start(RunConfig(device="auto"), DistConfig())
    with pytest.raises(UserError, match="2 GPUs a node were asked for, and torch sees none"), opened:
        pass
