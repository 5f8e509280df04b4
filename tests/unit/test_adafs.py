"""AdaFS: the model, who trains what in which step, and breaks in a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from embsearch_dist.config.read import load_config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adafs.method import STAGE, AdaFS, AdaFSTask, ControllerStage, load_searched
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.gated.result import evaluate_gated, seeded_name
from embsearch_dist.methods.stages import run_stages
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer
from tests.factories import (
    CONFIGS,
    one_rank,
    open_run,
    optimizer_state,
    prepared,
    random_batch,
    recorded,
    small_config,
    whole_tables,
)

ROOT = Path(__file__).resolve().parents[2]
# An epoch has 12 steps: 6 without the controller, then 18 with it, 9 of which a held-out batch follows.
SEARCH = [
    "search.width=4",
    "search.training.batch_size=256",
    "search.training.eval_batch_size=200",
    "search.training.epochs=2",
    "search.training.evals_per_epoch=4",
    "search.training.patience=0",
    "search.training.log_every=1",
    "search.outer.pretrain_epochs=0.5",
    "search.outer.every=2",
    "search.outer.lr=0.02",
]
WARMUP, STEPS = 6, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def small_run(data: Path, directory: Path, *overrides: str) -> Run:
    return open_run(small_config(data, directory, *SEARCH, *overrides, method="adafs"), one_rank())


def first_batch(run: Run, split: str = "train") -> Batch:
    return next(iter(run.stream(split, 256, shuffle=True).epoch(0)))


class Stopped(Exception):
    """Raised in place of a kill."""


def fit(run: Run, task: AdaFSTask, name: str = STAGE) -> Trainer:
    """Train as the stage does, without what it prints; returns the trainer behind it."""
    search = run.config.search
    task.total = STEPS
    batches = run.stream("train", search.training.batch_size, shuffle=True)
    validation = run.stream("validation", search.training.eval_batch_size, shuffle=False)
    root = gated.checkpoint_root(run, name)
    with Monitor(run.dir, name, quiet=True) as monitor:
        trainer = Trainer(task, search.training, run.config.optim, batches, validation, run.context, monitor, root)
        trainer.fit()
    return trainer


# ---- the model ----


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_scaled_weights_of_a_row_add_up_to_the_number_of_fields(data: Path, tmp_path: Path, mode: str) -> None:
    run = small_run(data, tmp_path, f"search.mode={mode}", "search.scale=true")
    plain = small_run(data, tmp_path, f"search.mode={mode}")
    tasks = [AdaFSTask(r, r.config.search, training=False) for r in (run, plain)]
    for task in tasks:
        task.model.eval()
    u, batch = torch.ones(32, 4, 4), random_batch(run.schema)
    weighed = tasks[0].select_final(u, batch)
    torch.testing.assert_close(weighed.sum(1), torch.full((32, 4), 4.0))
    torch.testing.assert_close(tasks[1].select_final(u, batch) * 4, weighed)
    assert set((weighed[..., 0] > 0).sum(1).tolist()) == {4 if mode == "soft" else 2}


@pytest.mark.parametrize("kind", ["field", "width", "none"])
def test_embeddings_are_normalised_per_field_or_over_all_of_them(data: Path, tmp_path: Path, kind: str) -> None:
    run = small_run(data, tmp_path, f"search.norm={kind}", "model.gain=0.3", "model.init_std=0.5")
    model, batch = AdaFSTask(run, run.config.search, training=False).model, first_batch(run)
    raw = model.raw(batch).detach()  # [F, B, d]
    tables = whole_tables(model.sharded)
    for f, name in enumerate(run.schema.names):
        assert torch.equal(raw[f], tables[name][batch.sparse[name].values().long()])
    if kind == "field":
        plain = nn.BatchNorm1d(16)
        by_field = [raw.transpose(0, 1).reshape(256, 16), lambda x: x.view(256, 4, 4)]
    else:
        plain = nn.BatchNorm1d(4)
        by_field = [raw.permute(1, 2, 0), lambda x: x.transpose(1, 2)]
    nn.init.constant_(plain.weight, 0.3)
    for training in (True, False):
        model.train(training), plain.train(training)
        expected = raw.transpose(0, 1) if kind == "none" else by_field[1](plain(by_field[0]))
        torch.testing.assert_close(model.embed(batch), expected, rtol=1e-4, atol=1e-5)


def test_batchnorm_is_a_part_of_the_head(data: Path, tmp_path: Path) -> None:
    """So its optimizer, DDP, outer steps' freezing and checkpoints treat it as one."""
    model = (task := AdaFSTask(run := small_run(data, tmp_path), run.config.search, False)).model
    head = {id(p) for p in model.bare_head.parameters()}
    assert {id(p) for p in model.norm.parameters()} < head
    assert not head & {id(p) for p in model.outer_parameters}
    names = set(model.replicated.state_dict())
    assert {"head.norm.mean", "head.norm.variance", "head.norm.scale", "selector.norm.mean"} < names
    task.loss(first_batch(run), 0).backward()
    assert model.norm.scale.grad is not None


