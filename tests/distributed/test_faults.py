"""Two ranks in a bad night: whatever happens to one of them, both stop, skip or go on, and nothing is lost."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.train.faults import SAVE_POINTS, VARIABLE
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.signals import StoppedBySignal
from embsearch_dist.train.trainer import Trainer
from tests.factories import one_rank, open_run, prepared, rank_context, recorded, small_config, streams, whole_tables
from tests.ranks import run_ranks

STEPS = 10
BASE = [f"train.steps={STEPS}", "train.patience=0", "train.evals_per_epoch=2", "train.save_every=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


def fit(
    rank: int, world_size: int, data: str, directory: str, faults: str, *overrides: str, kind: str = "supernet"
) -> dict[str, Any]:
    """Train or go on; how it ended, and a digest of all weights as they are then."""
    config = small_config(data, directory, *BASE, *overrides)
    run = open_run(config, rank_context(rank, world_size))
    supernet = kind == "supernet"
    task = SupernetTask(run) if supernet else SubnetTask(config, Allocation.uniform(run.schema, 8), run.context)
    end = "done"
    with Monitor(directory, "fit", rank, quiet=True) as monitor, mock.patch.dict(os.environ, {VARIABLE: faults}):
        root = Path(directory, "checkpoints")
        trainer = Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root)
        try:
            trainer.fit()
        except (UserError, StoppedBySignal) as e:
            if not faults and isinstance(e, StoppedBySignal):
                raise  # somebody ends these tests
            end = str(e)
    digest = hashlib.sha256()
    tensors = whole_tables(task.model.sharded) | task.model.bare_head.state_dict()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    losses = recorded(directory, "fit", "loss") if rank == 0 and (Path(directory) / "metrics.jsonl").exists() else []
    finite = all(bool(torch.isfinite(t).all()) for t in tensors.values())
    state = {"step": trainer.progress.step, "skipped": trainer.progress.skipped, "finite": finite, "losses": losses}
    return {"end": end, "weights": digest.hexdigest(), **state}


def spoil(rank: int, path: Path) -> None:
    """Cut the end off a file of rank 1, once nobody reads it."""
    dist.barrier()
    if rank == 0:
        path.write_bytes(path.read_bytes()[:-5])
    dist.barrier()


def bad_night(rank: int, world_size: int, data: str, folder: str) -> dict[str, Any]:
    """Everything that does not end a process, one after the other."""

    def run(name: str, faults: str, *overrides: str) -> dict[str, Any]:
        return fit(rank, world_size, data, f"{folder}/{name}", faults, "dist.sharding=row_wise", *overrides)

    found = {"unbroken": run("unbroken", ""), "four": run("four", "", "train.steps=4")}
    found["signal"] = run("signal", "usr1 rank=1 step=4")
    found["after signal"] = run("signal", "")
    several = "search.sampling.subnets=4"
    found["several"] = run("several", "", several)
    found["several, signal"] = run("several, signal", "usr1 rank=1 step=5", several)
    found["several, after"] = run("several, signal", "", several)
    for optimizer in ("adam", "adagrad"):
        option = f"optim.embedding={optimizer}"
        found[f"before {optimizer}"] = run(f"before {optimizer}", "", option, "train.steps=5")
        found[f"nan {optimizer}"] = run(f"nan {optimizer}", "nan rank=1 step=5 at=gradient", option)
    found["skip"] = run("skip", "nan rank=1 step=5 at=gradient; inf rank=0 step=7", "train.skip_bad_batches=2")
    found["background"] = run("background", "", "train.async_save=true")
    full = "raise rank=1 save=data error=ENOSPC step=4"
    found["full"] = run("full", full)
    found["full in background"] = run("full in background", full, "train.async_save=true")
    rules = "; ".join(f"raise rank=0 save=manifest error=ENOSPC step={n}" for n in (2, 4, 6))
    found["stays full"] = run("stays full", rules)
    found["damage"] = run("damage", "usr1 rank=0 step=4")
    spoil(rank, next(Path(folder, "damage", "checkpoints", "step-5", "data").glob("__1_*")))
    found["after damage"] = run("damage", "")
    return found


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, data: str) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("night")
    return run_ranks(bad_night, 2, folder, data, str(folder), timeout=280)


def same_end(night: list[dict[str, Any]], name: str, other: str = "unbroken") -> None:
    for found in night:
        assert found[name]["end"] == "done"
        assert found[name]["weights"] == found[other]["weights"]
    assert night[0][name]["losses"] == night[0][other]["losses"]


def test_a_signal_to_one_rank_stops_both_after_the_same_step(night: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(night):
        name = "SIGUSR1" if rank == 1 else "a signal to another rank"
        assert found["signal"]["end"].startswith(f"stopped by {name} after step 5; ")
        assert found["signal"]["step"] == 5
    same_end(night, "after signal")


def test_several_subnets_a_step_go_on_bitwise_too(night: list[dict[str, Any]]) -> None:
    for found in night:
        assert found["several, signal"]["step"] < STEPS
        assert found["several"]["weights"] != found["unbroken"]["weights"]
    same_end(night, "several, after", "several")


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_a_bad_gradient_on_one_rank_stops_both_before_anything_is_written(
    night: list[dict[str, Any]], optimizer: str
) -> None:
    for found in night:
        end = found[f"nan {optimizer}"]["end"]
        assert end.startswith("gradient of the embeddings is not finite at step 5 on rank 1 (epoch 0, batch 5)")
        assert found[f"nan {optimizer}"]["weights"] == found[f"before {optimizer}"]["weights"]


def test_bad_batches_are_skipped_on_both_ranks(night: list[dict[str, Any]]) -> None:
    for found in night:
        assert found["skip"]["end"] == "done"
        assert (found["skip"]["skipped"], found["skip"]["finite"]) == (2, True)
        assert found["skip"]["weights"] == night[0]["skip"]["weights"] != found["unbroken"]["weights"]


@pytest.mark.parametrize("name", ["background", "full", "full in background"])
def test_saves_that_fail_or_run_beside_training_change_nothing(night: list[dict[str, Any]], name: str) -> None:
    same_end(night, name)


def test_a_disk_that_stays_full_stops_both(night: list[dict[str, Any]]) -> None:
    for found in night:
        assert "could not be written: " in found["stays full"]["end"]
        assert "(3 in a row). Free or enlarge the disk" in found["stays full"]["end"]


def test_damage_of_one_ranks_file_sends_both_back(night: list[dict[str, Any]]) -> None:
    assert night[0]["damage"]["step"] == 5
    same_end(night, "after damage")


def in_fork(fn: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """Run ``fn(0, 1, *args)`` in a fork of this process: (signal that ended it or 0, result).

    For processes without threads and without a group, as ``run_ranks(..., init=False)`` makes them: a fork is
    there at once, where a new process would import torch for seconds.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            one_rank()
            body = json.dumps(fn(0, 1, *args)).encode()
            with os.fdopen(write, "wb") as stream:
                stream.write(body)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        body = stream.read()
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "see the traceback above"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, json.loads(body) if body else None


