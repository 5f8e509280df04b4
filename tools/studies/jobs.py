"""Run many commands a few at a time, and skip those whose result is already there.

Shared by the measurement scripts of this folder: every measurement is a set of ordinary runs of the
entry scripts, so each figure can be looked at, repeated or continued by hand.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from embsearch_dist.files import ends_whole, temporary
from tools.gpucheck.facts import hardware

ROOT = Path(__file__).resolve().parents[2]
RECORD = "jobs.jsonl"  # in the folder of the logs: what was run, how long, and at which commit
LOOK_S = 0.1  # between two looks at a running command
STOPPED = "stopped by SIGTERM; the same command goes on where it was"
_writing = threading.Lock()
_running: set[int] = set()  # process ids of the commands
_told_to_stop = threading.Event()


class Ended(NamedTuple):
    """How a command ended: its exit code, the processor seconds of it and the children that it waited for, and the
    largest resident size of its own process."""

    code: int
    cpu_seconds: float
    memory_gib: float


@dataclass(frozen=True)
class Job:
    """One command: a script of launch/ or tools/ with its arguments; done when ``result`` exists.

    Without a ``result`` it is always run: the script itself knows what is done. ``before`` is called first. ``shared``
    is a file that the command makes unless another one has: the record of a job says whether it was there (``found``).
    """

    name: str
    script: str
    arguments: Sequence[str]
    result: Path | None
    before: Callable[[], None] | None = None
    shared: Path | None = None

    @property
    def done(self) -> bool:
        return self.result is not None and self.result.exists()


def trained_in(run_dir: Path, name: str, seed: int, own: int = 0) -> Path:
    """Where retrain.py puts a model: it adds a seed that is not the config's ``own`` to the name."""
    return run_dir / "retrain" / (name if seed == own else f"{name}-seed{seed}")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table whose cells may be left out; it is whole or as it was: ``--earlier`` would take the lines of half a
    table for all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a table below its head."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_job(job: Job, log_dir: Path) -> float:
    """Run one job with one thread; returns its seconds (0 when it was done before).

    Raises:
        SystemExit: the command failed; names its log. Or the tool was told to stop.
    """
    if job.done:
        return 0.0
    if _told_to_stop.is_set():
        raise SystemExit(STOPPED)
    if job.before is not None:
        job.before()
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{job.name}.log"
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    line: dict[str, Any] = {"job": job.name}
    if job.shared is not None:
        line |= {"shared": os.path.relpath(job.shared, log_dir.parent), "found": job.shared.exists()}
    started = time.monotonic()
    with log.open("w") as out:
        command = [sys.executable, "-W", "ignore", str(ROOT / job.script), *job.arguments]
        ended = run_command(command, out, environment)
    seconds = time.monotonic() - started
    line |= {"seconds": round(seconds, 1), "cpu_seconds": round(ended.cpu_seconds, 1), "exit": ended.code}
    line |= {"memory_gib": round(ended.memory_gib, 2), "commit": commit(), "hardware": hardware()}
    line |= {"command": shown(job)}
    with _writing:
        _append(log_dir / RECORD, json.dumps(line))
    if _told_to_stop.is_set():
        raise SystemExit(STOPPED)
    if ended.code or (job.result is not None and not job.result.exists()):
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise SystemExit(f"{job.name} failed (exit code {ended.code}); see {log}\n{tail}")
    return seconds


def _append(path: Path, text: str) -> None:
    """Add a line, behind whatever a full disk or a kill has left of the last one."""
    torn = path.exists() and not ends_whole(path)
    with path.open("a") as file:
        file.write("\n" * torn + text + "\n")