def test_before_the_controller_sets_in_nothing_is_weighed(data: Path, tmp_path: Path) -> None:
    run = small_run(data, tmp_path, "model.init_std=0.5")
    task, batch = AdaFSTask(run, run.config.search, training=True), first_batch(run)
    assert task.warmup == WARMUP
    model = task.model.eval()  # so that a second look sees the same statistics
    open_loss = nn.functional.binary_cross_entropy_with_logits(model(batch), batch.label)
    assert torch.equal(task.loss(batch, WARMUP - 1), open_loss)
    weighed = model.embed(batch) * model.bare_selector(model.embed(batch))[..., None]
    logits = model.bare_head(batch.dense, weighed)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, batch.label)
    torch.testing.assert_close(task.loss(batch, WARMUP), expected)
    task.load_state({"steps": WARMUP, "warmup": WARMUP})
    assert torch.equal(task.predict(batch), model(batch))
    task.load_state({"steps": WARMUP + 1, "warmup": WARMUP})
    torch.testing.assert_close(task.predict(batch), logits)


def test_l2_is_on_what_the_tables_hold(data: Path, tmp_path: Path) -> None:
    losses = []
    for l2 in (0.0, 0.5):
        run = small_run(data, tmp_path, f"optim.embedding_l2={l2}", "model.init_std=0.3")
        task, batch = AdaFSTask(run, run.config.search, training=True), first_batch(run)
        losses.append(float(task.loss(batch, 0).detach()))
    tables = whole_tables(task.model.sharded)
    rows = [tables[n][batch.sparse[n].values().long()] for n in run.schema.names]
    expected = 0.5 * sum(float(r.square().sum()) for r in rows) / batch.size
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)


# ---- training ----


