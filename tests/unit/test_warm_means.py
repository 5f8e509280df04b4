"""What a warm start keeps of columns that are cut and of fields that are dropped: their mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.methods.directions import common, principal
from embsearch_dist.methods.truncated import TruncatedModel
from embsearch_dist.methods.widest import Moments, Sample
from embsearch_dist.run import Run
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.warm.fill import Saved
from embsearch_dist.train.warm.ids import Data, shares
from embsearch_dist.train.warm.means import Means, cut_means
from embsearch_dist.train.warm.start import Start
from embsearch_dist.train.warm.widths import FieldMove
from tests.earlier import STEPS, begun, change, logits, open_run, train, two_days
from tests.factories import one_rank, whole_tables
from tests.raw_lists import make_lists

WIDTH = 8
NARROW = {"left": 4, "big": WIDTH, "right": 3, "idle": 0}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return two_days(tmp_path_factory.mktemp("days"))


def of_model(tmp_path: Path, data: Path, *overrides: str) -> Run:
    run = open_run(data, tmp_path / "old", one_rank(), STEPS, *overrides)
    train(run, WIDTH)
    return run


def constant_where_cut(task: SubnetTask) -> None:
    """All rows of a table are alike in what NARROW takes away; what it keeps is random."""
    generator = torch.Generator().manual_seed(2)
    for shard in task.model.sharded.local_shards():
        kept = NARROW[shard.table.name]
        shard.tensor.copy_(torch.randn(shard.tensor.shape, generator=generator))
        cut = slice(kept, WIDTH if kept else None)  # a dropped field takes its values' own weights along
        shard.tensor[:, cut] = torch.randn(shard.tensor[:1, cut].shape, generator=generator)


@pytest.mark.parametrize("first_order", ["embedding", "value"])
@pytest.mark.parametrize("backbone", ["deepfm", "fm", "wide_deep", "mlp"])
def test_what_is_the_same_in_all_rows_can_be_cut_without_a_change(
    tmp_path: Path, days: tuple[Path, Path], backbone: str, first_order: str
) -> None:
    if (backbone, first_order) == ("mlp", "value"):
        pytest.skip("an mlp has no linear part of its own")
    run = of_model(tmp_path, days[0], f"model.backbone={backbone}", f"model.first_order={first_order}")
    before = logits(run, change(run, WIDTH, constant_where_cut))
    task, told, _ = begun(run, NARROW, Start.open(run.dir), turn=False)
    assert told["means"] == ["idle", "left", "right"] and "idle" not in told["fields"]
    torch.testing.assert_close(logits(run, task), before, atol=2e-4, rtol=1e-4)
    task, told, _ = begun(run, NARROW, Start.open(run.dir), turn=False, keep_means=False)
    assert "means" not in told
    assert (logits(run, task) - before).abs().max() > 0.02, "the example must have something to lose"


def test_columns_are_turned_around_the_mean_of_their_rows(tmp_path: Path, days: tuple[Path, Path]) -> None:
    """Rows that lie on a plane beside the origin need no third direction."""
    run = of_model(tmp_path, days[0], "model.backbone=wide_deep")

    def edit(task: SubnetTask) -> None:
        generator = torch.Generator().manual_seed(3)
        for shard in task.model.sharded.local_shards():
            rows, width = len(shard.tensor), shard.table.width
            plane = torch.randn(rows, 2, generator=generator) @ torch.randn(2, width, generator=generator)
            shard.tensor.copy_(plane + 5 * torch.randn(1, width, generator=generator))

    before = logits(run, change(run, WIDTH, edit))
    task, told, _ = begun(run, dict.fromkeys(NARROW, 2), Start.open(run.dir))
    assert told["fields"]["left"]["how"] == "turned, cut"
    torch.testing.assert_close(logits(run, task), before, atol=1e-3, rtol=1e-3)


def test_a_mean_is_that_of_the_rows_trained_on(tmp_path: Path, days: tuple[Path, Path]) -> None:
    run = of_model(tmp_path, days[0])
    task = change(run, WIDTH, constant_where_cut)
    tables, looked_up = whole_tables(task.model.sharded), []
    for batch in run.stream("train", run.schema.rows["train"], shuffle=False).epoch(0):
        looked_up.append(tables["big"][batch.sparse.to_dict()["big"].values()][:, :WIDTH])
    saved, moves = Saved(Start.open(run.dir).checkpoint), {"big": FieldMove(WIDTH, 5)}
    weights = {"big": shares(Data(days[0], run.schema), "big")}
    found = cut_means(saved, moves, weights, 0, one_rank()).columns["big"]
    assert not found[:5].any()
    torch.testing.assert_close(found[5:], torch.cat(looked_up).mean(0)[5:], atol=1e-4, rtol=1e-4)


def test_in_lists_too_rare_values_count_as_often_as_they_occur(tmp_path: Path) -> None:
    source, _ = make_lists(tmp_path, 600)
    prepare("table", source, tmp_path / "out", quiet=True, min_count=3)
    run = open_run(tmp_path / "out", tmp_path / "run", one_rank())
    rows = next(iter(run.stream("train", 10**6, shuffle=False).epoch(0)))
    for field in (f for f in run.schema.fields if f.pooling == "sum"):
        ids = rows.sparse[field.name].values().long()
        expected = torch.bincount(ids, minlength=field.cardinality).double() / rows.size
        assert field.name != "big" or expected[0] > 0.5, "the example must have rare values"
        found = shares(Data(tmp_path / "out", run.schema), field.name)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_products_of_means_are_those_of_pairs() -> None:
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0, 4.0]), torch.tensor([0.5])
    means = Means({"a": a, "b": b, "c": c}, {})
    assert means.products() == pytest.approx((3 - 2) + 0.5 + 1.5)
    assert means.beside("a", 3).tolist() == [3.5, -1.0, 4.0]
    assert means.beside("new", 1).tolist() == [4.5]
    assert Means({}, {}).products() == 0


def test_the_common_basis_of_a_search_is_that_of_the_tables_that_are_cut(
    tmp_path: Path, days: tuple[Path, Path]
) -> None:
    """What a search measures under ``basis: common`` is the model that fine-tuning begins with."""
    run = of_model(tmp_path, days[0])

    def edit(task: SubnetTask) -> None:
        generator = torch.Generator().manual_seed(4)
        for shard in task.model.sharded.local_shards():
            shard.tensor.copy_(torch.randn(shard.tensor.shape, generator=generator) + 0.5)

    model = change(run, WIDTH, edit).model
    batch = next(run.stream("train", run.schema.rows["train"], shuffle=False).epoch(0))
    sample = Sample.of(model, iter([batch]), torch.device("cpu"))
    moments = Moments(len(NARROW), WIDTH, torch.device("cpu"))
    moments.add(sample.x)
    measured = {
        name: TruncatedModel(model, sample, basis(moments), one_rank()).logits(list(NARROW.values()))[:256]
        for name, basis in (("common", common), ("variance", principal))
    }
    task, _, _ = begun(run, NARROW, Start.open(run.dir))
    torch.testing.assert_close(logits(run, task), measured["common"], atol=2e-3, rtol=1e-3)
    assert (logits(run, task) - measured["variance"]).abs().max() > 0.1
