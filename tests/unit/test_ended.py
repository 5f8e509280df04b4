"""A training that was stopped is no model yet: nobody measures it or exports it for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist import api
from embsearch_dist.errors import UserError
from embsearch_dist.methods.collected import collect_single
from embsearch_dist.run import Run
from embsearch_dist.train.trainer import Trainer
from tests.earlier import open_run, train, two_days
from tests.factories import one_rank

NOT_YET = r"run: its training has not ended\. Give its command again, then this one"


class Killed(BaseException):
    pass


def ready(folder: Path) -> Run:
    return open_run(two_days(folder)[0], folder / "run", one_rank(), "train.epochs=2", "train.steps=0")


def test_what_an_earlier_epoch_has_left_is_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, whole = ready(tmp_path), Trainer._evaluate_and_save

    def killed(trainer: Trainer) -> None:
        whole(trainer)
        raise Killed

    monkeypatch.setattr(Trainer, "_evaluate_and_save", killed)
    with pytest.raises(Killed):
        train(run, 4)
    assert (run.dir / "checkpoints" / "retrain" / "best.json").exists()
    with pytest.raises(UserError, match=NOT_YET):
        collect_single(run, run.dir)
    with pytest.raises(UserError, match=NOT_YET):
        api.evaluate(run.dir)
    assert not (run.dir / "evaluation.json").exists()
    monkeypatch.undo()
    done = train(run, 4)
    assert api.evaluate(run.dir)["auc"] == done["auc"]


def test_nothing_that_was_begun_is_told_as_such(tmp_path: Path) -> None:
    run = ready(tmp_path)
    train(run, 4)
    (run.dir / "training.json").unlink()
    (run.dir / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no trained model; train it first"):
        collect_single(run, run.dir)
