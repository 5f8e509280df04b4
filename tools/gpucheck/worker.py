"""The process of one check: loads the project while it waits, then runs the check it is told, and reports."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torchrec", "torchrec.distributed", "embsearch_dist.train.retrain", "embsearch_dist.methods"]


class Wrong(Exception):
    """What was found is not what should have been; the message says both."""


class Skip(Exception):
    """The check means nothing here; the message says why."""


def serve(connection: Connection, log: Path) -> None:
    """Wait for one job and do it.

    The parent sends ``{"place", "kind", "folder", "data", "limit_s"}`` and gets ``("note", figures)`` any number of
    times, then ``("end", status, why)``. What is printed goes to the end of ``log``.
    """
    os.setsid()  # so that all that the check starts ends with it
    _redirect(log)
    # Without it the monitor draws no pictures, which would take longer than the short trainings of the checks.
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]
    for name in PRELOAD:
        # What does not import is the check's to report.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    try:
        job: dict[str, Any] = connection.recv()
    except EOFError:  # it was a spare one
        return
    print(f"\n==== {job['place']}", flush=True)
    status, why = _do(job, connection)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(("end", status, why))
    # Threads of libraries may hang at the end of a process; all has been said.
    os._exit(0)


def _do(job: dict[str, Any], connection: Connection) -> tuple[str, str]:
    module, _, function = job["place"].partition(":")
    try:
        from tools.gpucheck.lab import Lab

        check = getattr(importlib.import_module(module if "." in module else f"tools.gpucheck.{module}"), function)
        deadline = time.monotonic() + job["limit_s"]
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        data = Path(job["data"]) if job["data"] else None
        check(Lab(job["kind"], folder, data, deadline, lambda figures: connection.send(("note", figures))))
    except Skip as e:
        return "skipped", str(e)
    except BaseException as e:  # a check that calls sys.exit has failed too
        traceback.print_exc()
        return "FAILED", _reason(e)
    return "ok", ""


def _reason(error: BaseException) -> str:
    """One line: for what is no finding of ours, the kind of error and the place in the project that it came from."""
    said = " ".join(str(error).split())[:400]
    if isinstance(error, Wrong):
        return said
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said}{place}"


def _redirect(log: Path) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    empty = os.open(os.devnull, os.O_RDONLY)
    for source, place in ((empty, 0), (target, 1), (target, 2)):
        os.dup2(source, place)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
