"""The training loop: a continued run is the unbroken one, the best checkpoint comes back, and it learns."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.position import Progress
from embsearch_dist.train.retrain import SubnetTask, load_best, retrain
from embsearch_dist.train.signals import StoppedBySignal
from embsearch_dist.train.trainer import Trainer
from tests.factories import (
    one_rank,
    open_run,
    optimizer_state,
    prepared,
    recorded,
    small_config,
    streams,
    whole_tables,
)

OPTIMIZERS = ["adam", "adagrad", "rowwise_adagrad", "sgd"]
WIDTHS = {"left": 6, "big": 2, "right": 4, "idle": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


class Stopped(Exception):
    """Raised in place of a kill."""


@dataclass
class Fit:
    """A training that has ended, in whatever way."""

    trainer: Trainer
    directory: Path

    @property
    def losses(self) -> list[float]:
        return recorded(self.directory, "fit", "loss")

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights and all optimizer state."""
        model = self.trainer.task.model
        found = {f"table {n}": t for n, t in whole_tables(model.sharded).items()}
        found |= {f"head {n}": t for n, t in model.bare_head.state_dict().items()}
        for i, parameter in enumerate(self.trainer.optimizer.param_groups[0]["params"]):
            values = self.trainer.optimizer.state.get(parameter, {})
            if values.get("step", 1):  # a parameter that never had a gradient has no state, or an empty one
                found |= {f"head optimizer {i} {k}": v for k, v in values.items() if v is not None}
        found |= optimizer_state(model.sharded)
        return {k: v.detach().clone() for k, v in found.items()}


def fit(
    data: Path,
    directory: Path,
    *overrides: str,
    stop_at: int = 0,
    nan_at: int = -1,
    kind: str = "subnet",
    faults: str = "",
    quiet: bool = True,
) -> Fit:
    """Train (or go on training) in ``directory``; leaves at ``stop_at`` as a killed process would."""
    config = small_config(data, directory, *overrides)
    run = open_run(config, one_rank())
    base: type = SubnetTask if kind == "subnet" else SupernetTask

    class Task(base):  # type: ignore[misc]
        def after_step(self, step: int, monitor: Monitor) -> None:
            super().after_step(step, monitor)
            if step == stop_at:
                raise Stopped

        def loss(self, batch: Batch, step: int) -> torch.Tensor:
            loss = super().loss(batch, step)
            return loss * float("nan") if step == nan_at else loss

    task = Task(config, Allocation(run.schema, WIDTHS), run.context) if kind == "subnet" else Task(run)
    with Monitor(directory, "fit", quiet=quiet) as monitor, mock.patch.dict(os.environ, {VARIABLE: faults}):
        root = directory / "checkpoints" / "fit"
        trainer = Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root)
        try:
            trainer.fit()
        except Stopped:
            assert stop_at
        except StoppedBySignal:
            if not faults:
                raise  # somebody ends these tests
    return Fit(trainer, directory)


def assert_same(one: Fit, other: Fit) -> None:
    first, second = one.tensors(), other.tensors()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_same_records(one: Fit, other: Fit) -> None:
    """Every line of the log and every evaluation."""
    for key, split in (("loss", None), ("step", None), ("auc", "validation"), ("step", "validation")):
        assert recorded(one.directory, "fit", key, split) == recorded(other.directory, "fit", key, split), (key, split)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_continued_run_equals_the_unbroken_one_bitwise(data: Path, tmp_path: Path, optimizer: str) -> None:
    overrides = [f"optim.embedding={optimizer}", "train.evals_per_epoch=3", "train.patience=0", "model.dropout=0.2"]
    unbroken = fit(data, tmp_path / "unbroken", *overrides)
    assert unbroken.trainer.progress.step == 24
    fit(data, tmp_path / "broken", *overrides, stop_at=18)  # two steps past the last checkpoint
    continued = fit(data, tmp_path / "broken", *overrides)
    assert_same(continued, unbroken)
    assert continued.losses == unbroken.losses
    assert len(unbroken.losses) == 24
    assert recorded(tmp_path / "broken", "fit", "auc", "validation") == recorded(
        tmp_path / "unbroken", "fit", "auc", "validation"
    )