def state_of(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of all weights, buffers and optimizer states, by who may change them."""
    model = trainer.task.model
    outer = {id(p) for p in model.outer_parameters}
    inner: dict[str, torch.Tensor] = {f"table {n}": t for n, t in whole_tables(model.sharded).items()}
    inner |= {f"head {n}": t for n, t in model.bare_head.state_dict().items()}
    inner |= optimizer_state(model.sharded)
    controller: dict[str, torch.Tensor] = dict(model.bare_selector.named_parameters())
    for name, parameter in model.replicated.named_parameters():
        side, values = controller if id(parameter) in outer else inner, trainer.optimizer.state.get(parameter, {})
        # A parameter that never had a gradient has no state, or an empty one.
        if values.get("step", 0):
            side |= {f"optimizer {name} {k}": v for k, v in values.items()}
    buffers = dict(model.bare_selector.named_buffers())
    sides = {"inner": inner, "controller": controller, "statistics": buffers}
    return {side: {k: v.detach().clone() for k, v in values.items()} for side, values in sides.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [("adam", "soft"), ("adam", "hard"), ("adagrad", "hard"), ("rowwise_adagrad", "soft"), ("sgd", "soft")],
)
def test_ordinary_steps_spare_the_controller_and_outer_steps_all_else(
    data: Path, tmp_path: Path, optimizer: str, mode: str
) -> None:
    overrides = [f"optim.embedding={optimizer}", f"search.mode={mode}", "optim.weight_decay=0.01"]
    run = small_run(data, tmp_path, *overrides, "search.training.evals_per_epoch=1")
    outer_steps: list[int] = []

    class Task(AdaFSTask):
        """Looks at everything before and after the outer step that may lie between these two calls."""

        trainer: Trainer
        after: dict[str, Any] = {}

        def outer_loss(self, step: int) -> torch.Tensor | None:
            self.before = state_of(self.trainer)
            if self.after:
                assert not same(self.before["inner"], self.after["inner"])
                assert same(self.before["controller"], self.after["controller"])
            loss = super().outer_loss(step)
            if loss is not None:
                outer_steps.append(step)
            return loss

        def after_step(self, step: int, monitor: Monitor) -> None:
            super().after_step(step, monitor)
            self.after = state_of(self.trainer)
            assert same(self.before["inner"], self.after["inner"])
            moved = not same(self.before["controller"], self.after["controller"])
            assert moved == (step in outer_steps) == (step > WARMUP and step % 2 == 0)

    task = Task(run, run.config.search, training=True)
    search = run.config.search
    batches = run.stream("train", 256, shuffle=True)
    with Monitor(run.dir, STAGE, quiet=True) as monitor:
        root = tmp_path / "checkpoints"
        trainer = Trainer(task, search.training, run.config.optim, batches, None, run.context, monitor, root)
        task.trainer = trainer
        trainer.fit()
    assert outer_steps == list(range(WARMUP + 2, STEPS + 1, 2))


def pictures(directory: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "heatmaps.jsonl").read_text().splitlines()]
    return [line for line in lines if line["name"] == name]


BROKEN = ["search.mode=hard", "model.dropout=0.2", "search.training.evals_per_epoch=2", "search.training.save_every=4"]


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run = small_run(data, tmp_path_factory.mktemp("unbroken"), *BROKEN)
    return fit(run, AdaFSTask(run, run.config.search, training=True))


# Before the controller sets in, at that step, after the first held-out batch, between two, and on an evaluation.
@pytest.mark.parametrize("stop_at", [5, 6, 9, 13, 18])
def test_a_continued_training_equals_the_unbroken_one_bitwise(
    data: Path, tmp_path: Path, unbroken: Trainer, stop_at: int
) -> None:
    class Broken(AdaFSTask):
        def after_step(self, step: int, monitor: Monitor) -> None:
            super().after_step(step, monitor)
            if step == stop_at:
                raise Stopped

    run = small_run(data, tmp_path, *BROKEN)
    with pytest.raises(Stopped):
        fit(run, Broken(run, run.config.search, training=True))
    continued = fit(run, AdaFSTask(run, run.config.search, training=True))
    one, other = state_of(unbroken), state_of(continued)
    for side in one:
        assert one[side].keys() == other[side].keys()
        for key in one[side]:
            assert torch.equal(one[side][key], other[side][key]), key
    assert unbroken.task.state() == continued.task.state()
    assert unbroken.checkpointer.best() == continued.checkpointer.best()
    before = unbroken.monitor.run_dir
    for key, split in (("loss", None), ("auc", "validation")):
        assert recorded(before, STAGE, key, split) == recorded(tmp_path, STAGE, key, split)
    assert pictures(before, "fields kept") == pictures(tmp_path, "fields kept")


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_stages_leave_the_result_of_the_best_weights_since_the_controller_set_in(
    data: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["optim.embedding_lr=0.5", "optim.dense_lr=0.05"]
    overrides = ["model.backbone=mlp", "search.outer.pretrain_epochs=1", *rates]
    run = small_run(data, tmp_path, f"search.mode={mode}", *overrides)
    run_stages(AdaFS(), run)
    curve = dict(zip(*(recorded(tmp_path, STAGE, key, "validation") for key in ("step", "auc")), strict=True))
    best = max((step for step in curve if step > 12), key=lambda step: curve[step])
    assert best < STEPS  # or the last weights would pass for the best ones
    assert json.loads((tmp_path / "checkpoints" / STAGE / "best.json").read_text())["step"] == best
    task = load_searched(run)
    stream = run.stream("validation", 200, shuffle=False)
    again = evaluate_gated(task, stream, run.context, run.config, "x-seed3")
    assert (again["auc"], again["name"], again["split"]) == (curve[best], "x", "validation")
    assert again["ne"] == recorded(tmp_path, STAGE, "ne", "validation")[list(curve).index(best)]

    folder = tmp_path / "retrain" / f"adafs-{mode}"
    result = json.loads((folder / "evaluation.json").read_text())
    schema = Schema.load(data)
    assert (result["name"], result["split"], result["seed"]) == (f"adafs-{mode}", "test", 0)
    assert result["rows"] == schema.rows["test"]
    assert 0.4 < result["auc"] < 1 and result["inference_rows_per_s"] > 0
    assert result["widths"] == dict.fromkeys(schema.names, 4)
    assert result["embedding_parameters"] == 4 * sum(schema.cardinalities)
    # MLP 17-8-4-1 with its BatchNorm (4 + 4); controller 16-4 without a bias, with its BatchNorm (4 + 4).
    assert result["dense_parameters"] == (17 * 8 + 8 + 8 * 4 + 4 + 4 + 1 + 8) + (16 * 4 + 8)
    assert result["flops_per_sample"] == 2 * (17 * 8 + 8 * 4 + 4 + 17 + 16 * 4)  # with the linear part, zero in an MLP
    assert result["backbone"] == "mlp"
    assert load_config(CONFIGS, folder / "config.yaml").to_dict() == run.config.to_dict()

    maps = pictures(tmp_path, "field weights")
    assert [m["step"] for m in maps] == [14, 16, 18, 20, 22, 24]
    assert maps[0]["columns"] == schema.names
    assert all(sum(m["values"][0]) == pytest.approx(1, abs=1e-5) for m in maps)
    kept = pictures(tmp_path, "fields kept")
    assert [round(sum(m["values"][0]), 4) for m in kept] == ([2.0] * 6 if mode == "hard" else [])

    # What was measured is measured again only when other weights are the best.
    capsys.readouterr()
    run_stages(AdaFS(), run)
    assert "stage test: done before" in capsys.readouterr().out
    (tmp_path / "checkpoints" / STAGE / "best.json").write_text(json.dumps({"step": STEPS}))
    run_stages(AdaFS(), run)
    told = capsys.readouterr().out
    assert "stage controller: done before" in told and "stage test" not in told


def test_a_seed_is_in_the_directory_but_not_in_the_name() -> None:
    assert (seeded_name("adafs-soft", 0), seeded_name("adafs-soft", 7)) == ("adafs-soft", "adafs-soft-seed7")


# ---- settings ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mode=medium", "search.mode: 'medium' is none of soft, hard"),
        ("norm=layer", "search.norm: 'layer' is none of field, width, none"),
        ("width=6", "search.width: must be a multiple of 4, got 6"),
        ("k=-1", "search.k: must be >= 0"),
        ("dropout=1.0", r"search.dropout: must be in \[0, 1\)"),
        ("name=a/b", "search.name: must be a plain word"),
        ("outer.every=0", "search.outer.every: must be at least 1"),
        ("training.batch_size=0", "search.training.batch_size: must be at least 1"),
        ("kk=3", "unknown config key 'search.kk'"),
    ],
)
def test_bad_values_are_refused_by_name(data: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_run(data, tmp_path, f"search.{override}")


def test_more_fields_than_there_are_cannot_be_kept(data: Path, tmp_path: Path) -> None:
    run = small_run(data, tmp_path, "search.mode=hard", "search.k=5")
    with pytest.raises(UserError, match="search.k: must be at most 4, the number of fields, got 5"):
        run_stages(AdaFS(), run)
    assert not (tmp_path / "stages").exists()


def test_other_settings_do_not_go_on_in_the_same_directory(data: Path, tmp_path: Path) -> None:
    ControllerStage().run(small_run(data, tmp_path, "search.training.epochs=1", "search.training.steps=8"))
    with pytest.raises(UserError, match=r"search\.dropout"):
        ControllerStage().run(small_run(data, tmp_path, "search.training.epochs=1", "search.dropout=0.1"))


@pytest.mark.parametrize(
    ("name", "mode", "hidden", "scale"),
    [
        ("movielens_1m/adafs_soft", "soft", [128, 64], False),
        ("movielens_1m/adafs_hard", "hard", [128, 64], False),
        ("criteo/adafs_soft_sample", "soft", [16, 8], True),
        ("avazu/adafs_soft_sample", "soft", [16, 8], True),
    ],
)
def test_shipped_configs_say_what_they_search(name: str, mode: str, hidden: list[int], scale: bool) -> None:
    config = load_config(CONFIGS, ROOT / "configs" / f"{name}.yaml")
    search = config.search
    assert (config.method, search.mode, search.width, search.scale) == ("adafs", mode, 16, scale)
    assert search.result_name == f"adafs-{mode}"
    assert (config.model.backbone, config.model.hidden) == ("mlp", hidden)
    assert search.outer.pretrain_epochs == 2 and search.training.epochs > 2
    # A uniform model trained with this file has the same recipe.
    assert config.train == search.training


def test_the_soft_and_the_hard_config_differ_in_that_alone() -> None:
    folder = ROOT / "configs" / "movielens_1m"
    soft, hard = (load_config(CONFIGS, folder / f"adafs_{mode}.yaml").to_dict() for mode in ("soft", "hard"))
    assert soft["search"].pop("mode") == "soft" and hard["search"].pop("mode") == "hard"
    assert soft["run"].pop("dir") != hard["run"].pop("dir")
    assert soft == hard
