"""Learning rates over a training: the formula, what the optimizers get, the same training by hand with torch's own
optimizers, and a training that goes on where it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.position import schedule
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer
from tests.factories import one_rank, open_run, prepared, recorded, small_config, streams, whole_tables
from tests.unit.test_trainer import OPTIMIZERS, WIDTHS, assert_same, assert_same_records, fit

BASE = 0.01  # dense_lr of small_config; the tables have 0.05
STEPS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture
def constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions that never get better, so that every evaluation but the first cuts the rates."""
    monkeypatch.setattr(SubnetTask, "predict", lambda self, batch: torch.zeros(batch.size))


def rates(kind: str, warmup: float, total: int) -> list[float]:
    config = TrainConfig(schedule=kind, warmup=warmup)
    return [schedule(config, step, total) for step in range(total)]


def by_torch(kind: str, rising: int, total: int) -> list[float]:
    """The same from torch's schedulers: the rise, then the cosine to zero over what is left."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    parts: list[torch.optim.lr_scheduler.LRScheduler] = []
    if rising:
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rising, 1.0, max(1, rising - 1))
        parts.append(linear)
    left = total - rising
    late = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, left)
    if kind == "constant":
        late = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # type: ignore[assignment]
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [*parts, late], [rising] if rising else [])
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    return found


@pytest.mark.parametrize("kind", ["constant", "cosine"])
@pytest.mark.parametrize(("warmup", "total", "rising"), [(0.0, 10, 0), (0.1, 50, 5), (0.25, 11, 2), (0.9, 20, 18)])
def test_the_formula(kind: str, warmup: float, total: int, rising: int) -> None:
    found = rates(kind, warmup, total)
    assert found == pytest.approx(by_torch(kind, rising, total))
    assert found[:rising] == pytest.approx([(k + 1) / rising for k in range(rising)])
    assert min(found) > 0 and max(found) == 1.0
    if kind == "constant":
        assert set(found[rising:]) == {1.0}
    else:
        assert found[rising] == 1.0
        assert found[rising:] == sorted(found[rising:], reverse=True)
        assert found[-1] == pytest.approx(math.sin(math.pi / (2 * (total - rising))) ** 2)


def test_short_trainings_have_rates() -> None:
    for kind in ("constant", "cosine"):
        assert rates(kind, 0.0, 1) == [1.0]
        assert rates(kind, 0.4, 2) == rates(kind, 0.0, 2)  # less than a step of warm-up is none
        assert rates(kind, 0.99, 1) == [1.0]
    assert rates("cosine", 0.0, 2) == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.schedule=cosin", "train.schedule: 'cosin' is none of constant, cosine"),
        ("train.warmup=1", r"train.warmup: must be in \[0, 1\)"),
        ("train.warmup=-0.1", r"train.warmup: must be in \[0, 1\)"),
        ("optim.dense=sgd", "optim.dense: 'sgd' is none of adam, adagrad"),
        ("optim.dense_eps=0", "optim.dense_eps: must be above 0"),
        ("optim.clip_norm=-1", "optim.clip_norm: must be >= 0"),
    ],
)
def test_a_setting_out_of_range_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"config key {message}"):
        small_config("none", "none", override)


@pytest.mark.parametrize(
    ("kind", "warmup", "optimizer"),
    [
        ("constant", 0.0, "adagrad"),
        ("constant", 0.25, "sgd"),
        ("cosine", 0.0, "rowwise_adagrad"),
        ("cosine", 0.25, "adagrad"),
        ("cosine", 0.25, "adam"),
    ],
)
def test_every_step_has_its_rate(
    data: Path, tmp_path: Path, constant: None, kind: str, warmup: float, optimizer: str
) -> None:
    """base * schedule * cuts, in the log and in the tables' optimizers as well."""
    overrides = [f"train.schedule={kind}", f"train.warmup={warmup}", f"optim.embedding={optimizer}"]
    seen: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        follow = Trainer._follow_schedule

        def spy(trainer: Trainer) -> None:
            follow(trainer)
            tables = trainer.task.model.sharded
            rates = {g["lr"] for g in tables.collection.fused_optimizer.param_groups}
            if tables.adam is not None:
                rates.add(tables.adam.lr)
            assert len(rates) == 1
            seen.append(rates.pop())

        patch.setattr(Trainer, "_follow_schedule", spy)
        fit(data, tmp_path, *overrides, "train.lr_cut=0.5", "train.evals_per_epoch=2", "train.patience=0")
    cuts = [1.0] * 12 + [0.5] * 6 + [0.25] * 6  # evaluations after 6 (the best), 12 and 18 steps
    factors = [f * c for f, c in zip(rates(kind, warmup, STEPS), cuts, strict=True)]
    assert recorded(tmp_path, "fit", "lr") == pytest.approx([BASE * f for f in factors], rel=1e-12)
    assert seen == pytest.approx([0.05 * f for f in factors], rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "stop_at"), [("adagrad", 8), ("adagrad", 19), *((name, 13) for name in OPTIMIZERS)]
)
def test_a_continued_training_has_the_rates_of_the_unbroken_one(
    data: Path, tmp_path: Path, constant: None, optimizer: str, stop_at: int
) -> None:
    """Stopped in the warm-up, after the first cut and after the second."""
    overrides = ["train.schedule=cosine", "train.warmup=0.4", "train.lr_cut=0.5", "train.evals_per_epoch=2"]
    overrides += ["train.patience=0", f"optim.embedding={optimizer}", "optim.dense=adagrad", "optim.clip_norm=0.05"]
    unbroken = fit(data, tmp_path / "unbroken", *overrides)
    fit(data, tmp_path / "broken", *overrides, stop_at=stop_at)
    continued = fit(data, tmp_path / "broken", *overrides)
    assert_same(continued, unbroken)
    assert_same_records(continued, unbroken)
    lr = recorded(tmp_path / "broken", "fit", "lr")
    assert lr == recorded(tmp_path / "unbroken", "fit", "lr")
    assert len(lr) == STEPS and len(set(lr)) == STEPS - 1  # the rise ends where the cosine begins
    assert any("optimizer" in n and n.endswith("sum") for n in unbroken.tensors())


