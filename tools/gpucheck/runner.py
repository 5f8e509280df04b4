"""Runs checks one after the other, each in a process of its own with a time limit. Imports no torch.

While a check runs, the process of the next one loads torch already. Without a GPU the processes are forks of one that
has loaded it; with one they are started afresh, because CUDA does not survive a fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpucheck import worker
from tools.gpucheck.listing import Check, number_of
from tools.gpucheck.table import FAILED, LEFT_OUT

Starter = Callable[[], "Worker"]


@dataclass
class Outcome:
    """How a check ended."""

    status: str
    why: str
    figures: dict[str, Any] = field(default_factory=dict)


class Worker:
    """A process that has loaded the project, or is about to, and waits for its one job."""

    def __init__(self, context: Any, log: Path) -> None:
        self.connection, there = context.Pipe()
        self.process = context.Process(target=worker.serve, args=(there, log), daemon=True)
        self.process.start()
        there.close()

    def run(self, job: dict[str, Any]) -> Outcome:
        """Give it the job and wait for its end, at most ``job["limit_s"]``; the process is gone afterwards."""
        found, deadline = Outcome(FAILED, ""), time.monotonic() + job["limit_s"]
        try:
            self.connection.send(job)
            while not found.why:
                if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                    found.why = f"not done after {job['limit_s']:.0f} s, stopped"
                    break
                kind, *said = self.connection.recv()
                if kind == "note":
                    found.figures |= said[0]
                    continue
                found.status, found.why = said
                break
        except (EOFError, OSError):
            self.process.join(5)
            found.why = f"the process died: {_death(self.process.exitcode)}"
        self.close()
        return found

    def close(self) -> None:
        """End the process and whatever it has started."""
        self.connection.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has not made its own group yet, or is gone
            self.process.kill()
        self.process.join(10)


def starter(kind: str, log: Path) -> Starter:
    """How a process begins on this kind of device."""
    context: Any = multiprocessing.get_context("spawn" if kind == "cuda" else "forkserver")
    if kind == "pretend":
        # Its work is tiny, and threads that spin beside another process have made it five times as long.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if kind != "cuda":
        context.set_forkserver_preload(worker.PRELOAD)
    return lambda: Worker(context, log)


def run_checks(
    checks: Sequence[Check],
    kind: str,
    budget_s: float,
    folder: Path,
    data: Path | None,
    facts: dict[str, str],
    start: Starter,
) -> Iterator[dict[str, Any]]:
    """Results as the checks end, in their order.

    Each may take its weight's share of the time that is left, so what one leaves over goes to those behind it, but at
    least ``check.least`` seconds; one for which not even that is left is left out.

    Args:
        checks: what to run.
        kind: cpu | pretend | cuda.
        budget_s: for all of them together, seconds.
        folder: where checks may write; each gets a folder in it.
        data: a prepared data set, or None.
        facts: joins every result.
        start: makes a :class:`Worker`.
    """
    over = time.monotonic() + budget_s
    spare = start()
    try:
        for k, check in enumerate(checks):
            left = over - time.monotonic()
            share = left * check.weight / sum(c.weight for c in checks[k:])
            limit, begun = max(share, check.least), time.monotonic()
            if limit > left:
                outcome = Outcome(LEFT_OUT, "no time")
            else:
                current, spare = spare, start()
                job = {"place": check.place, "kind": kind, "limit_s": limit}
                outcome = current.run(job | {"folder": str(folder / check.name), "data": str(data or "")})
            yield {
                "number": number_of(check),
                "check": check.name,
                "status": outcome.status,
                "seconds": round(time.monotonic() - begun, 2),
                "limit_s": round(limit, 1),
                "why": outcome.why,
                "figures": outcome.figures,
                **facts,
            }
    finally:
        spare.close()


def write_line(path: Path, result: dict[str, Any]) -> str:
    """Append a result to a file of JSON lines at once; returns the line."""
    line = json.dumps(result)
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
