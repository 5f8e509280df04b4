"""``--max-restarts``: a killed rank costs the steps since the last checkpoint; some ends are not to be repeated."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from embsearch_dist.ranks.environment import store_of_attempt
from embsearch_dist.train.faults import SAVE_POINTS, VARIABLE
from embsearch_dist.train.manifest import read_manifest
from launch import retrain
from tests.factories import command_line, recorded, write_config
from tests.launch.processes import DIST_DDP, LAUNCH, TORCHRUN, finish
from tests.ranks import run_ranks

STEPS = 20
OVERRIDES = [f"train.steps={STEPS}", "train.save_every=2", "train.patience=0"]


def arguments(data: Path, config: Path, run: Path) -> list[str]:
    return ["--config", str(config), "--allocation", "ues-8", *command_line(data, run, *OVERRIDES)]


def result(run: Path) -> dict[str, Any]:
    """The whole log, the model's worth, and a checksum of every weight and all optimizer state."""
    own = run / "retrain" / "ues-8"
    wanted = (("step", None), ("loss", None), ("step", "validation"), ("auc", "validation"), ("logloss", "validation"))
    log = [recorded(own, "retrain", key, split) for key, split in wanted]
    test = json.loads((own / "evaluation.json").read_text())
    files = read_manifest(own / "checkpoints" / "retrain" / f"step-{STEPS}")["files"]
    tensors = {name: facts for name, facts in files.items() if name.endswith(".distcp")}
    assert len(log[0]) == STEPS and len(tensors) == 2
    return {"log": log, "test": (test["auc"], test["logloss"]), "tensors": tensors}


def train(rank: int, world_size: int, words: list[str]) -> None:
    retrain.main(words)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks that nobody kills."""
    folder = tmp_path_factory.mktemp("unbroken")
    words = arguments(data, write_config(folder / "tiny.yaml"), folder / "run")
    run_ranks(train, 2, folder, words, init=False)
    return result(folder / "run")


def test_a_killed_rank_is_started_again_and_nothing_is_lost(
    data: Path, config: Path, tmp_path: Path, unbroken: dict[str, Any], start: Callable
) -> None:
    """Also where the command says to begin anew: it was this job that did."""
    pytest.importorskip("torchx")
    words = ["--max_restarts", 1, "retrain.py", *arguments(data, config, tmp_path / "run"), "--run.overwrite", "true"]
    told = finish(start(*DIST_DDP, *words, **{VARIABLE: "kill rank=1 step=9 attempt=0"}))
    assert told.count("continuing from") == 1 and "step-8" in told
    assert result(tmp_path / "run") == unbroken


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("launcher", "background"), [("torchx", False), ("torchrun", True)])
def test_kills_in_a_row_at_steps_and_in_all_phases_of_a_save(
    data: Path, config: Path, tmp_path: Path, unbroken: dict[str, Any], start: Callable, launcher: str, background: bool
) -> None:
    kills = ["rank=1 step=3", "rank=1 step=17", "rank=1 save=data step=18"]
    kills[1:1] = [f"rank=0 save={point} step={4 + 2 * i}" for i, point in enumerate(SAVE_POINTS)]
    faults = "; ".join(f"kill {place} attempt={i}" for i, place in enumerate(kills))
    words = [*arguments(data, config, tmp_path / "run"), "--train.async_save", background]
    if launcher == "torchx":
        pytest.importorskip("torchx")
        process = start(*DIST_DDP, "--max_restarts", len(kills), "retrain.py", *words, **{VARIABLE: faults})
    else:
        restarts = ["--max-restarts", len(kills), "--", LAUNCH / "retrain.py"]
        process = start(*TORCHRUN, *restarts, *words, **{VARIABLE: faults})
    told = finish(process, timeout=800)
    assert told.count("dense parameters, 2 rank(s)") == 1 + len(kills)
    assert result(tmp_path / "run") == unbroken


def test_ranks_that_were_started_again_do_not_see_what_dead_ones_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout = datetime.timedelta(seconds=10)
    shared = dist.TCPStore("localhost", 0, is_master=True, timeout=timeout)  # torchrun's
    shared.set("address of rank 0", "of a dead one")
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(shared.port), "WORLD_SIZE": "2"}
    for name, value in {**where, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    one, other = store_of_attempt(timeout), store_of_attempt(timeout)
    assert one is not None and other is not None
    assert not other.check(["address of rank 0"])
    one.set("address of rank 0", "here")
    assert other.get("address of rank 0") == b"here"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    third = store_of_attempt(timeout)
    assert third is not None and not third.check(["address of rank 0"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert store_of_attempt(timeout) is None  # the first start has the store for itself
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert store_of_attempt(timeout) is None  # so has a start with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1


WORKER = """
import os, pathlib, sys, time
from embsearch_dist.ranks.environment import attempt, end_restarts
rank = os.environ["RANK"]
print(f"attempt {attempt()} of rank {rank}", flush=True)
told = pathlib.Path(f"told-{attempt()}")
if rank == "0":
    told.touch()
    time.sleep(0.5 if sys.argv[1] == "end" else 60)  # torchrun sees the other's end first, and then ends this one
while not told.exists():
    time.sleep(0.01)
if sys.argv[1] == "end":
    end_restarts()
print(f"rank {rank} leaves by itself", flush=True)
sys.exit(2)
"""


@pytest.mark.parametrize(("words", "attempts"), [(["end"], 1), (["fail"], 2)])
def test_torchrun_can_be_told_not_to_start_the_ranks_again(
    tmp_path: Path, start: Callable, words: list[str], attempts: int
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    told = finish(start(*TORCHRUN, "--max-restarts", 1, "--", "worker.py", *words), code=1, timeout=60)
    assert [told.count(f"attempt {n} of rank 0") for n in (0, 1)] == [1, attempts - 1]
    assert [told.count(f"rank {n} leaves by itself") for n in (0, 1)] == ([1, 1] if attempts == 1 else [0, 2])


@pytest.mark.slow
def test_an_error_that_would_only_repeat_is_told_once(
    data: Path, config: Path, tmp_path: Path, start: Callable
) -> None:
    words = ["--config", config, *command_line(data, tmp_path / "run")]  # no search has left an allocation there
    told = finish(start(*TORCHRUN, "--max-restarts", 2, "--", LAUNCH / "retrain.py", *words), code=1)
    assert told.count("error: no allocation at") == 1
    assert 'retrain.py", line' not in told