@pytest.mark.parametrize("fault", ["term step=11", "term step=12"])
def test_an_evaluation_left_to_the_continued_training_cuts_as_it_would_have(
    data: Path, tmp_path: Path, constant: None, fault: str
) -> None:
    overrides = ["train.schedule=cosine", "train.lr_cut=0.5", "train.evals_per_epoch=2", "train.patience=0"]
    unbroken = fit(data, tmp_path / "unbroken", *overrides)
    fit(data, tmp_path / "broken", *overrides, faults=fault)
    continued = fit(data, tmp_path / "broken", *overrides)
    assert_same(continued, unbroken)
    assert_same_records(continued, unbroken)


def test_the_schedule_is_part_of_what_a_checkpoint_was_made_for(data: Path, tmp_path: Path) -> None:
    fit(data, tmp_path, "train.steps=3")
    for override, name in (("train.schedule=cosine", "schedule"), ("optim.clip_norm=1", "optim.clip_norm")):
        with pytest.raises(UserError, match=f"other settings: {name} was"):
            fit(data, tmp_path, "train.steps=6", override)


class Norms(SubnetTask):
    """Remembers the norm of the head's gradient before it is clipped."""

    norms: list[float]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norms = []
        after = self.model.after_backward

        def spy() -> Sequence[torch.Tensor]:
            found = after()
            parts = [p.grad.double().square().sum() for p in found if p.grad is not None]
            self.norms.append(float(torch.stack(parts).sum().sqrt()))
            return found

        self.model.after_backward = spy  # type: ignore[method-assign]


def trained(data: Path, directory: Path, *overrides: str) -> tuple[Norms, dict[str, torch.Tensor], Any]:
    """A short training; the task, and the tables and the head it began with."""
    config = small_config(data, directory, "train.patience=0", "train.epochs=1", *overrides)
    run = open_run(config, one_rank())
    task = Norms(config, Allocation(run.schema, WIDTHS), run.context)
    tables = {n: t.clone() for n, t in whole_tables(task.model.sharded).items()}
    head = copy.deepcopy(task.model.bare_head)
    with Monitor(directory, "fit", quiet=True) as monitor:
        root = directory / "checkpoints" / "fit"
        Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root).fit()
    return task, tables, head


