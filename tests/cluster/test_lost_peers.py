"""A host that is gone, by a cut cable or with all that ran on it: both sides end, and say so in one line each."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.cluster.training import ROOT, TORCHRUN, arguments

HOSTS = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host-a:29519"]
SILENCE_S = 10
LONG = ["train.steps=1000000", "train.epochs=1000000", "train.save_every=5", f"dist.timeout_s={SILENCE_S}"]
ENDS_S = 45  # the silence, and what the launchers need; the machine may be busy


@pytest.fixture
def hosts() -> Iterator[ModuleType]:
    """The tool, its hosts up; of each test its own, because it breaks them."""
    sys.path.insert(0, str(ROOT))
    tool = importlib.import_module("tools.cluster.two_hosts")
    if problem := tool.lacking():
        pytest.skip(f"no two hosts here: {problem}")
    tool.up()
    yield tool
    tool.down()


def lose_one(hosts: ModuleType, data: Path, config: Path, run: Path, lose: Callable[[], None]) -> dict[str, str]:
    """Train on both hosts, lose one in the middle -> what they have printed."""
    words = [str(ROOT / "launch" / "retrain.py"), *arguments(data, config, run, *LONG)]
    command = [*TORCHRUN, *HOSTS, "--rdzv-id", run.name, "--", *words]
    both = {h: hosts.started(h, command, "", {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}) for h in hosts.HOSTS}
    deadline = time.monotonic() + 120
    while not list(run.rglob("step-*/manifest.json")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in both.values()), ends(both, 1)
        time.sleep(0.1)
    lose()
    return ends(both, ENDS_S)


def ends(both: dict[str, subprocess.Popen[str]], within: float) -> dict[str, str]:
    try:
        return {h: p.communicate(timeout=within)[0] for h, p in both.items()}
    except subprocess.TimeoutExpired:
        for process in both.values():
            process.kill()
        raise


def lines(told: str) -> list[str]:
    return re.findall(r"lost .*", told)


def test_a_cut_cable_ends_both_sides(hosts: ModuleType, data: Path, config: Path, tmp_path: Path) -> None:
    told = lose_one(hosts, data, config, tmp_path / "cut", hosts.cut)
    for host, lost in (("a", "rank 1 on host-b"), ("b", "rank 0 on host-a")):
        (line,) = lines(told[host])
        assert re.fullmatch(rf"lost {lost} after \d+ s; start the same command again to continue", line)
        assert "gloo" not in told[host]


@pytest.mark.slow
def test_a_host_that_dies_is_named(hosts: ModuleType, data: Path, config: Path, tmp_path: Path) -> None:
    told = lose_one(hosts, data, config, tmp_path / "dead", lambda: hosts.kill("b"))
    (line,) = lines(told["a"])
    assert "rank 1 on host-b" in line and "gloo" not in told["a"]
