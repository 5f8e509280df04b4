"""``steps`` below what the epochs would take: warm-up and pretraining are shares of the training that really comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adafs.method import ControllerStage
from embsearch_dist.methods.adass.supernet_stage import SupernetStage, SupernetTask
from embsearch_dist.methods.autodim.method import MixtureStage
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.methods.ihas.gates_stage import GateStage
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run
from embsearch_dist.train.trainer import Trainer
from tests.factories import one_rank, open_run, prepared, small_config

GATED = {"ihas": GateStage, "adafs": ControllerStage}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def trainer_of(stage: Stage, run: Run, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """The trainer that a stage makes, before its first step."""
    made: list[Trainer] = []
    monkeypatch.setattr(Trainer, "fit", lambda self: made.append(self))
    stage.run(run)
    return made[0]


def gated_run(data: Path, directory: Path, method: str, *overrides: str) -> Run:
    """12 steps an epoch, of which the first half pretrains."""
    own = ["search.width=4", "search.training.batch_size=256", "search.training.epochs=2", "search.outer.every=3"]
    return open_run(small_config(data, directory, *own, *overrides, method=method), one_rank())


@pytest.mark.parametrize(("steps", "expected"), [(0, 24), (7, 7), (24, 24), (100, 24)])
def test_a_training_takes_its_epochs_or_its_steps_whatever_ends_first(steps: int, expected: int) -> None:
    assert TrainConfig(epochs=2, steps=steps).total_steps(batches_per_epoch=12) == expected


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(UserError, match=r"search\.supernet\.steps: must be >= 0, got -1"):
        small_config("no-data", "no-run", "search.supernet.steps=-1")


@pytest.mark.parametrize(("steps", "warmup"), [(0, 12), (8, 4)])
def test_the_warm_up_of_a_supernet_is_a_share_of_the_steps_it_trains(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, warmup: int
) -> None:
    overrides = [f"search.supernet.steps={steps}", "search.sampling.warmup=0.5"]
    trainer = trainer_of(SupernetStage(), open_run(small_config(data, tmp_path, *overrides), one_rank()), monkeypatch)
    assert trainer.total == (steps or 24)
    assert isinstance(trainer.task, SupernetTask)
    assert trainer.task.sampler.warmup_steps == warmup


@pytest.mark.parametrize("method", GATED)
def test_pretraining_that_outlasts_the_bound_is_an_error_that_names_it(data: Path, tmp_path: Path, method: str) -> None:
    run = gated_run(data, tmp_path, method, "search.outer.pretrain_epochs=0.5", "search.training.steps=6")
    told = r"search\.training\.steps: 6 steps end before the 6 .*pretrain_epochs: 0\.5, at 12 steps an epoch"
    with pytest.raises(UserError, match=told):
        GATED[method]().run(run)


@pytest.mark.parametrize("method", GATED)
def test_a_gated_task_knows_how_many_steps_come(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    run = gated_run(data, tmp_path, method, "search.outer.pretrain_epochs=0.5", "search.training.steps=9")
    trainer = trainer_of(GATED[method](), run, monkeypatch)
    assert isinstance(trainer.task, GatedTask)
    assert (trainer.task.warmup, trainer.task.total, trainer.total) == (6, 9, 9)


@pytest.mark.parametrize("method", [*GATED, "autodim"])
def test_a_training_too_short_for_a_held_out_batch_is_refused(data: Path, tmp_path: Path, method: str) -> None:
    """What is selected is learned from held-out batches alone: without one a search would end with what it began with,
    as if it had found that."""
    own = ["search.width=4"] if method in GATED else ["search.candidates=[2,4]"]
    words = [*own, "search.training.batch_size=256", "search.outer.every=7"]
    words += ["search.outer.pretrain_epochs=0.5", "search.training.epochs=1"]
    run = open_run(small_config(data, tmp_path, *words, method=method), one_rank())
    told = r"search\.outer\.every: a held-out batch is due behind each 7 ordinary ones, and the training has 6 behind"
    with pytest.raises(UserError, match=told):
        (GATED | {"autodim": MixtureStage})[method]().run(run)
