"""Entry scripts as forks of this process, which has torch loaded: a start costs milliseconds, not seconds."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
HUNG = -1000
"""Exit code of a script that was not done in time."""


@dataclass(frozen=True)
class Done:
    """How a script ended: exit code (``-9`` killed, :data:`HUNG`), and what it printed."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def load() -> None:
    """Import what every script needs, before the first fork. No thread may be started by it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("POLARS_MAX_THREADS", "1")
    for path in (str(ROOT), str(ROOT / "launch")):
        if path not in sys.path:
            sys.path.insert(0, path)
    import torch

    importlib.import_module("torchrec")

    torch.set_num_threads(1)
    for name in (
        "embsearch_dist.report",
        "embsearch_dist.running",
        "launch.evaluate",
        "launch.retrain",
        "launch.search",
    ):
        importlib.import_module(name)
    list(importlib.import_module("embsearch_dist.methods").METHODS.values())  # which loads them


def start(script: str, words: Sequence[str], cwd: Path, printed: Path, env: Mapping[str, str] | None = None) -> int:
    """Fork ``launch/<script>`` off in a session of its own; its process id. It prints into ``printed.out`` and
    ``.err``."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for number, name in enumerate((os.devnull, f"{printed}.out", f"{printed}.err")):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(name, flags, 0o644), number)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.chdir(cwd)
        os.environ.update({"EMBSEARCH_TUNED": "1", **(env or {})})
        sys.argv = [str(ROOT / "launch" / script), *words]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return 0


def finish(pids: Sequence[int], seconds: float) -> list[int]:
    """Wait for processes; those not done in time are killed with all of their session and count as :data:`HUNG`."""
    left, codes, deadline = dict.fromkeys(pids), {}, time.monotonic() + seconds
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                del left[pid]
        if left and time.monotonic() > deadline:
            for pid in left:
                end_session(pid)
                os.waitpid(pid, 0)
                codes[pid] = HUNG
            left = {}
        elif left:
            time.sleep(0.005)
    return [codes[pid] for pid in pids]


def end_session(pid: int) -> None:
    """SIGKILL to a process that :func:`start` gave, and to all it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def run(script: str, words: Sequence[str], cwd: Path, printed: Path, seconds: float = 120) -> Done:
    """Run a script on one rank to its end."""
    code = finish([start(script, words, cwd, printed)], seconds)[0]
    return Done(code, read(f"{printed}.out"), read(f"{printed}.err"))


def start_launcher(script: str, words: Sequence[str], cwd: Path, printed: Path) -> int:
    """torchrun with two ranks, as from a shell, in a session of its own; its process id."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command += ["--nproc-per-node", "2", "--", str(ROOT / "launch" / script), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    with open(f"{printed}.out", "w") as out, open(f"{printed}.err", "w") as err:
        places = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **places).pid


def kill_launcher(pid: int) -> None:
    """SIGKILL to a launcher alone; half a second later to what it has left behind, as a scheduler's cgroup does."""
    try:
        ranks = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
    time.sleep(0.5)
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ranks, timeout=10)


def resumed(
    path: Path, head: dict[str, Any], count: int, case: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The first ``count`` cases; those that ``path`` holds from an earlier start with the same ``head`` are not done
    again."""
    lines = [json.loads(line) for line in read(path).splitlines()]
    done = lines[1:] if lines[:1] == [head] else []
    tqdm.monitor_interval = 0  # its thread would be there at every fork
    with open(path, "a" if done else "w") as file:
        if not done:
            file.write(json.dumps(head) + "\n")
        for number in tqdm(range(len(done), count), initial=len(done), total=count, unit=" cases"):
            done.append(case(number))
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    return done[:count]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank, with a rendezvous that the ranks open themselves."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {**{k: str(v) for k, v in found.items()}, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return ""
