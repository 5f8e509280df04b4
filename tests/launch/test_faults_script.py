"""The entry scripts in a bad night: told to end they save and say so, killed they go on where they were."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.stages import run_stages
from embsearch_dist.schema import Schema
from embsearch_dist.train.faults import SAVE_POINTS, VARIABLE
from embsearch_dist.train.manifest import verify
from tests.distributed.test_faults import fit, import_once, in_fork
from tests.factories import command_line, one_rank, open_run, recorded, small_config
from tests.launch.processes import DIST_DDP, LAUNCH, TORCHRUN, finish, wait_for_checkpoint
from tests.ranks import run_ranks

# Long enough that it is still training when it is told to end.
LONG = ["search.supernet.epochs=200", "search.supernet.save_every=5"]


@pytest.mark.slow
def test_a_search_told_to_end_saves_and_a_killed_retraining_goes_on(
    data: Path, config: Path, tmp_path: Path, run_script: Callable
) -> None:
    run = tmp_path / "run"
    words = ["search.py", "--config", config, *command_line(data, run)]
    stopped = run_script(*words, env={VARIABLE: "term step=11 stage=supernet"}, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by SIGTERM after step 12; " in stopped.stderr
    assert "give the same command again to continue" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert json.loads((run / "stages" / "supernet.json").read_text())["state"] == "running"

    # How a run is kept safe may change between two starts of it.
    again = run_script(*words, "--search.supernet.keep_checkpoints", 3)
    assert "continuing from" in again.stdout
    straight = open_run(small_config(data, tmp_path / "straight"), one_rank())
    run_stages(METHODS["adass"](), straight)
    found = [Allocation.load(d / "allocation.json", Schema.load(data)) for d in (run, straight.dir)]
    assert found[0] == found[1]
    assert recorded(run, "supernet", "loss") == recorded(straight.dir, "supernet", "loss")

    words = ["retrain.py", "--run", run, "--allocation", "ues-8"]
    killed = run_script(*words, env={VARIABLE: "kill step=14 stage=retrain"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    again = run_script(*words, "--train.save_every", 5)
    assert "continuing from" in again.stdout and "step-12" in again.stdout
    assert recorded(run / "retrain" / "ues-8", "retrain", "step", None) == list(range(1, 25))


def newest(run: Path) -> Path:
    return max((run / "checkpoints" / "supernet").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


@pytest.mark.slow  # what the ranks do then is tested without a launcher, in tests/distributed/test_faults.py
def test_torchrun_told_to_end_leaves_a_whole_checkpoint_of_one_step(
    data: Path, config: Path, tmp_path: Path, start: Callable
) -> None:
    """Also when it may start the ranks again: this end is none to be repeated."""
    run = tmp_path / "run"
    words = ["--config", config, *command_line(data, run, *LONG)]
    process = start(*TORCHRUN, "--max-restarts", 2, "--", LAUNCH / "search.py", *words)
    wait_for_checkpoint(process, run)
    process.send_signal(signal.SIGTERM)  # as a scheduler does; torchrun passes it on to the ranks
    told = finish(process, code=None)
    assert f"stopped by SIGTERM after step {newest(run).name.removeprefix('step-')}; " in told
    assert told.count("give the same command again") == 1
    verify(newest(run))


@pytest.mark.slow
def test_torchx_told_to_end_goes_on(data: Path, config: Path, tmp_path: Path, start: Callable) -> None:
    pytest.importorskip("torchx")
    run = tmp_path / "run"
    # The ranks may be started again, but not by themselves: they were told to end.
    words = [*DIST_DDP, "--max_restarts", 1, "search.py", "--config", config, *command_line(data, run)]
    told = finish(start(*words, **{VARIABLE: "usr1 rank=1 step=8 stage=supernet"}), code=None)
    assert "stopped by a signal to another rank after step 9" in told and "continuing from" not in told
    verify(newest(run))
    told = finish(start(*words))
    assert "continuing from" in told
    assert len(recorded(run, "supernet", "loss")) == 24


KILLS = 50
TINY = ["train.steps=48", "train.epochs=4", "train.evals_per_epoch=3", "model.norm=field"]


def train_tiny(rank: int, world_size: int, data: str, directory: str, faults: str, seconds: float) -> dict[str, Any]:
    """Train or go on; with ``seconds`` this process is killed that long after it began."""
    if seconds:  # nobody handles the alarm, so the kernel ends the process wherever it is
        signal.setitimer(signal.ITIMER_REAL, seconds)
    return fit(rank, world_size, data, directory, faults, *TINY, f"train.async_save={'async' in directory}")


def kill_at_random(rank: int, world_size: int, data: str, folder: str) -> dict[str, int]:
    """At a step, inside a save, or at any moment; every other run saves in the background."""
    import_once()
    dice = random.Random(0)
    unbroken = in_fork(train_tiny, data, f"{folder}/unbroken", "", 0.0)[1]
    assert len(unbroken["losses"]) == 48
    found = {"kills": 0, "runs": 0}
    while found["kills"] < KILLS:
        found["runs"] += 1
        directory = Path(folder, f"{'async' if found['runs'] % 2 else 'run'}-{found['runs']}")
        ended = 1
        while ended:
            saved = [p.name.removeprefix("step-") for p in directory.glob("checkpoints/step-*")]
            step = max((int(n) for n in saved if n.isdigit()), default=0) + dice.randint(1, 5)
            kind = dice.choice(["step", "save", "moment"])
            faults = {
                "step": f"kill step={step}",
                "save": f"kill save={dice.choice(SAVE_POINTS)} step={step // 2 * 2 + 2}",
            }
            seconds = dice.uniform(0.02, 1.0) if kind == "moment" else 0.0
            ended, result = in_fork(train_tiny, data, str(directory), faults.get(kind, ""), seconds)
            found["kills"] += ended != 0
        assert result == unbroken, directory
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_random_kills_change_no_bit(data: Path, tmp_path: Path) -> None:
    found = run_ranks(kill_at_random, 1, tmp_path, str(data), str(tmp_path), init=False, timeout=3500)[0]
    assert found["kills"] >= KILLS
    print(f"{found['kills']} kills over {found['runs']} runs of 48 steps: each ended bitwise like the unbroken one")