def by_hand(data: Path, directory: Path, tables: dict[str, torch.Tensor], head: Any, *overrides: str) -> list[float]:
    """Train ``tables`` and ``head`` in place, look-ups by plain indexing; norms of the head's gradients.

    Under Adam rows that a batch has not looked up are put back, moments included."""
    config = small_config(data, directory, "train.patience=0", "train.epochs=1", *overrides)
    run, optim = open_run(config, one_rank()), config.optim
    names = [n for n in run.schema.names if WIDTHS[n]]
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}
    of_tables = {"eps": 1e-8} if optim.embedding == "adagrad" else {}
    weights = [t.requires_grad_() for t in tables.values()]
    embedding = kinds[optim.embedding](weights, lr=optim.embedding_lr, **of_tables)
    more = {"eps": optim.dense_eps} if optim.dense == "adagrad" else {}
    dense = kinds[optim.dense](head.parameters(), lr=optim.dense_lr, weight_decay=optim.weight_decay, **more)
    norms = []

    def moments(table: torch.Tensor) -> list[torch.Tensor]:
        state = embedding.state.get(table, {})
        return [state[k] for k in ("exp_avg", "exp_avg_sq") if k in state]

    def loss_of(batch: Batch) -> torch.Tensor:
        columns = [tables[n][batch.sparse[n].values().long()][:, : WIDTHS[n]] for n in names]
        widths = [c.shape[1] for c in columns]
        starts = [sum(widths[:k]) for k in range(len(widths))]
        logits = head(batch.dense, Pooled(torch.cat(columns, 1), tuple(starts), tuple(widths)))
        return binary_cross_entropy_with_logits(logits, batch.label)

    stream = streams(run)[0]
    for step, batch in enumerate(stream.epoch(0)):
        factor = schedule(config.train, step, stream.batches_per_epoch)
        embedding.param_groups[0]["lr"] = optim.embedding_lr * factor
        dense.param_groups[0]["lr"] = optim.dense_lr * factor
        embedding.zero_grad()
        dense.zero_grad()
        loss_of(batch).backward()
        gradients = [p.grad for p in head.parameters() if p.grad is not None]
        norm = float(torch.cat([g.reshape(-1) for g in gradients]).double().norm())
        norms.append(norm)
        if optim.clip_norm and norm > optim.clip_norm:
            for g in gradients:
                g.mul_(optim.clip_norm / norm)
        kept = [[t.clone() for t in (tables[n].detach(), *moments(tables[n]))] for n in names]
        embedding.step()
        for n, old in zip(names, kept, strict=True) if optim.embedding == "adam" else ():
            unseen = torch.ones(len(tables[n]), dtype=torch.bool)
            unseen[batch.sparse[n].values().long()] = False
            for part, value in zip((tables[n].detach(), *moments(tables[n])), old, strict=False):
                part[unseen] = value[unseen]
            for part in moments(tables[n]) if len(old) == 1 else ():
                part[unseen] = 0  # the first step
        dense.step()
    return norms


@pytest.mark.parametrize(
    ("embedding", "dense", "more"),
    [
        ("sgd", "adagrad", []),
        ("sgd", "adagrad", ["train.schedule=cosine", "train.warmup=0.3", "optim.dense_eps=0.001"]),
        ("adagrad", "adagrad", ["train.schedule=cosine", "optim.clip_norm=0.05"]),
        ("adagrad", "adam", ["train.warmup=0.5", "optim.clip_norm=0.1"]),
        ("adam", "adagrad", ["train.schedule=cosine", "train.warmup=0.3", "optim.weight_decay=0.01"]),
    ],
)
def test_a_training_is_what_it_is_by_hand(
    data: Path, tmp_path: Path, embedding: str, dense: str, more: list[str]
) -> None:
    overrides = [f"optim.embedding={embedding}", f"optim.dense={dense}", "model.init_std=0.2", *more]
    task, tables, head = trained(data, tmp_path, *overrides)
    norms = by_hand(data, tmp_path, tables, head, *overrides)
    assert task.norms == pytest.approx(norms, rel=1e-3)
    for name, table in whole_tables(task.model.sharded).items():
        torch.testing.assert_close(table, tables[name].detach(), rtol=1e-3, atol=2e-5)
    for name, value in task.model.bare_head.state_dict().items():
        torch.testing.assert_close(value, head.state_dict()[name], rtol=1e-3, atol=2e-5, msg=name)


def test_clipping_scales_the_head_alone_and_only_what_is_too_long(data: Path, tmp_path: Path) -> None:
    """With plain rates of both: tables see the unclipped gradient, and a bound that nothing reaches does nothing."""
    own = ["optim.embedding=sgd", "optim.dense=adagrad", "train.steps=1"]
    free, *_ = trained(data, tmp_path / "free", *own)
    wide, *_ = trained(data, tmp_path / "wide", *own, "optim.clip_norm=1e6")
    tight, _, head = trained(data, tmp_path / "tight", *own, "optim.clip_norm=0.001")
    assert free.norms == wide.norms == tight.norms and free.norms[0] > 0.01
    tables = [whole_tables(t.model.sharded) for t in (free, wide, tight)]
    for name in tables[0]:
        assert torch.equal(tables[0][name], tables[1][name])
        assert torch.equal(tables[0][name], tables[2][name])
    first = head.state_dict()
    moved = []
    for task in (free, wide, tight):
        own_state = task.model.bare_head.state_dict()
        moved.append(torch.cat([(own_state[n] - first[n]).reshape(-1) for n in first]))
    assert torch.equal(moved[0], moved[1])
    # Adagrad's first step is lr * g / (|g| + eps): for so short a gradient nearly lr * g / eps.
    assert float(moved[2].norm()) == pytest.approx(BASE * 0.001 / 1e-2, rel=0.1)
    assert float(moved[0].norm()) > 5 * float(moved[2].norm())
