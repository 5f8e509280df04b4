"""Environment variables that must be set before a process starts, each with its reason, in one place.

    eval "$(python -m embsearch_dist.ranks.environment --ranks 8)"      set them for a torchrun of 8 ranks on this node

The TorchX components do that on each node, for cores are those of the node and not of the machine that submits a job.
Scripts started with plain ``python`` or ``torchrun`` go through :func:`reexec_with_tuned_environment`. A variable that
the user has set is never changed. Also what torchrun's variables tell its ranks about restarts. Imports nothing
but the standard library: it runs before torch loads.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

TUNED = "EMBSEARCH_TUNED"
"""``0`` (set by the user) switches re-execution off; ``1`` tells the second start that it is one."""

# By default glibc gives every block above 32 MB back to the kernel when it is freed, so each step faults
# all pages of its large activations in again. Keeping them, on huge pages, made a 64-wide table's step
# 2.5-3.8 times as fast and changes no result.
GLIBC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=4294967296",
        "glibc.malloc.trim_threshold=8589934592",
    )
)

GPUS = "EMBSEARCH_GPUS"
"""GPUs a node that a job has asked for: on such a node ``run.device auto`` does not fall back to the CPU."""
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
LAUNCHER_ENVIRONMENT = {
    # A restarted worker group that reuses the agent's store reads the addresses of dead workers: half
    # of the restarts hang or fail on gloo. With a store of its own per attempt all of them recovered.
    OWN_STORE: "1",
}
LOCAL_LAUNCHER_ENVIRONMENT = {
    # TorchX kills a local agent 10 s after it asked it to stop; the agent must be done with its workers
    # before that (its own default is 30 s), or they outlive it. torch 2.11 does not read this: there a rank that
    # ignores SIGTERM outlives a job that is interrupted. Clusters wait longer, and a save may need it.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
}


def tuned_environment(ranks: int, cores: int, base: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to ``base`` for ``ranks`` processes that share ``cores`` cores.

    Holds only what ``base`` does not set, so ``base | tuned_environment(...)`` overrides nothing.
    """
    wanted = {
        "GLIBC_TUNABLES": GLIBC_TUNABLES,
        # Without it torchrun gives each rank one thread and plain python gives it every core the
        # machine has, even those this process may not use.
        "OMP_NUM_THREADS": str(max(1, cores // max(1, ranks))),
    }
    if ranks > cores:
        # Idle threads spin by default and take the cores from the ranks that have work: 3-5 times
        # slower. Sleeping costs a little when every rank has a core, hence only here.
        wanted["OMP_WAIT_POLICY"] = "passive"
    return {name: value for name, value in wanted.items() if name not in base}


def launcher_environment(ranks: int, cores: int, base: Mapping[str, str], nodes: int = 1) -> dict[str, str]:
    """What a torchrun launch on this node adds to ``base``: :func:`tuned_environment` and what the agent needs.

    TorchX's local schedulers start all ``nodes`` on one machine, where they share its cores.
    """
    local = base.get("TORCHX_JOB_ID", "").startswith("local")
    wanted = LAUNCHER_ENVIRONMENT | (LOCAL_LAUNCHER_ENVIRONMENT if local else {})
    agent = {name: value for name, value in wanted.items() if name not in base}
    ranks_here = ranks * (nodes if local else 1)
    return tuned_environment(ranks_here, cores, base) | agent


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or a quota of "max"
        return cores


def reexec_with_tuned_environment() -> None:
    """Start this script over, once, with :func:`tuned_environment` set; call it before importing torch.

    glibc reads its tunables when a process starts, so setting them here would come too late. Does
    nothing on a second start, with ``EMBSEARCH_TUNED`` set by the user, when nothing is missing (our
    launchers have set it all), and outside Linux. Interpreter flags, arguments and the process's number stay,
    so torchrun does not notice. Only for the ``__main__`` of a script: it replaces the calling process.
    """
    if TUNED in os.environ or not sys.platform.startswith("linux"):
        return
    missing = tuned_environment(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), available_cores(), os.environ)
    if not missing:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing, TUNED: "1"})


def attempt(environment: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started the ranks again so far (``--max-restarts``); 0 without torchrun."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0)


def check_restarts(environment: Mapping[str, str] = os.environ) -> str:
    """Why ranks on several hosts could not meet after a restart, and the cure; empty where they can.

    A host whose rank failed counts a restart, one that only joins again does not. So the prefix of
    :func:`store_of_attempt` would differ between hosts, and they would wait for each other until they time out.
    """
    hosts, again = int(environment.get("GROUP_WORLD_SIZE") or 1), int(environment.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if hosts < 2 or not again or not shared:
        return ""
    return (
        f"torchrun on {hosts} hosts with --max-restarts {again} needs {OWN_STORE}=1 in its environment on every host: "
        f"else ranks that are started again do not find each other. Give the same command behind: export {OWN_STORE}=1"
    )


def store_of_attempt(timeout: timedelta) -> Store | None:
    """Where ranks that were started again can meet; None where torch's own way is right.

    Without ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE`` torchrun serves one store to all attempts
    (https://github.com/pytorch/pytorch/issues/135712), so they read the addresses of dead ranks in it. An
    attempt's own prefix hides them.
    """
    if not attempt() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, int(os.environ["WORLD_SIZE"]), is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt-{attempt()}", store)


def end_restarts(patience_s: float = 5) -> None:
    """Keep torchrun from starting the ranks again, for an end that would only repeat; call it on all ranks, then exit.

    No exit code does that: torchrun answers every failure alike while it has restarts left. SIGTERM ends it. One
    rank of a machine sends it, because a second one would interrupt torchrun while it waits for the others. These
    stay until torchrun passes the signal on (at most ``patience_s``), or it would answer their end first.
    """
    parent = os.getppid()
    if attempt() >= int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) or not is_torchrun(parent):
        return
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    if os.environ.get("LOCAL_RANK") == "0":
        os.kill(parent, signal.SIGTERM)
        return
    deadline = time.monotonic() + patience_s
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)


def is_torchrun(pid: int) -> bool:
    """Whether it is a process of torchrun's, and not of somebody who uses torch's launcher as a library."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # not Linux
        return False
    return b"torchrun" in command or b"torch.distributed.run" in command


def main() -> None:
    """Print the lines of a shell that set :func:`launcher_environment`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, help="that torchrun starts on this node")
    parser.add_argument("--nodes", type=int, default=1, help="of the job; those of a local TorchX job share a machine")
    parser.add_argument("--cores", type=int, default=0, help="that the job has on this node; 0 = all it may use")
    args = parser.parse_args()
    found = launcher_environment(args.ranks, args.cores or available_cores(), os.environ, args.nodes)
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in found.items()))


if __name__ == "__main__":
    main()