def import_once() -> None:
    """What every fork would import for itself otherwise."""
    importlib.import_module("torch.utils.tensorboard")


def kill_in_saves(rank: int, world_size: int, data: str, folder: str) -> dict[str, Any]:
    import_once()
    found = {"unbroken": in_fork(fit, data, f"{folder}/unbroken", "")}
    for point, option in [(p, "false") for p in SAVE_POINTS] + [("data", "true"), ("manifest", "true")]:
        directory, overrides = f"{folder}/{point}-{option}", [f"train.async_save={option}"]
        killed = in_fork(fit, data, directory, f"kill save={point} step=4", *overrides)[0]
        again = in_fork(fit, data, directory, "", *overrides)
        found[f"{point} {option}"] = [killed, *again]
    return found


@pytest.mark.slow
def test_a_kill_in_any_phase_of_a_save_continues_bitwise(tmp_path: Path, data: str) -> None:
    found = run_ranks(kill_in_saves, 1, tmp_path, data, str(tmp_path), init=False, timeout=280)[0]
    unbroken = found.pop("unbroken")[1]
    assert len(unbroken["losses"]) == STEPS
    assert len(found) == len(SAVE_POINTS) + 2
    for case, (killed, ended, continued) in found.items():
        assert (killed, ended) == (signal.SIGKILL, 0), case
        assert continued == unbroken, case


def killed(rank: int, world_size: int, data: str, directory: str, faults: str) -> None:
    fit(rank, world_size, data, directory, faults, kind="subnet")


def go_on(rank: int, world_size: int, data: str, directories: list[str]) -> list[dict[str, Any]]:
    return [fit(rank, world_size, data, directory, "", kind="subnet") for directory in directories]


def test_ranks_killed_at_a_step_or_in_a_save_continue_bitwise(tmp_path: Path, data: str) -> None:
    cases = {
        "step": "kill rank=1 step=5",
        "save": "kill rank=1 save=data step=6",
    }
    for name, faults in cases.items():
        with pytest.raises(AssertionError, match=r"rank\d failed \(exit code -9\)"):
            run_ranks(killed, 2, tmp_path, data, str(tmp_path / name), faults)
        assert list((tmp_path / name / "checkpoints").glob("step-*[0-9]/manifest.json"))
    names = ["unbroken", *cases]
    unbroken, *continued = run_ranks(go_on, 2, tmp_path, data, [str(tmp_path / name) for name in names])[0]
    for found in continued:
        assert found == unbroken
    assert len(unbroken["losses"]) == STEPS
