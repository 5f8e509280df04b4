"""Entry scripts in processes of their own: started as from a shell, or forked from one that has torch loaded.

Loading torch and TorchRec takes seconds, most of what a short script takes. What the fork has not gone through is the
start of Python and the script's own restart with tuned variables; the tests of TorchX and torchrun go through both.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from embsearch_dist.ranks.environment import TUNED
from tests.ranks import fork, free_port

Done = subprocess.CompletedProcess[str]


def read(folder: Path, name: str) -> str:
    """What the latest script has printed: ``out`` or ``err``."""
    return (folder / f"script-{name}.txt").read_text()


def start_script(
    path: Path, words: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float, folder: Path
) -> Done | None:
    """Run a script with this Python; None if it took longer and was killed. ``folder`` gets what it printed."""
    command = [sys.executable, str(path), *words]
    with open(folder / "script-out.txt", "w") as out, open(folder / "script-err.txt", "w") as err:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        process = subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    return subprocess.CompletedProcess(command, code, read(folder, "out"), read(folder, "err"))


def fork_script(
    path: Path, words: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float, folder: Path
) -> Done | None:
    """The same in a fork of the server that also the ranks of ``tests/ranks.py`` come from."""
    return _joined(fork(_run, (str(path), [*words], str(cwd), dict(env), str(folder))), timeout, folder)


def fork_ranks(
    count: int, path: Path, words: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float, folder: Path
) -> list[Done | None]:
    """The same on ``count`` ranks, which get the variables of torchrun; ``folder/RANK`` has what each printed."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = []
    for rank in map(str, range(count)):
        (folder / rank).mkdir()
        full = {**env, **where, **sizes, "RANK": rank, "LOCAL_RANK": rank}
        started.append(fork(_run, (str(path), [*words], str(cwd), full, str(folder / rank))))
    deadline = time.monotonic() + timeout
    return [_joined(p, deadline - time.monotonic(), folder / str(rank)) for rank, p in enumerate(started)]


def _joined(process: BaseProcess, timeout: float, folder: Path) -> Done | None:
    process.join(max(0.0, timeout))
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return None
    return subprocess.CompletedProcess("", process.exitcode, read(folder, "out"), read(folder, "err"))


def _run(path: str, words: list[str], cwd: str, env: dict[str, str], folder: str) -> None:
    os.setsid()
    places = (os.devnull, f"{folder}/script-out.txt", f"{folder}/script-err.txt")
    for number, name in enumerate(places):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update({TUNED: "1"} | env)
    sys.argv = [path, *words]
    sys.path[:0] = [os.path.dirname(path), *env.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(path, run_name="__main__")