@pytest.mark.parametrize("stop_at", [1, 12, 13])
def test_it_does_not_matter_when_a_run_is_stopped(data: Path, tmp_path: Path, stop_at: int) -> None:
    """Before the first checkpoint, right at the end of an epoch, and right after it."""
    unbroken = fit(data, tmp_path / "unbroken", "train.patience=0")
    fit(data, tmp_path / "broken", "train.patience=0", stop_at=stop_at)
    continued = fit(data, tmp_path / "broken", "train.patience=0")
    assert_same(continued, unbroken)
    assert continued.losses == unbroken.losses


@pytest.mark.parametrize("model", [["model.norm=field"], ["model.transform=mlp", "model.first_order=value"]])
def test_a_continued_supernet_draws_and_samples_as_the_unbroken_one(
    data: Path, tmp_path: Path, model: list[str]
) -> None:
    overrides = ["train.evals_per_epoch=3", "train.patience=0", *model]
    unbroken = fit(data, tmp_path / "unbroken", *overrides, kind="supernet")
    fit(data, tmp_path / "broken", *overrides, kind="supernet", stop_at=18)
    continued = fit(data, tmp_path / "broken", *overrides, kind="supernet")
    assert_same(continued, unbroken)
    assert continued.trainer.task.state() == unbroken.trainer.task.state()
    p_e = torch.tensor(unbroken.trainer.task.state()["sampler"]["logits_e"])
    assert p_e.unique().numel() > 1  # it did adapt


def test_more_steps_continue_a_run_that_ended(data: Path, tmp_path: Path) -> None:
    fit(data, tmp_path / "more", "train.steps=5", "train.patience=0")
    more = fit(data, tmp_path / "more", "train.steps=9", "train.patience=0")
    straight = fit(data, tmp_path / "straight", "train.steps=9", "train.patience=0")
    assert_same(more, straight)
    assert more.losses == straight.losses
    assert len(more.losses) == 9


def test_a_finished_run_is_not_trained_again(data: Path, tmp_path: Path) -> None:
    first = fit(data, tmp_path)
    again = fit(data, tmp_path)
    assert_same(first, again)
    assert len(again.losses) == 24


def test_the_best_checkpoint_is_kept_and_comes_back(data: Path, tmp_path: Path) -> None:
    # A high learning rate overfits soon, so that the best of eight evaluations is not the last.
    overrides = ["train.evals_per_epoch=4", "train.patience=0", "optim.dense_lr=0.1", "model.transform=width"]
    found = fit(data, tmp_path, *overrides)
    curve = recorded(tmp_path, "fit", "auc", "validation")
    steps = recorded(tmp_path, "fit", "step", "validation")
    best = max(range(len(curve)), key=lambda i: curve[i])
    assert best < len(curve) - 2
    assert found.trainer.progress.best_step == steps[best] == found.trainer.checkpointer.best()
    assert found.trainer.checkpointer.steps() == [steps[best], *steps[-2:]]
    found.trainer.restore_best()
    task = found.trainer.task
    task.model.eval()
    config = small_config(data, tmp_path, "model.transform=width")
    again = evaluate(task.predict, streams(open_run(config, one_rank()))[1].epoch(0), one_rank())
    assert again["auc"] == curve[best]


def test_logloss_may_decide_what_is_best(data: Path, tmp_path: Path) -> None:
    found = fit(data, tmp_path, "train.evals_per_epoch=4", "train.patience=0", "train.metric=logloss")
    curve = recorded(tmp_path, "fit", "logloss", "validation")
    steps = recorded(tmp_path, "fit", "step", "validation")
    assert found.trainer.checkpointer.best() == steps[curve.index(min(curve))]


