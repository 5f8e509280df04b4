"""The panel that judges a supernet: which subnets, which rows, what the trainer sees of it, and what is searched."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from embsearch_dist.methods.adass.panel import Panel, draw_panel
from embsearch_dist.methods.adass.supernet_stage import SupernetStage, SupernetTask, load_supernet
from embsearch_dist.models.distinct import candidate_mask
from embsearch_dist.train.metrics import evaluate
from tests.factories import one_rank, open_run, prepared, recorded, small_config, streams
from tests.unit.test_trainer import assert_same, assert_same_records, fit

CARDINALITIES, CANDIDATES = [1000, 50, 9, 3], [0, 2, 8, 16, 32]
DISTINCT = candidate_mask([min(n, 16) for n in CARDINALITIES], CANDIDATES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def sizes(choices: torch.Tensor) -> list[int]:
    found: list[int] = (torch.tensor(CANDIDATES)[choices] * torch.tensor(CARDINALITIES)).sum(1).tolist()
    return found


def test_a_panel_reaches_from_the_narrowest_to_the_widest_in_even_layers() -> None:
    choices = draw_panel(DISTINCT, CANDIDATES, CARDINALITIES, 16, 0)
    assert choices[0].tolist() == [1, 1, 1, 1]
    assert choices[-1].tolist() == [3, 3, 3, 2]  # 16 of 9 and 8 of 3 values are the first that have the rank
    found = sizes(choices)
    assert found[1:] == sorted(found[1:])  # with widths of 0 some are smaller than the narrowest
    gaps = [b - a for a, b in zip(found[1:], found[2:], strict=False)]
    assert max(gaps) < 0.5 * found[-1]
    assert DISTINCT[torch.arange(4), choices].all()
    assert (choices == 0).any()
    assert min(found) > 0


def test_no_subnet_of_a_panel_is_empty() -> None:
    distinct = candidate_mask([5], [0, 2, 4])
    for seed in range(20):
        assert draw_panel(distinct, [0, 2, 4], [5], 16, seed).amin() > 0


def test_a_panel_depends_on_the_seed_alone_and_one_subnet_is_the_widest() -> None:
    first, again, other = (draw_panel(DISTINCT, CANDIDATES, CARDINALITIES, 8, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert draw_panel(DISTINCT, CANDIDATES, CARDINALITIES, 1, 0).tolist() == [[3, 3, 3, 2]]
    assert draw_panel(DISTINCT, CANDIDATES, CARDINALITIES, 2, 0).tolist() == [[1, 1, 1, 1], [3, 3, 3, 2]]


def test_a_panels_metrics_are_the_mean_of_its_subnets_each_by_itself(data: Path, tmp_path: Path) -> None:
    run = open_run(small_config(data, tmp_path, "model.init_std=0.5"), one_rank())
    task = SupernetTask(run)
    task.model.eval()
    choices = draw_panel(task.distinct, task.candidates, run.schema.cardinalities, 5, 0)
    panel, looked_up = Panel(run, choices, 100_000, 150), mock.Mock(return_value=None)
    hook = task.model.tables.register_forward_hook(looked_up)
    found = panel.judge(task.model)
    hook.remove()
    assert looked_up.call_count == len(panel._batches) == -(-run.schema.rows["validation"] // 150)
    keep = torch.ones(4, dtype=torch.bool)
    alone = [evaluate(lambda b, c=c: task.model(b, c, keep)[0], streams(run)[1].epoch(0), run.context) for c in choices]  # type: ignore[misc]
    for name in ("auc", "logloss", "accuracy"):
        assert found[name] == pytest.approx(sum(m[name] for m in alone) / 5, abs=1e-7)
    assert found["rows"] == alone[0]["rows"] == run.schema.rows["validation"]
    assert found["auc_narrowest"] == pytest.approx(alone[0]["auc"], abs=1e-7)
    assert found["logloss_widest"] == pytest.approx(alone[-1]["logloss"], abs=1e-7)


@pytest.mark.parametrize("rows", [80, 5, 300])
def test_fewer_rows_come_from_the_whole_split(data: Path, tmp_path: Path, rows: int) -> None:
    run = open_run(small_config(data, tmp_path), one_rank())
    task = SupernetTask(run)
    task.model.eval()
    panel = Panel(run, draw_panel(task.distinct, task.candidates, run.schema.cardinalities, 2, 0), rows, 200)
    size = panel._batches[0].size
    starts = [(b.position.batch - 1) * size for b in panel._batches]
    whole = run.schema.rows["validation"]
    used = panel.judge(task.model)["rows"]
    assert 0.9 * min(rows, whole) <= used <= min(rows, whole)
    assert len(starts) >= min(rows, 16)
    gaps = [b - a for a, b in zip([-size, *starts], [*starts, whole], strict=True)]
    assert max(gaps) <= 2 * whole / len(starts)  # no long part of the split has no rows


def test_the_trainer_looks_at_the_panel_and_its_ends_are_recorded(data: Path, tmp_path: Path) -> None:
    found = fit(data, tmp_path, "train.steps=3", "search.supernet.panel=4", kind="supernet")
    task = found.trainer.task
    assert isinstance(task, SupernetTask)
    task.model.eval()
    metrics = task.judge()
    assert metrics is not None
    for name in ("auc", "logloss", "auc_widest", "auc_narrowest", "logloss_widest", "logloss_narrowest"):
        assert recorded(tmp_path, "fit", name, "validation") == [metrics[name]]
    assert found.trainer.progress.best == metrics["auc"] != metrics["auc_widest"]


def test_a_panel_of_one_is_the_widest_on_all_rows(data: Path, tmp_path: Path) -> None:
    found = fit(data, tmp_path, "train.steps=2", "search.supernet.panel=1", kind="supernet")
    task = found.trainer.task
    task.model.eval()
    metrics = evaluate(
        task.predict, streams(open_run(small_config(data, tmp_path), one_rank()))[1].epoch(0), one_rank()
    )
    assert found.trainer.progress.best == metrics["auc"]
    assert recorded(tmp_path, "fit", "auc_widest", "validation") == []


@pytest.mark.parametrize("subnets", [1, 4])
def test_a_continued_supernet_is_the_unbroken_one_to_the_bit(data: Path, tmp_path: Path, subnets: int) -> None:
    """First variances, P_E, P_F, the panel's verdicts and the rates that they cut."""
    more = ["train.patience=0", "train.evals_per_epoch=3", "train.lr_cut=0.5", f"search.sampling.subnets={subnets}"]
    more += ["train.epochs=1", "search.supernet.panel=4", "search.supernet.panel_rows=200"]
    unbroken = fit(data, tmp_path / "unbroken", *more, kind="supernet")
    fit(data, tmp_path / "broken", *more, kind="supernet", stop_at=10)
    continued = fit(data, tmp_path / "broken", *more, kind="supernet")
    assert_same(continued, unbroken)
    assert_same_records(continued, unbroken)
    state = unbroken.trainer.task.state()
    assert continued.trainer.task.state() == state
    assert torch.tensor(state["sampler"]["logits_e"]).abs().max() > 0


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_weights_of_the_best_step_or_the_last_are_searched(data: Path, tmp_path: Path, keep: str) -> None:
    config = small_config(data, tmp_path, "search.supernet.epochs=1", f"search.supernet.keep={keep}")
    config.search.supernet.evals_per_epoch = 3
    values = iter([0.6, 0.7, 0.5])
    tables: list[torch.Tensor] = []

    def judge(self: SupernetTask) -> dict[str, float]:
        tables.append(torch.cat([s.tensor.flatten().clone() for s in self.model.sharded.local_shards()]))
        return {"auc": next(values), "logloss": 0.5}

    run = open_run(config, one_rank())
    with mock.patch.object(SupernetTask, "judge", judge):
        SupernetStage().run(run)
    loaded = load_supernet(run).model.sharded.local_shards()
    assert torch.equal(torch.cat([s.tensor.flatten() for s in loaded]), tables[1 if keep == "best" else 2])


def test_what_is_searched_may_change_afterwards_but_not_the_judge(data: Path, tmp_path: Path) -> None:
    def inputs(*overrides: str) -> dict[str, object]:
        return SupernetStage().inputs(open_run(small_config(data, tmp_path, *overrides), one_rank()))

    assert inputs("search.supernet.keep=last") == inputs()
    for override in ("search.supernet.panel=3", "search.supernet.panel_rows=9", "search.distinct=false"):
        assert inputs(override) != inputs()
