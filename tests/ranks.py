"""Run a function on several gloo ranks of this machine, for tests.

def body(rank, world_size, scale):  # at module level, so that ranks can import it
    t = torch.ones(1) * scale
    dist.all_reduce(t)
    return int(t)

def test_sum(tmp_path):
    assert run_ranks(body, 2, tmp_path, 3) == [6, 6]
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

THREADS = int(os.environ.get("EMBSEARCH_TEST_THREADS", "1"))
"""Threads of torch in every process of the tests. On tensors as small as theirs a second one only waits."""
LIMITED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS")
THREAD_LIMITS = dict.fromkeys(LIMITED, str(THREADS))
GRACE_S = 3.0
"""After the first failing rank the others get this long to report their own error; then they are killed."""
NOT_CONNECTED = "Gloo connectFullMesh failed"

# Importing torch, TorchRec and what we have on top of them costs each new process seconds. The fork server imports
# them once a session (tests/preload.py), and every rank is a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])
ROOT = Path(__file__).resolve().parent.parent


def fork(target: Callable[..., None], args: tuple[Any, ...], **options: Any) -> BaseProcess:
    """A process that runs ``target(*args)``, started as a fork of the server; ``options`` are those of ``Process``."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = CONTEXT.Process(target=target, args=args, **options)
    with mock.patch.dict(os.environ, THREAD_LIMITS | {"PYTHONPATH": path}):  # for the server, which starts on first use
        process.start()
    return process


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout: float = 120,
    init: bool = True,
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on each rank, a gloo group open; return the results by rank.

    Results travel as JSON, so tuples come back as lists. With ``init=False`` no group is opened,
    and ``MASTER_ADDR`` and the like are set as torchrun does, for code that opens its own.

    Raises:
        AssertionError: a rank raised, died, or is not done after ``timeout`` seconds; the message holds
            every rank's traceback (for a timeout: where each one stood). No process is left behind.
    """
    try:
        return _run_once(fn, world_size, tmp_path, args, timeout, init)
    except AssertionError as e:
        # While many processes open groups on one machine, gloo's own handshake is cut now and then; no code of ours
        # has run by then.
        if NOT_CONNECTED not in str(e):
            raise
        return _run_once(fn, world_size, tmp_path, args, timeout, init)


def _run_once(
    fn: Callable[..., Any], world_size: int, tmp_path: Path, args: tuple[Any, ...], timeout: float, init: bool
) -> list[Any]:
    number = sum(1 for _ in tmp_path.glob("ranks-*"))
    folder = tmp_path / f"ranks-{number}"
    folder.mkdir(parents=True)
    env = dict(os.environ) | THREAD_LIMITS | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    # The loopback interface needs no host name lookup, which fails or stalls on some build machines.
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not init:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    deadline = time.monotonic() + timeout
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        rank_env = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        inputs = (fn, rank, world_size, str(folder), args, rank_env, timeout, init)
        processes.append(fork(_rank_main, inputs, name=f"rank{rank}", daemon=True))
    try:
        problem = _wait(processes, deadline)
        if problem:
            time.sleep(0.2)  # a rank that is being ended may still be writing its report
            raise AssertionError(f"{problem}\n" + "\n".join(_report(folder, p) for p in processes))
        return [json.loads((folder / f"{p.name}.json").read_text()) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _wait(processes: list[BaseProcess], deadline: float) -> str | None:
    """None once all ranks ended well; else what went wrong first."""
    problem = None
    running = list(processes)
    while running:
        left = deadline - time.monotonic()
        if left <= 0:
            return problem or f"{', '.join(p.name for p in running)} not done in time"
        wait([p.sentinel for p in running], timeout=left)
        for process in [p for p in running if not p.is_alive()]:
            running.remove(process)
            if process.exitcode != 0 and problem is None:
                problem = f"{process.name} failed (exit code {process.exitcode})"
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return problem


def _report(folder: Path, process: BaseProcess) -> str:
    error, stacks = folder / f"{process.name}.error", folder / f"{process.name}.stacks"
    if error.exists():
        text = error.read_text()
    elif stacks.exists() and stacks.stat().st_size:
        text = f"stood here:\n{stacks.read_text()}"
    else:
        text = "no traceback (still running, or ended by a signal)"
    return f"---- {process.name} ----\n{text}"


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
    env: dict[str, str],
    timeout: float,
    init: bool,
) -> None:
    name = Path(folder, f"rank{rank}")
    with open(f"{name}.stacks", "w") as stacks:
        try:
            os.environ.clear()
            os.environ.update(env)
            # Just before the parent gives up, so that its message can tell where this rank hangs.
            faulthandler.dump_traceback_later(max(0.5, timeout - 1), file=stacks)
            faulthandler.enable(file=stacks)
            import torch
            import torch.distributed as dist

            torch.set_num_threads(THREADS)
            if init:
                store = dist.FileStore(str(Path(folder, "rendezvous")), world_size)
                limit = timedelta(seconds=max(1.0, timeout))
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
            result = json.dumps(fn(rank, world_size, *args))
            if init:
                dist.barrier()  # nobody tears the group down while another still uses it
                dist.destroy_process_group()
            Path(f"{name}.json").write_text(result)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(f"{name}.error").write_text(traceback.format_exc())
            os._exit(1)  # destructors of a broken group may wait for the others
        finally:
            faulthandler.cancel_dump_traceback_later()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
