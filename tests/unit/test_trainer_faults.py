"""What training survives: a break between evaluations, a signal, damage, NaN, and a disk that is full."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer
from tests.factories import one_rank, open_run, prepared, small_config, streams, whole_tables
from tests.unit.test_trainer import WIDTHS, Fit, assert_same, assert_same_records, fit

KEPT_SAFE = ["train.patience=0", "train.evals_per_epoch=2", "train.log_every=5", "train.save_every=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fit(data, tmp_path_factory.mktemp("unbroken"), *KEPT_SAFE)


@pytest.mark.parametrize("stop_at", [5, 11])
def test_checkpoints_between_evaluations_lose_little(data: Path, tmp_path: Path, unbroken: Fit, stop_at: int) -> None:
    """A line of the log whose steps lie on both sides of the break is the unbroken one, too."""
    broken = fit(data, tmp_path, *KEPT_SAFE, stop_at=stop_at)
    assert broken.trainer.checkpointer.newest() == stop_at // 4 * 4
    continued = fit(data, tmp_path, *KEPT_SAFE)
    assert_same(continued, unbroken)
    assert_same_records(continued, unbroken)


def test_saving_in_the_background_changes_nothing(data: Path, tmp_path: Path, unbroken: Fit) -> None:
    overrides = [*KEPT_SAFE, "train.async_save=true", "train.save_every=1", "train.keep_checkpoints=3"]
    fit(data, tmp_path, *overrides, stop_at=17)
    found = fit(data, tmp_path, *overrides)
    assert_same(found, unbroken)
    assert_same_records(found, unbroken)
    best = unbroken.trainer.checkpointer.best()
    assert found.trainer.checkpointer.best() == best
    assert found.trainer.checkpointer.steps()[-3:] == [22, 23, 24]


@pytest.mark.parametrize("step", [6, 7, 12, 23, 24])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(
    data: Path, tmp_path: Path, unbroken: Fit, step: int
) -> None:
    """Also just before an evaluation, which is then made up for, and when there is no step left."""
    stopped = fit(data, tmp_path, *KEPT_SAFE, faults=f"term step={step}")
    after = min(step + 1, 24)  # it comes when the ranks have exchanged all of that step
    assert stopped.trainer.progress.step == stopped.trainer.checkpointer.newest() == after
    continued = fit(data, tmp_path, *KEPT_SAFE)
    assert_same(continued, unbroken)
    assert_same_records(continued, unbroken)
    assert continued.trainer.checkpointer.best() == unbroken.trainer.checkpointer.best()


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    data: Path, tmp_path: Path, unbroken: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(data, tmp_path, *KEPT_SAFE, stop_at=21)
    path = tmp_path / "checkpoints" / "fit" / "step-20" / "data" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-9])
    continued = fit(data, tmp_path, *KEPT_SAFE, quiet=False)
    assert f"checkpoint file {path} is damaged" in (out := capsys.readouterr().out)
    assert "continuing from" in out and "step-18" in out
    assert_same(continued, unbroken)
    assert_same_records(continued, unbroken)


def test_a_damaged_best_checkpoint_is_told_and_done_without(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["train.patience=0", "train.evals_per_epoch=4", "optim.dense_lr=1.0"]
    best = fit(data, tmp_path, *overrides).trainer.checkpointer.best()
    assert best is not None and best < 21
    (tmp_path / "checkpoints" / "fit" / f"step-{best}" / "state.json").unlink()
    again = fit(data, tmp_path, *overrides, quiet=False)
    assert f"the best checkpoint, step-{best}, is gone or damaged; the last one counts" in capsys.readouterr().out
    assert again.trainer.checkpointer.best() == 24
    again.trainer.restore_best()


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_a_loss_that_is_not_finite_stops_before_anything_is_written(data: Path, tmp_path: Path, optimizer: str) -> None:
    fit(data, tmp_path / "before", f"optim.embedding={optimizer}", "train.steps=13")
    overrides = [f"optim.embedding={optimizer}", "train.steps=20"]
    with pytest.raises(UserError) as caught:
        fit(data, tmp_path / "nan", *overrides, nan_at=13)
    message = str(caught.value)
    assert "loss is not finite at step 13 on rank 0 (epoch 1, batch 1)" in message
    assert f"the last checkpoint is {tmp_path / 'nan' / 'checkpoints' / 'fit'}/step-12" in message
    assert "--optim.embedding_lr" in message


def test_nan_leaves_every_table_as_it_was(data: Path, tmp_path: Path) -> None:
    for optimizer in ("adam", "adagrad"):
        config = small_config(data, tmp_path, f"optim.embedding={optimizer}")
        run = open_run(config, one_rank())

        class Task(SubnetTask):
            def loss(self, batch: Batch, step: int) -> torch.Tensor:
                return super().loss(batch, step) * float("inf")

        task = Task(config, Allocation(run.schema, WIDTHS), run.context)
        before = whole_tables(task.model.sharded)
        with Monitor(tmp_path, "fit", quiet=True) as monitor, pytest.raises(UserError, match="no checkpoint yet"):
            Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, tmp_path / optimizer).fit()
        for name, table in whole_tables(task.model.sharded).items():
            assert torch.equal(table, before[name])


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_a_gradient_that_is_not_finite_stops_before_anything_is_written(
    data: Path, tmp_path: Path, optimizer: str
) -> None:
    """The loss is fine: only what comes back from it is not."""
    overrides = [f"optim.embedding={optimizer}", "train.save_every=1"]
    with pytest.raises(
        UserError, match=r"gradient of the embeddings is not finite at step 5 on rank 0 \(epoch 0, batch 5"
    ):
        fit(data, tmp_path, *overrides, faults="nan at=gradient step=5")
    before = fit(data, tmp_path / "before", *overrides, "train.steps=5")
    after = fit(data, tmp_path, *overrides, "train.steps=5")
    assert_same(after, before)


def test_nothing_is_written_by_the_step_that_is_refused(data: Path, tmp_path: Path) -> None:
    for optimizer in ("adam", "adagrad"):
        config = small_config(data, tmp_path, f"optim.embedding={optimizer}")
        run = open_run(config, one_rank())
        task = SubnetTask(config, Allocation(run.schema, WIDTHS), run.context)
        model = task.model
        before = whole_tables(model.sharded) | {k: v.clone() for k, v in model.bare_head.state_dict().items()}
        with (
            Monitor(tmp_path, "fit", quiet=True) as monitor,
            mock.patch.dict(os.environ, {VARIABLE: "nan at=gradient"}),
        ):
            root = tmp_path / optimizer
            trainer = Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root)
            with pytest.raises(UserError, match="gradient of the embeddings"):
                trainer.fit()
        after = whole_tables(model.sharded) | model.bare_head.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["subnet", "supernet"])
def test_bad_batches_are_skipped_and_counted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    overrides = ["train.skip_bad_batches=2", "model.norm=field", "train.save_every=5", "train.patience=0"]
    faults = "nan step=3; nan at=gradient step=17"
    found = fit(data, tmp_path, *overrides, kind=kind, faults=faults, quiet=False)
    assert "loss is not finite at step 3 on rank 0 (epoch 0, batch 3): batch skipped, 1 of at most 2" in (
        out := capsys.readouterr().out
    )
    assert "gradient of the embeddings is not finite at step 17 on rank 0 (epoch 1, batch 5): batch skipped, 2" in out
    assert found.trainer.progress.skipped == 2
    assert found.trainer.progress.step == 24
    assert found.tensors()["adam steps"] == 22
    assert all(bool(t.isfinite().all()) for t in found.tensors().values())
    broken = tmp_path / "broken"
    fit(data, broken, *overrides, kind=kind, faults=faults, stop_at=18)
    assert_same(fit(data, broken, *overrides, kind=kind, faults=faults), found)
    with pytest.raises(UserError, match="at step 20 .*2 batches were skipped before"):
        fit(data, tmp_path / "third", *overrides, kind=kind, faults=f"{faults}; nan step=20")


def test_training_goes_on_without_a_checkpoint_that_could_not_be_written(
    data: Path, tmp_path: Path, unbroken: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fit(data, tmp_path, *KEPT_SAFE, faults="raise save=state error=ENOSPC step=8", quiet=False)
    assert "step-8 could not be written: [Errno 28] No space left" in (out := capsys.readouterr().out)
    assert "Training goes on; after 3 such failures in a row it stops" in out
    assert_same(found, unbroken)
    assert_same_records(found, unbroken)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_stays_full_ends_training(data: Path, tmp_path: Path, background: str) -> None:
    overrides = [*KEPT_SAFE, f"train.async_save={background}"]
    with pytest.raises(UserError, match=r"step-16 could not.*step-6 \(3 in a row\). Free or enlarge the disk"):
        rules = "; ".join(f"raise save=data error=ENOSPC step={n}" for n in (8, 12, 16))
        fit(data, tmp_path, *overrides, faults=rules)


def test_one_failed_save_may_be_enough_and_the_last_one_always_is(data: Path, tmp_path: Path) -> None:
    full = "raise save=data error=ENOSPC step="
    with pytest.raises(UserError, match="step-4 could not be written.*there is none yet. Free"):
        fit(data, tmp_path / "stop", *KEPT_SAFE, "train.on_save_error=stop", faults=full + "4")
    with pytest.raises(UserError, match="step-24 could not be written.*step-20. Free"):
        fit(data, tmp_path / "last", *KEPT_SAFE, faults=full + "24")


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(data: Path, tmp_path: Path) -> None:
    found = fit(data, tmp_path, "train.patience=0", "train.epochs=3", faults="raise save=data error=ENOSPC step=12")
    assert found.trainer.progress.best_step in (24, 36)
    assert found.trainer.checkpointer.best() == found.trainer.progress.best_step
