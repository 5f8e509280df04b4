"""iHAS's search stage: who learns in which step, what is drawn, and that a continued search is the unbroken one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.ihas.gates_stage import STAGE, GateStage, GatesTask, load_gates
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor
from tests.factories import (
    one_rank,
    open_run,
    optimizer_state,
    prepared,
    random_batch,
    recorded,
    small_config,
    whole_tables,
)

IHAS = [
    "search.width=4",
    "search.training.batch_size=256",
    "search.training.eval_batch_size=200",
    "search.training.epochs=2",
    "search.training.patience=0",
    "search.training.log_every=1",
    "search.outer.pretrain_epochs=0.5",
    "search.outer.every=3",
    "search.outer.lr=0.01",
]
STEPS, WARMUP = 24, 6  # 12 steps an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def run_of(data: Path, directory: Path, *overrides: str) -> Run:
    return open_run(small_config(data, directory, *IHAS, *overrides, method="ihas"), one_rank())


class Watched(GatesTask):
    """Notes all weights and optimizer states at the start of a step, before its outer step and at its end."""

    def __init__(self, run: Run, search: Any, training: bool) -> None:
        super().__init__(run, search, training)
        self.trainer: Any = None
        self.seen: list[dict[str, dict[str, torch.Tensor]]] = []
        self.outer_steps: list[int] = []

    def snapshot(self) -> dict[str, torch.Tensor]:
        model = self.model
        found = {f"table {n}": t for n, t in whole_tables(model.sharded).items()}
        found |= dict(model.replicated.state_dict())
        for name, p in model.replicated.named_parameters():
            for key, value in self.trainer.optimizer.state.get(p, {}).items():
                found[f"{name} moment {key}"] = value
        found |= {f"table {k}": v for k, v in optimizer_state(model.sharded).items()}
        return {k: v.detach().clone() for k, v in found.items()}

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        self.seen.append({"start": self.snapshot()})
        return super().loss(batch, step)

    def outer_loss(self, step: int) -> torch.Tensor | None:
        self.seen[-1]["middle"] = self.snapshot()
        loss = super().outer_loss(step)
        if loss is not None:
            self.outer_steps.append(step)
        return loss

    def after_step(self, step: int, monitor: Monitor) -> None:
        self.seen[-1]["end"] = self.snapshot()
        super().after_step(step, monitor)


def train_watched(run: Run) -> Watched:
    task = Watched(run, run.config.search, training=True)
    make = gated.Trainer

    def keep(*args: Any, **kwargs: Any) -> Any:
        task.trainer = make(*args, **kwargs)
        return task.trainer

    with mock.patch.object(gated, "Trainer", keep):
        gated.train(run, STAGE, task, run.config.search.training, [])
    return task


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of what is no longer bitwise the same; what is new has changed."""
    return {k for k, v in after.items() if k not in before or not torch.equal(before[k], v)}


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
@pytest.mark.parametrize("through", ["false", "true"])
def test_each_step_trains_its_own_side_alone(data: Path, tmp_path: Path, optimizer: str, through: str) -> None:
    run = run_of(data, tmp_path, f"optim.embedding={optimizer}", f"search.gates.through={through}")
    task = train_watched(run)
    assert task.outer_steps == list(range(WARMUP + 3, STEPS + 1, 3))
    for k, seen in enumerate(task.seen):
        ordinary, outer = changed(seen["start"], seen["middle"]), changed(seen["middle"], seen["end"])
        assert ordinary and all(n.startswith(("table", "head")) for n in ordinary)
        assert any(n.startswith("table") for n in ordinary) and any(n.startswith("head") for n in ordinary)
        if k + 1 in task.outer_steps:
            assert outer and all(n.startswith("selector") for n in outer)
            assert "selector.linear.weight" in outer
        else:
            assert not outer


def test_gates_are_open_until_the_pretraining_ends(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    task = GatesTask(run, run.config.search, training=True)
    batch = random_batch(task.run.schema)
    with torch.no_grad():
        plain = torch.nn.functional.binary_cross_entropy_with_logits(task.model(batch), batch.label)
        assert task.warmup == WARMUP
        assert torch.equal(task.loss(batch, WARMUP - 1), plain)
        assert not torch.equal(task.loss(batch, WARMUP), plain)
        assert torch.equal(task.predict(batch), task.model(batch))
        task.steps = WARMUP + 1
        masks = task.masks(task.model.embed(batch))
        task.model.bare_selector.linear.bias.fill_(-5.0)
        assert masks.any() and not task.masks(task.model.embed(batch)).any()


def test_a_row_that_keeps_nothing_is_predicted_from_zeros(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path)
    task = GatesTask(run, run.config.search, training=False)
    task.steps = 1
    with torch.no_grad():
        task.model.bare_selector.linear.bias.fill_(-5.0)
        batch = random_batch(run.schema, rows=4)
        zeros = torch.zeros(4, len(run.schema.fields), 4)
        assert torch.equal(task.predict(batch), task.model.bare_head(batch.dense, zeros))


def test_a_killed_search_goes_on_as_if_unbroken(data: Path, tmp_path: Path) -> None:
    whole, broken = run_of(data, tmp_path / "whole"), run_of(data, tmp_path / "broken", "search.training.save_every=5")
    GateStage().run(whole)

    class Killed(Exception):
        pass

    def kill(self: GatesTask, step: int, monitor: Monitor) -> None:
        before(self, step, monitor)
        if step == 17:
            raise Killed

    before = GatesTask.after_step
    with mock.patch.object(GatesTask, "after_step", kill), pytest.raises(Killed):
        GateStage().run(broken)
    GateStage().run(broken)
    one, other = load_gates(whole), load_gates(broken)
    assert one.warmup == other.warmup == WARMUP and one.steps == other.steps == STEPS
    assert not changed(one.model.replicated.state_dict(), other.model.replicated.state_dict())
    assert not changed(whole_tables(one.model.sharded), whole_tables(other.model.sharded))
    assert recorded(whole.dir, STAGE, "loss") == recorded(broken.dir, STAGE, "loss")
    assert recorded(whole.dir, STAGE, "open") == recorded(broken.dir, STAGE, "open") != []


@pytest.mark.slow  # two trainings
def test_polarization_parts_the_probabilities(data: Path, tmp_path: Path) -> None:
    spread = {}
    for weight in ("0", "3"):
        overrides = ["search.outer.every=1", "search.outer.lr=0.1", "search.gates.sparsity=0"]
        run = run_of(data, tmp_path / weight, *overrides, f"search.gates.polarization={weight}")
        GateStage().run(run)
        task = load_gates(run)
        with torch.no_grad():
            p = torch.sigmoid(task.logits(task.model.embed(random_batch(run.schema))))
        spread[weight] = float((p - p.mean(1, keepdim=True)).abs().mean())
    assert spread["3"] > 2 * spread["0"]


def test_no_thread_that_reads_held_out_rows_outlives_the_search(data: Path, tmp_path: Path) -> None:
    small = "search.training.batch_size=32"  # more held-out batches than are read ahead
    run = run_of(data, tmp_path, small)
    task = GatesTask(run, run.config.search, training=True)
    assert task.outer_loss(task.warmup + 3) is not None
    assert [t for t in threading.enumerate() if t.name == "batches"]
    task.close()
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_pretraining_that_leaves_no_time_for_gates_is_an_error(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path, "search.outer.pretrain_epochs=2")
    with pytest.raises(UserError, match=r"search\.outer\.pretrain_epochs: 2 of 2 epochs"):
        GateStage().run(run)
