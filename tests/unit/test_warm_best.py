"""A training that begins with an earlier model keeps that one where training on makes it no better."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from embsearch_dist.run import Run
from embsearch_dist.train.checkpoint import Checkpointer, SaveError
from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.retrain import STAGE, load_best
from embsearch_dist.train.signals import StoppedBySignal
from embsearch_dist.train.warm.start import Start
from tests.earlier import allocation_of, logits, open_run, train, two_days
from tests.factories import one_rank, recorded

MIXED = {"left": 8, "big": 4, "right": 6, "idle": 0}
HARMFUL = ("optim.embedding_lr=5", "optim.dense_lr=5", "train.steps=5", "train.evals_per_epoch=5", "train.patience=0")
"""Any step of such a training makes the model worse."""
KEEP = ("train.keep_checkpoints=2", "train.on_save_error=stop")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model worth keeping: its validation AUC is far above that of chance."""
    folder = tmp_path_factory.mktemp("days")
    run = open_run(two_days(folder)[0], folder / "old", one_rank(), "train.epochs=4", "optim.dense_lr=0.01")
    train(run, MIXED)
    assert max(recorded(run.dir, STAGE, "auc", "validation")) > 0.6
    return run


def harmful(old: Run, directory: Path, *more: str) -> Run:
    return open_run(Path(old.config.data.path), directory, one_rank(), *HARMFUL, *more)


def told(run: Run) -> dict[str, float]:
    return dict(json.loads((run.dir / "training.json").read_text()))


def test_the_start_is_kept_where_no_evaluation_is_better(
    tmp_path: Path, old: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = harmful(old, tmp_path / "new")
    result = train(run, MIXED, Start.open(old.dir))
    found = recorded(run.dir, STAGE, "auc", "validation")
    assert len(found) >= 3 and max(found[1:]) < found[0], found
    assert (told(run)["best_step"], told(run)["steps"]) == (0, 5)
    assert "whose weights are kept (step 0)" in capsys.readouterr().out
    before = json.loads((old.dir / "evaluation.json").read_text())
    assert (result["auc"], result["logloss"]) == (before["auc"], before["logloss"])
    both = [load_best(r.config, allocation_of(r, MIXED), r.context, r.dir) for r in (old, run)]
    assert torch.equal(*(logits(run, task) for task in both))


def test_a_better_evaluation_takes_its_place(tmp_path: Path, old: Run) -> None:
    run = open_run(Path(old.config.data.path), tmp_path / "new", one_rank(), "train.epochs=4", "optim.dense_lr=0.005")
    train(run, MIXED | {"left": 0}, Start.open(old.dir))
    found = recorded(run.dir, STAGE, "auc", "validation")
    assert told(run)["best_step"] > 0 and max(found[1:]) > found[0], found


def test_fresh_weights_are_no_candidate(tmp_path: Path, old: Run) -> None:
    run = harmful(old, tmp_path / "new")
    train(run, MIXED)
    assert told(run)["best_step"] > 0 and not (run.dir / "checkpoints" / STAGE / "step-0").exists()


@pytest.mark.parametrize("stop", ["term step=1", "term step=4", "raise step=0 save=data", "raise step=0 save=manifest"])
def test_stopped_it_goes_on_to_the_same_bits_and_the_start_stays(tmp_path: Path, old: Run, stop: str) -> None:
    whole, run = (harmful(old, tmp_path / n, *KEEP) for n in ("whole", "stopped"))
    train(whole, MIXED, Start.open(old.dir))
    with mock.patch.dict(os.environ, {VARIABLE: stop}), pytest.raises((StoppedBySignal, SaveError)):
        train(run, MIXED, Start.open(old.dir))
    train(run, MIXED, Start.open(old.dir))
    assert told(run)["best_step"] == 0
    root = run.dir / "checkpoints" / STAGE
    assert sorted(p.name for p in root.glob("step-*")) == ["step-0", "step-4", "step-5"]
    assert recorded(run.dir, STAGE, "auc", "validation") == recorded(whole.dir, STAGE, "auc", "validation")
    for step in (0, 5):
        tasks = []
        for r in (whole, run):
            tasks.append(load_best(r.config, allocation_of(r, MIXED), r.context, r.dir))
            place = r.dir / "checkpoints" / STAGE
            Checkpointer(place, tasks[-1].model, None, r.context, settings=tasks[-1].settings).load(
                step, optimizers=False
            )
        assert torch.equal(*(logits(run, task) for task in tasks))


def test_a_start_that_could_not_be_saved_is_not_the_best(tmp_path: Path, old: Run) -> None:
    run = harmful(old, tmp_path / "new")
    with mock.patch.dict(os.environ, {VARIABLE: "raise step=0 save=data error=ENOSPC"}):
        train(run, MIXED, Start.open(old.dir))
    root = run.dir / "checkpoints" / STAGE
    assert told(run)["best_step"] > 0 and not (root / "step-0").exists()
    assert json.loads((root / "best.json").read_text())["step"] == told(run)["best_step"]