def run_command(command: Sequence[str], out: TextIO, environment: Mapping[str, str]) -> Ended:
    """Run a command to its end."""
    memory, ended = 0.0, 0
    with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process:
        _running.add(process.pid)
        if _told_to_stop.is_set():  # while it was being started
            process.terminate()
        while not ended:
            # Looked at while it runs: what wait4 tells counts this process's own size, too, from before the exec.
            memory = max(memory, peak_gib(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not ended:
                time.sleep(LOOK_S)
        _running.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, usage.ru_utime + usage.ru_stime, memory)


def peak_gib(pid: int) -> float:
    """The largest resident size that a process has had; 0 where the system does not tell, or it has ended."""
    try:
        told = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^VmHWM:\s+(\d+) kB", told, re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


def machine_of(record: Mapping[str, Any], used: str = "") -> str:
    """Where a recorded command ran. A study may go on, and its tables be made, on another machine; a record from before
    this was noted does not tell, so this machine is named, and what of it was ``used``."""
    return str(record.get("hardware") or hardware(used))


def all_told(rows: Iterable[Mapping[str, Any]], key: str, between: str = ", ") -> str:
    """What the lines of a table have in a column, each once."""
    return between.join(sorted({str(row.get(key) or "unknown") for row in rows}))


def machines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The machines that the lines of a table were measured on."""
    return all_told(rows, "hardware", "; ")


def shown(job: Job) -> str:
    """The command of a job as a person would type it."""
    return shlex.join(["python", job.script, *job.arguments])


def commit() -> str:
    """The commit of this repository, with ``-dirty`` where files differ from it; ``unknown`` outside of git."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    return head.stdout.strip() + "-dirty" * bool(changed.strip())


def recorded(log_dir: Path) -> dict[str, dict[str, Any]]:
    """Of every job that was run its last record, with the seconds of all its starts together, by the clock and of
    the processor, and the memory of the start that took most; ``found`` where each start has found what it shares. What
    is left of a line that was cut is no record."""
    found: dict[str, dict[str, Any]] = {}
    path = log_dir / RECORD
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        before = found.get(line["job"], {})
        found[line["job"]] = {**line, "seconds": before.get("seconds", 0.0) + line["seconds"]}
        if "memory_gib" in before:
            found[line["job"]]["memory_gib"] = max(before["memory_gib"], line.get("memory_gib", 0.0))
        if "cpu_seconds" in line:
            found[line["job"]]["cpu_seconds"] = before.get("cpu_seconds", 0.0) + line["cpu_seconds"]
        if "found" in line:
            found[line["job"]]["found"] = before.get("found", True) and line["found"]
    return found


class Pace:
    """How much of some work is done, and how long the rest may take, by the jobs that have ended.

    A job takes as long as those of its kind (its name without the seed) have taken on average, in earlier starts of the
    tool too; where none has ended, as long as those of its script.
    """

    def __init__(self, work: Sequence[Job], log_dir: Path, side_by_side: int) -> None:
        self.side_by_side = side_by_side
        self.total = len(work)
        self.open = {job.name: job for job in work if not job.done}
        self.lengths: dict[str, list[float]] = {}
        for name, line in recorded(log_dir).items():
            if not line["exit"]:
                self._learn(name, line["command"].split()[1], line["seconds"])

    def _learn(self, name: str, script: str, seconds: float) -> None:
        for kind in (kind_of(name), script):
            self.lengths.setdefault(kind, []).append(seconds)

    def keep(self, work: Sequence[Job]) -> None:
        """Of what is open only these jobs are left: the others turned out to be the same as one of them."""
        left = {job.name for job in work}
        self.open = {name: job for name, job in self.open.items() if name in left}

    def ended(self, job: Job, seconds: float) -> str:
        """``3 of 28 done, about 12 min left``; ``seconds`` is 0 where nothing was run."""
        with _writing:
            self.open.pop(job.name, None)
            if seconds:
                self._learn(job.name, job.script, seconds)
            told = f"{self.total - len(self.open)} of {self.total} done"
            return told + (f", {left}" if (left := self.left()) else "")

    def left(self) -> str:
        """``about 12 min left``; empty where nothing is, or no job like one of the open ones has ended yet."""
        each = [self.lengths.get(kind_of(j.name)) or self.lengths.get(j.script) for j in self.open.values()]
        if not each or not all(each):
            return ""
        seconds = sum(statistics.fmean(lengths) for lengths in each if lengths) / min(self.side_by_side, len(each))
        return (
            f"about {seconds / 3600:.1f} h left" if seconds > 5400 else f"about {max(1, round(seconds / 60))} min left"
        )


def kind_of(name: str) -> str:
    """What jobs of all seeds have in common: ``seed3-ues-16`` -> ``ues-16``."""
    return re.sub(r"-?seed\d+-?", "", name)


def run_all(chains: Sequence[Sequence[Job]], log_dir: Path, jobs: int, pace: Pace | None = None) -> None:
    """Run chains of jobs, ``jobs`` chains side by side; the jobs of a chain one after another.

    Prints a line as each job ends, with how much of the work is done: of these jobs, or of those that ``pace`` knows.
    """
    told = pace or Pace([job for chain in chains for job in chain], log_dir, jobs)

    def work(chain: Sequence[Job]) -> None:
        for job in chain:
            seconds = run_job(job, log_dir)
            took = f"{seconds:.0f} s" if seconds else "there"
            print(f"{job.name}: {took} ({told.ended(job, seconds)})", flush=True)

    with _ended_together(), ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, chain) for chain in chains]:
            done.result()


@contextmanager
def _ended_together() -> Iterator[None]:
    """SIGTERM to this process goes on to its commands: one that outlives it would hold the directory of its run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        _told_to_stop.set()
        for pid in tuple(_running):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
