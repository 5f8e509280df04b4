"""Two hosts (network namespaces joined by a cable): equal to one host, restarts, and disks that are not shared."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embsearch_dist.ranks.environment import OWN_STORE
from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.manifest import read_manifest
from tests.factories import command_line, prepared, write_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
OVERRIDES = [f"train.steps={STEPS}", "train.save_every=4", "train.patience=0", "dist.timeout_s=60"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture(scope="module")
def train(hosts: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Told]:
    """``train(run, *options of torchrun, private, env)`` on both hosts -> exit codes and output by host."""
    config = write_config(tmp_path_factory.mktemp("config") / "tiny.yaml")

    def run(run: Path, *options: str, private: str = "", **env: str) -> Told:
        words = [str(ROOT / "launch" / "retrain.py"), "--config", str(config), "--allocation", "ues-8"]
        words += command_line(data, run, *OVERRIDES)
        command = [*TORCHRUN, *HOSTS, "--rdzv-id", run.name, *options, "--", *map(str, words)]
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        both = {h: hosts.started(h, command, private if h == "b" else "", quiet) for h in hosts.HOSTS}
        told = {h: p.communicate(timeout=200)[0] for h, p in both.items()}
        return {h: p.returncode for h, p in both.items()}, told

    return run


def result(run: Path) -> dict[str, Any]:
    """The model's worth, and a checksum of every weight and all optimizer state."""
    own = run / "retrain" / "ues-8"
    files = read_manifest(own / "checkpoints" / "retrain" / f"step-{STEPS}")["files"]
    test = json.loads((own / "evaluation.json").read_text())
    tensors = {name: facts for name, facts in files.items() if name.endswith(".distcp")}
    assert len(tensors) == 2
    return {"test": (test["auc"], test["logloss"]), "tensors": tensors}


@pytest.fixture(scope="module")
def one_host(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks on one host."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder / "tiny.yaml")
    words = ["--config", config, "--allocation", "ues-8", *command_line(data, folder / "run", *OVERRIDES)]
    start = [*TORCHRUN, "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", "--"]
    command = [*start, str(ROOT / "launch" / "retrain.py"), *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=200)
    return result(folder / "run")


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