@pytest.fixture
def constant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Predictions that never get better: the AUC stays at one half."""
    monkeypatch.setattr(SubnetTask, "predict", lambda self, batch: torch.zeros(batch.size))
    yield


def test_training_stops_without_a_better_metric(data: Path, tmp_path: Path, constant: None) -> None:
    found = fit(data, tmp_path, "train.evals_per_epoch=4", "train.patience=2")
    assert found.trainer.progress.step == 9  # evaluations after 3, 6 and 9 steps
    assert found.trainer.progress.stopped == "no better auc in 2 evaluations"
    assert found.trainer.checkpointer.best() == 3
    again = fit(data, tmp_path, "train.evals_per_epoch=4", "train.patience=2")
    assert again.trainer.progress.step == 9  # a stopped run stays stopped


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
def test_the_learning_rates_are_cut_and_a_continued_run_knows(
    data: Path, tmp_path: Path, constant: None, optimizer: str
) -> None:
    overrides = [
        f"optim.embedding={optimizer}",
        "train.evals_per_epoch=2",
        "train.patience=0",
        "train.lr_cut=0.5",
    ]
    unbroken = fit(data, tmp_path / "unbroken", *overrides)
    lr = recorded(tmp_path / "unbroken", "fit", "lr")
    assert lr[:12] == [0.01] * 12  # the first evaluation (step 6) is the best so far
    assert lr[12:18] == [0.005] * 6
    assert lr[18:] == [0.0025] * 6
    fit(data, tmp_path / "broken", *overrides, stop_at=20)
    assert_same(fit(data, tmp_path / "broken", *overrides), unbroken)


def test_the_loss_falls_and_the_model_learns_the_planted_pair(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, "train.epochs=6", "model.hidden=[16]")
    run = open_run(config, one_rank())
    allocation = Allocation(run.schema, {"left": 4, "big": 0, "right": 4, "idle": 0})
    retrain(config, allocation, *streams(run), run.context, tmp_path, quiet=True)
    curve = recorded(tmp_path, "retrain", "auc", "validation")
    assert max(curve) > 0.75
    assert json.loads((tmp_path / "training.json").read_text())["steps"] > 12
    # What a later process loads is the best checkpoint, not the last.
    task = load_best(config, allocation, run.context, tmp_path)
    task.model.eval()
    assert evaluate(task.predict, streams(run)[1].epoch(0), run.context)["auc"] == max(curve)


def test_a_directory_without_training_is_refused(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path)
    run = open_run(config, one_rank())
    with pytest.raises(UserError, match="holds no trained model.*launch/retrain.py"):
        load_best(config, Allocation(run.schema, WIDTHS), run.context, tmp_path)


@pytest.mark.parametrize("first_order", ["embedding", "value"])
def test_l2_is_the_mean_squared_size_of_the_looked_up_rows(data: Path, tmp_path: Path, first_order: str) -> None:
    """With a first-order weight per value, that one too; in a found model and in a subnet of the supernet."""
    run, extra = open_run(small_config(data, tmp_path), one_rank()), int(first_order == "value")
    batch = next(iter(streams(run)[0].epoch(0)))
    losses: dict[str, list[float]] = {"subnet": [], "supernet": []}
    for l2 in (0.0, 0.5):
        settings = [f"optim.embedding_l2={l2}", "model.init_std=0.3", f"model.first_order={first_order}"]
        config = small_config(data, tmp_path, *settings)
        task = SubnetTask(config, Allocation(run.schema, WIDTHS), run.context)
        losses["subnet"].append(float(task.loss(batch, 0).detach()))
        whole = SupernetTask(open_run(config, one_rank()))
        losses["supernet"].append(float(whole.loss(batch, 0).detach()))
    choice, keep = whole.sampler.draw(0, 0)
    read = [whole.model.tables.columns[j] for j in choice.tolist()]
    tables = whole_tables(whole.model.sharded)
    expected = 0.0
    for name, (start, stop), kept in zip(run.schema.names, read, keep.tolist(), strict=True):
        rows = tables[name][batch.sparse[name].values().long()]
        if kept and stop:
            expected += float(rows[:, start:stop].square().sum() + rows[:, 8 : 8 + extra].square().sum())
    assert losses["supernet"][1] - losses["supernet"][0] == pytest.approx(0.5 * expected / batch.size, rel=1e-4)
    tables = whole_tables(task.model.sharded)
    rows = [tables[n][batch.sparse[n].values().long()][:, : WIDTHS[n] + extra] for n in ("left", "big", "right")]
    expected = 0.5 * sum(float(r.square().sum()) for r in rows) / batch.size
    assert losses["subnet"][1] - losses["subnet"][0] == pytest.approx(expected, rel=1e-4)


def test_a_step_moves_the_value_weights_of_the_fields_that_it_keeps(data: Path, tmp_path: Path) -> None:
    """And no other column of the supernet's tables, under Adam as it starts out; width 0 drops both."""
    config = small_config(data, tmp_path, "model.first_order=value", "train.steps=1", "train.patience=0")
    run = open_run(config, one_rank())
    task = SupernetTask(run)
    choice, keep = torch.tensor([2, 1, 0, 3]), torch.tensor([True, True, True, False])
    before = whole_tables(task.model.sharded)
    batch = next(iter(streams(run)[0].epoch(0)))
    task.model(batch, choice, keep)[0].square().sum().backward()
    task.model.sharded.step()
    moved = {n: (whole_tables(task.model.sharded)[n] != before[n]).any(0) for n in run.schema.names}
    widths = [4, 2, 0, 0]  # of the candidates 0, 2, 4, 8; the last field is not kept
    for name, width in zip(run.schema.names, widths, strict=True):
        assert moved[name].nonzero().flatten().tolist() == ([*range(width), 8] if width else [])


