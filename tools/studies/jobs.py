"""Run many commands a few at a time, and skip those whose result is already there.

Shared by the measurement scripts of this folder: every measurement is a set of ordinary runs of the
entry scripts, so each figure can be looked at, repeated or continued by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = "jobs.jsonl"  # in the folder of the logs: what was run, how long, and at which commit
_writing = threading.Lock()


@dataclass(frozen=True)
class Job:
    """One command: a script of launch/ or tools/ with its arguments; done when ``result`` exists.

    Without a ``result`` it is always run: the script itself knows what is done. ``before`` is called first.
    """

    name: str
    script: str
    arguments: Sequence[str]
    result: Path | None
    before: Callable[[], None] | None = None


def run_job(job: Job, log_dir: Path) -> float:
    """Run one job with one thread; returns its seconds (0 when it was done before).

    Raises:
        SystemExit: the command failed; names its log.
    """
    if job.result is not None and job.result.exists():
        return 0.0
    if job.before is not None:
        job.before()
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{job.name}.log"
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    started = time.monotonic()
    with log.open("w") as out:
        command = [sys.executable, "-W", "ignore", str(ROOT / job.script), *job.arguments]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment).returncode
    seconds = time.monotonic() - started
    line = {"job": job.name, "seconds": round(seconds, 1), "exit": code, "commit": commit(), "command": shown(job)}
    with _writing, (log_dir / RECORD).open("a") as record:
        record.write(json.dumps(line) + "\n")
    if code or (job.result is not None and not job.result.exists()):
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise SystemExit(f"{job.name} failed (exit code {code}); see {log}\n{tail}")
    return seconds


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
    """Of every job that was run its last record, with the seconds of all its starts together."""
    found: dict[str, dict[str, Any]] = {}
    path = log_dir / RECORD
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        before = found.get(line["job"], {}).get("seconds", 0.0)
        found[line["job"]] = {**line, "seconds": before + line["seconds"]}
    return found


def run_all(chains: Sequence[Sequence[Job]], log_dir: Path, jobs: int) -> None:
    """Run chains of jobs, ``jobs`` chains side by side; the jobs of a chain one after another."""

    def work(chain: Sequence[Job]) -> None:
        for job in chain:
            seconds = run_job(job, log_dir)
            print(f"{job.name}: {'there' if not seconds else f'{seconds:.0f} s'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, chain) for chain in chains]:
            done.result()


def validation_logloss(metrics: Path) -> float:
    """The best one in the ``metrics.jsonl`` of a training."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return float(min(r["logloss"] for r in lines if r.get("split") == "validation"))
