"""A Slurm of two nodes, jobs given to it by TorchX: equal to torchrun, ended, started again where that helps."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torchx")

from embsearch_dist.train.faults import VARIABLE
from tests.cluster.training import ROOT, arguments, result
from tests.launch.processes import TORCHX, launcher_home

LONG = ["train.steps=100000", "train.epochs=100000", "train.save_every=5"]
WAIT_S = 150
GOING_ON = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


@pytest.fixture(scope="module")
def slurm() -> Iterator[ModuleType]:
    """The tool, its Slurm up."""
    sys.path.insert(0, str(ROOT))
    tool = importlib.import_module("tools.cluster.slurm")
    if problem := tool.lacking():
        pytest.skip(f"no Slurm here: {problem}")
    tool.up()
    yield tool
    tool.down()


class Jobs:
    """Give jobs to the Slurm from ``folder``, where their logs come to lie, and ask about them."""

    def __init__(self, tool: ModuleType, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, **launcher_home(folder), **tool.environment(), "OMP_NUM_THREADS": "1"}

    def submit(self, *words: str, **env: str) -> str:
        """Start ``torchx run ... dist.ddp WORDS``; the job's number."""
        command = [*TORCHX, "run", "--scheduler", "slurm", "--workspace", "", "dist.ddp", *words]
        told = self.ask(*command, **env)
        return re.findall(r"slurm://\w+/(\d+)", told)[-1]

    def ask(self, *command: str, **env: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.env | env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job; of one that spans nodes, its first part."""
        told = self.ask("scontrol", "show", "job", "-o", job).splitlines()[0]
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def until(self, job: str, reached: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < deadline, f"{self.facts(job)}\n{self.log()}"
            time.sleep(0.1)

    def ended(self, job: str) -> str:
        """Its state when it is over. A job that is queued again would wait for two minutes; here it starts at once."""

        def over() -> bool:
            facts = self.facts(job)
            if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            return facts["JobState"] not in GOING_ON

        self.until(job, over)
        return self.facts(job)["JobState"]

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("slurm-*")))


Submit = Callable[..., tuple[Jobs, str]]
AGAIN = ("--max_retries", "1")


@pytest.fixture
def submit(slurm: ModuleType, data: Path, config: Path, tmp_path: Path) -> Submit:
    """``submit(*options of dist.ddp, overrides, **environment)`` -> the training as a job, and its number."""

    def submit(*words: str, overrides: Sequence[str] = (), **env: str) -> tuple[Jobs, str]:
        jobs = Jobs(slurm, tmp_path)
        arguments_here = arguments(data, config, jobs.folder / "run", *overrides)
        return jobs, jobs.submit(*words, "retrain.py", *arguments_here, **env)

    return submit


@pytest.mark.slow  # what torchrun does on two hosts is in the default run
def test_a_job_on_two_nodes_trains_what_torchrun_trains(submit: Submit, one_host: dict[str, Any]) -> None:
    jobs, job = submit("-j", "2x1")
    assert jobs.ended(job) == "COMPLETED", jobs.log()
    assert result(jobs.folder / "run") == one_host


@pytest.mark.slow
def test_a_job_that_was_told_to_end_is_queued_again_and_continues(submit: Submit, one_host: dict[str, Any]) -> None:
    jobs, job = submit("-j", "1x2", *AGAIN, **{VARIABLE: "term step=7"})  # its ranks end with 75
    assert jobs.ended(job) == "COMPLETED", jobs.log()
    assert jobs.facts(job)["Restarts"] == "1"
    stop = re.search(r"stopped by SIGTERM after step (\d+)", jobs.log())
    assert stop and f"step-{stop.group(1)}" in jobs.log().partition("continuing from")[2]
    assert result(jobs.folder / "run") == one_host


@pytest.mark.slow
def test_a_job_that_ends_in_an_error_is_not_queued_again(submit: Submit) -> None:
    jobs, job = submit("-j", "1x1", *AGAIN, "--max_restarts", "1", overrides=["train.batch_size=-1"])
    assert jobs.ended(job) == "FAILED"
    assert jobs.log().count("error: config key train.batch_size") == 1
    assert (jobs.facts(job)["Restarts"], "Traceback" in jobs.log()) == ("0", False)


@pytest.mark.slow
def test_a_job_goes_on_after_requeue_and_saves_when_it_is_cancelled(
    slurm: ModuleType, tmp_path: Path, data: Path, config: Path
) -> None:
    jobs, run = Jobs(slurm, tmp_path), tmp_path / "run"
    saved = run / "retrain" / "ues-8" / "checkpoints" / "retrain"
    job = jobs.submit("-j", "1x2", "retrain.py", *arguments(data, config, run, *LONG))

    def newest() -> int:
        return max((int(p.parent.name[5:]) for p in saved.glob("step-*/manifest.json")), default=0)

    jobs.until(job, newest)
    jobs.ask("scontrol", "requeue", job)
    jobs.until(job, lambda: jobs.facts(job)["Reason"] == "BeginTime")
    first = newest()
    jobs.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    jobs.until(job, lambda: newest() > first)
    assert f"step-{first}" in jobs.log().partition("continuing from")[2]
    jobs.ask(*TORCHX, "cancel", f"slurm://torchx/{job}")
    assert jobs.ended(job) == "CANCELLED"
    jobs.until(job, lambda: len(re.findall(r"stopped by SIGTERM after step \d+", jobs.log())) == 2)
    stops = re.findall(r"stopped by SIGTERM after step (\d+)", jobs.log())
    assert [first, newest()] == [int(step) for step in stops]