def test_weights_of_another_transform_are_refused(data: Path, tmp_path: Path) -> None:
    """They would be read as another model; so would those of a version that had learned maps alone."""
    settings = ["train.epochs=1", "model.transform=width"]
    run = open_run(small_config(data, tmp_path, *settings), one_rank())
    retrain(run.config, Allocation(run.schema, WIDTHS), *streams(run), run.context, tmp_path, quiet=True)
    for other in (["model.transform=identity"], ["model.transform=width", "model.first_order=value"]):
        config = small_config(data, tmp_path, "train.epochs=1", *other)
        with pytest.raises(UserError, match=r"model\.(transform|first_order)"):
            load_best(config, Allocation(run.schema, WIDTHS), run.context, tmp_path)
        with pytest.raises(UserError, match="was 'width', now 'identity'|was 'embedding', now 'value'"):
            retrain(config, Allocation(run.schema, WIDTHS), *streams(run), run.context, tmp_path, quiet=True)


def test_of_equal_metrics_the_lower_logloss_is_better() -> None:
    def better(logloss: float | None, metric: float, found: float) -> bool:
        return Progress(step=2, best=0.7, best_logloss=logloss, best_step=1).count(metric, found)

    assert better(0.5, 0.7, 0.4) and not better(0.5, 0.7, 0.6) and not better(0.5, 0.7, 0.5)
    assert not better(None, 0.7, 0.1)  # of an older version: equal is not better
    assert better(None, 0.71, 9.0) and not better(0.5, math.nan, 0.1)
    assert not better(0.5, 0.9, math.nan) and not better(0.5, 0.9, math.inf)


def test_the_start_may_be_the_best_but_patience_counts_from_the_first_evaluation_after_it() -> None:
    p = Progress()
    told = []
    for step, auc in enumerate([0.8, 0.6, 0.7, 0.65, 0.69, 0.9]):
        p.step = step
        told.append((p.count(auc, 0.5), p.bad_evals, p.best_step))
    assert told == [(True, 0, 0), (False, 0, 0), (False, 0, 0), (False, 1, 0), (False, 2, 0), (True, 0, 5)]


def test_a_checkpoint_of_before_says_that_there_is_no_best_by_step_0() -> None:
    assert Progress(step=7).best_step is None and Progress(step=7, best_step=0).best_step is None
    old = Progress(step=7, best=0.7, best_logloss=0.5, best_step=5)
    assert old.peak == [0.7, -0.5] and Progress(**vars(old)) == old
    assert Progress(best=0.7, best_logloss=0.5, best_step=0).best_step == 0


def test_every_evaluation_records_calibration_and_on_request_auc_by_group(data: Path, tmp_path: Path) -> None:
    found = fit(data, tmp_path / "grouped", "train.epochs=1", "train.group=left")
    (ne,), (calibration,) = (recorded(found.directory, "fit", k, "validation") for k in ("ne", "calibration"))
    (area,), (count,) = (recorded(found.directory, "fit", k, "validation") for k in ("group_auc", "group_count"))
    run = open_run(small_config(data, tmp_path), one_rank())
    told = evaluate(found.trainer.task.predict, streams(run)[1].epoch(0), one_rank(), "left")
    assert (ne, calibration, area, count) == tuple(told[k] for k in ("ne", "calibration", "group_auc", "group_count"))
    plain = fit(data, tmp_path / "plain", "train.epochs=1")
    assert recorded(plain.directory, "fit", "ne", "validation") == [ne]
    assert not recorded(plain.directory, "fit", "group_auc", "validation")


def test_a_group_that_is_no_field_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.group: 'lft' is none of left, big"):
        fit(data, tmp_path, "train.group=lft")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_group_may_change_between_two_starts(data: Path, tmp_path: Path) -> None:
    whole = fit(data, tmp_path / "whole", "train.epochs=1")
    fit(data, tmp_path / "broken", "train.epochs=1", "train.save_every=4", stop_at=7)
    broken = fit(data, tmp_path / "broken", "train.epochs=1", "train.save_every=4", "train.group=left")
    assert recorded(broken.directory, "fit", "group_auc", "validation")
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors().values(), broken.tensors().values(), strict=True))
