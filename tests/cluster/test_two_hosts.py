"""Two hosts (network namespaces joined by a cable): equal to one host, restarts, unshared disks, lost hosts."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embsearch_dist.ranks.environment import OWN_STORE
from embsearch_dist.train.faults import VARIABLE
from tests.cluster.conftest import two_hosts
from tests.cluster.training import ROOT, TORCHRUN, arguments, result

HOSTS = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host-a:29517"]
Told = tuple[dict[str, int], dict[str, str]]
SILENCE_S = 10
LONG = ["train.steps=1000000", "train.epochs=1000000", "train.save_every=5", f"dist.timeout_s={SILENCE_S}"]
ENDS_S = 45  # the silence, and what the launchers need; the machine may be busy


@pytest.fixture(scope="module")
def hosts() -> Iterator[ModuleType]:
    with two_hosts() as tool:
        yield tool


@pytest.fixture(scope="module")
def train(hosts: ModuleType, data: Path, config: Path) -> Callable[..., Told]:
    """``train(run, *options of torchrun, private, env)`` on both hosts -> exit codes and output by host."""

    def run(run: Path, *options: str, private: str = "", **env: str) -> Told:
        words = [str(ROOT / "launch" / "retrain.py"), *arguments(data, config, run)]
        command = [*TORCHRUN, *HOSTS, "--rdzv-id", run.name, *options, "--", *words]
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        both = {h: hosts.started(h, command, private if h == "b" else "", quiet) for h in hosts.HOSTS}
        told = {h: p.communicate(timeout=200)[0] for h, p in both.items()}
        return {h: p.returncode for h, p in both.items()}, told

    return run


def test_two_hosts_train_what_one_trains(train: Callable[..., Told], tmp_path: Path, one_host: dict[str, Any]) -> None:
    codes, told = train(tmp_path / "plain")
    assert codes == {"a": 0, "b": 0}, told
    assert result(tmp_path / "plain") == one_host


@pytest.mark.slow
def test_names_that_lead_to_127_0_1_1_do_not_keep_hosts_apart(
    hosts: ModuleType, train: Callable[..., Told], tmp_path: Path, one_host: dict[str, Any]
) -> None:
    hosts.up(debian=True)
    try:
        codes, told = train(tmp_path / "debian")
    finally:
        hosts.up()
    assert codes == {"a": 0, "b": 0}, told
    assert result(tmp_path / "debian") == one_host


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_on_both_hosts(
    train: Callable[..., Told], tmp_path: Path, one_host: dict[str, Any]
) -> None:
    kill = {VARIABLE: "kill rank=1 step=7 attempt=0", OWN_STORE: "1"}
    codes, told = train(tmp_path / "killed", "--max-restarts", "1", **kill)
    assert codes == {"a": 0, "b": 0}, told
    assert "continuing from" in "".join(told.values())
    assert result(tmp_path / "killed") == one_host


@pytest.mark.slow
def test_restarts_that_could_not_work_are_refused_at_start(train: Callable[..., Told], tmp_path: Path) -> None:
    codes, told = train(tmp_path / "refused", "--max-restarts", "1")
    assert all(codes.values())
    assert f"export {OWN_STORE}=1" in told["a"] + told["b"]
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_disk_of_its_own_on_one_host_is_refused_on_both(train: Callable[..., Told], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    codes, told = train(tmp_path / "disk" / "run", private=str(tmp_path / "disk"))
    assert all(codes.values())
    assert "of rank 1 on host-b is not the one of rank 0 on host-a" in told["a"] + told["b"]
    assert not list((tmp_path / "disk").rglob("step-*"))


@pytest.fixture
def anew(hosts: ModuleType) -> ModuleType:
    """Hosts that a test may break. Such tests are the last of this file."""
    hosts.up()
    return hosts


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


@pytest.mark.slow
def test_a_cut_cable_ends_both_sides(anew: ModuleType, data: Path, config: Path, tmp_path: Path) -> None:
    told = lose_one(anew, data, config, tmp_path / "cut", anew.cut)
    for host, lost in (("a", "rank 1 on host-b"), ("b", "rank 0 on host-a")):
        (line,) = lines(told[host])
        assert re.fullmatch(rf"lost {lost} after \d+ s; start the same command again to continue", line)
        assert "gloo" not in told[host]


@pytest.mark.slow
def test_a_host_that_dies_is_named(anew: ModuleType, data: Path, config: Path, tmp_path: Path) -> None:
    told = lose_one(anew, data, config, tmp_path / "dead", lambda: anew.kill("b"))
    (line,) = lines(told["a"])
    assert "rank 1 on host-b" in line and "gloo" not in told["a"]
