"""Two hosts (network namespaces joined by a cable): equal to one host, restarts, and disks that are not shared."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embsearch_dist.ranks.environment import OWN_STORE
from embsearch_dist.train.faults import VARIABLE
from tests.cluster.training import ROOT, TORCHRUN, arguments, result

HOSTS = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host-a:29517"]
Told = tuple[dict[str, int], dict[str, str]]


@pytest.fixture(scope="module")
def hosts() -> Iterator[ModuleType]:
    """The tool, its hosts up."""
    sys.path.insert(0, str(ROOT))
    tool = importlib.import_module("tools.cluster.two_hosts")
    if problem := tool.lacking():
        pytest.skip(f"no two hosts here: {problem}")
    tool.up()
    yield tool
    tool.down()


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


def test_a_rank_that_is_killed_is_started_again_on_both_hosts(
    train: Callable[..., Told], tmp_path: Path, one_host: dict[str, Any]
) -> None:
    kill = {VARIABLE: "kill rank=1 step=7 attempt=0", OWN_STORE: "1"}
    codes, told = train(tmp_path / "killed", "--max-restarts", "1", **kill)
    assert codes == {"a": 0, "b": 0}, told
    assert "continuing from" in "".join(told.values())
    assert result(tmp_path / "killed") == one_host


def test_restarts_that_could_not_work_are_refused_at_start(train: Callable[..., Told], tmp_path: Path) -> None:
    codes, told = train(tmp_path / "refused", "--max-restarts", "1")
    assert all(codes.values())
    assert f"export {OWN_STORE}=1" in told["a"] + told["b"]
    assert not (tmp_path / "refused").exists()


def test_a_disk_of_its_own_on_one_host_is_refused_on_both(train: Callable[..., Told], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    codes, told = train(tmp_path / "disk" / "run", private=str(tmp_path / "disk"))
    assert all(codes.values())
    assert "of rank 1 on host-b is not the one of rank 0 on host-a" in told["a"] + told["b"]
    assert not list((tmp_path / "disk").rglob("step-*"))
