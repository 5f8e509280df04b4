"""AutoEmb: popularity and controllers by hand, who learns when, and values whose popularity tells what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.errors import UserError
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.autoemb.method import AutoEmbTask, ControllerStage, averaged, mean_widths
from embsearch_dist.methods.gated.config import PopularityConfig
from embsearch_dist.methods.gated.popularity import Popularity, PopularityNet, bucket_of, popularity_of, row_by_row
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema
from tests.factories import one_rank, open_run, prepared, random_batch, small_config, small_schema

TRAINING = [
    "search.training.batch_size=128",
    "search.training.eval_batch_size=400",
    "search.training.epochs=5",
    "search.outer.lr=0.01",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def open_autoemb(data: Path, directory: Path, *words: str) -> Run:
    return open_run(small_config(data, directory, *TRAINING, *words, method="autoemb"), one_rank())


def search(data: Path, directory: Path, *words: str) -> Allocation:
    run, method = open_autoemb(data, directory, *words), METHODS["autoemb"]()
    check_stages(method, run)
    run_stages(method, run)
    return Allocation.load(directory / "allocation.json", run.schema)


# ---- popularity ----


def test_a_bucket_holds_the_counts_between_two_powers_of_two() -> None:
    counts = torch.tensor([0, 1, 2, 3, 4, 7, 8, 2**40])
    assert bucket_of(counts, 5).tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
    assert bucket_of(counts, 63).tolist() == [0, 1, 2, 2, 3, 3, 4, 41]
    assert bucket_of(counts, 2).tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_popularity_counts_the_training_rows(data: Path, tmp_path: Path) -> None:
    run = open_autoemb(data, tmp_path)
    ids = read_rows(data, run.schema, "train")[0]
    counts = [torch.bincount(own, minlength=n) for own, n in zip(ids.long(), run.schema.cardinalities, strict=True)]
    found = popularity_of(run, 128, 24)
    assert torch.equal(found.table, bucket_of(torch.cat(counts), 24))
    assert found.rows.sum(1).tolist() == [ids.shape[1]] * 4
    big = run.schema.names.index("big")
    assert int(found.rows[big, 1]) == int((counts[big] == 1).sum())
    batch = next(iter(run.stream("validation", 50, shuffle=False).epoch(0)))
    own = read_rows(data, run.schema, "validation", 50)[0].long()
    expected = torch.stack([bucket_of(c, 24)[i] for c, i in zip(counts, own, strict=True)], 1)
    assert torch.equal(found.of(batch.sparse), expected.long())


def test_a_list_is_as_popular_as_its_values_in_the_mean() -> None:
    schema = Schema("lists", (Field("one", 2), Field("many", 3, "sum")))
    popularity = Popularity(schema, torch.tensor([9, 1, 1, 4, 40]), 8)  # buckets 4, 1 and 1, 3, 6
    ids, lengths = torch.tensor([0, 1, 0, 0, 1, 2]), torch.tensor([1, 1, 1, 2, 0, 1])
    sparse = KeyedJaggedTensor(keys=["one", "many"], values=ids, lengths=lengths)
    assert popularity.of(sparse).tolist() == [[4, 2], [1, 0], [4, 6]]
    assert popularity.rows.tolist() == [[0, 1, 0, 0, 9, 0, 0, 0], [0, 1, 0, 4, 0, 0, 40, 0]]


# ---- the controllers ----


def test_a_controller_by_hand() -> None:
    """relu([1, -2] + [0.5, 0.5]) = [1.5, 0]; times [[1, 2], [3, 4]] and plus [0.1, 0.2] gives 1.6, 3.2."""
    net = PopularityNet(1, 2, PopularityConfig(buckets=2, width=2, hidden=2), seed=0, start=-1.0)
    assert torch.equal(net(), torch.full((1, 2, 2), -1.0))  # nothing is learned yet
    net.embedding.data = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]])
    net.inner.data, net.inner_bias.data = torch.eye(2)[None], torch.full((1, 1, 2), 0.5)
    net.last.data, net.last_bias.data = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.1, 0.2]]])
    torch.testing.assert_close(net(), torch.tensor([[[1.6, 3.2], [2.1, 3.2]]]))


def test_a_table_is_looked_up_row_by_row_and_filled_up_with_zeros() -> None:
    table = torch.arange(12.0).view(2, 3, 2)
    bucket = torch.tensor([[0, 2], [1, 0], [2, 2]])
    expected = torch.tensor([[[0.0, 1], [10, 11]], [[2, 3], [6, 7]], [[4, 5], [10, 11]]])
    assert torch.equal(row_by_row(table, bucket, 3), expected)
    filled = row_by_row(table, bucket, 64)
    assert torch.equal(filled[:3], expected) and filled.shape == (64, 2, 2) and not filled[3:].any()


def test_a_fields_weights_are_the_mean_over_its_rows() -> None:
    weights = torch.tensor([[[0.2, 0.8], [0.6, 0.4]], [[1.0, 0.0], [0.0, 1.0]]])
    shares = torch.tensor([[0.25, 0.75], [0.0, 0.0]])
    torch.testing.assert_close(averaged(weights, shares), torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(mean_widths(weights, [0, 10]), torch.tensor([[8.0, 4.0], [0.0, 10.0]]))


def test_what_a_value_is_seen_as_by_hand(data: Path, tmp_path: Path) -> None:
    """Candidates 2 and 4, popularity 1 / 4 against 3 / 4 for them: 1/4 tanh of the normalised prefix and 3/4 of all."""
    run = open_autoemb(data, tmp_path, "search.candidates=[0, 2, 4]")
    task = AutoEmbTask(run, training=True)
    batch = random_batch(run.schema, 64)
    u = torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([1e-9, 1.0, 3.0]).log().expand(4, 24, 3)
    whole = ((u - u.mean(0)) / (u.var(0, unbiased=False) + 1e-5).sqrt()).tanh()
    prefix = whole.clone()
    prefix[..., 2:] = 0
    torch.testing.assert_close(task.weigh(u, batch, scores), 0.25 * prefix + 0.75 * whole, rtol=1e-4, atol=1e-5)
    task.close()


def test_values_of_one_popularity_are_weighed_alike_whatever_they_need() -> None:
    """Where it must fail: half of the values of a field may need no width at all, the controller cannot tell them."""
    schema = small_schema(100, dense=0)
    popularity = Popularity(schema, torch.full((100,), 30), 8)
    net = PopularityNet(1, 3, PopularityConfig(buckets=8), seed=1)
    net.last.data.normal_(generator=torch.Generator().manual_seed(0))
    weights = row_by_row(net().softmax(2), popularity.of(random_batch(schema, 50).sparse), 50)
    assert torch.equal(weights, weights[:1].expand(50, 1, 3))


def test_held_out_rows_train_the_controllers_and_nothing_else(data: Path, tmp_path: Path) -> None:
    run = open_autoemb(data, tmp_path, "search.outer.pretrain_epochs=0.1", "search.outer.every=2")  # 2 steps of 25
    task = ControllerStage().task(run, training=True)
    batch = next(iter(run.stream("train", 128, shuffle=True).epoch(0)))
    for step in (0, 5):  # before and after the controllers set in
        task.loss(batch, step).backward()
        assert all(p.grad is None for p in task.net.parameters())
        assert any(p.grad is not None for p in task.model.bare_head.parameters())
        task.model.zero_grad(set_to_none=True)
    buffers = {n: b.clone() for n, b in task.model.replicated.named_buffers()}
    assert task.outer_loss(5) is None
    loss = task.outer_loss(4)
    assert loss is not None
    loss.backward()
    assert task.net.last_bias.grad.abs().sum() > 0
    assert all(torch.equal(b, buffers[n]) for n, b in task.model.replicated.named_buffers())
    task.close()


# ---- what it finds ----


@pytest.fixture(scope="module")
def popular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``item`` has 12 values of 70% of the rows, which interact with ``place``, and 1500 others, which mean nothing."""
    import polars as pl

    from embsearch_dist.data.prepare.pipeline import prepare

    folder, rows, rng = tmp_path_factory.mktemp("popular"), 5000, np.random.default_rng(0)
    known, place = rng.random(rows) < 0.7, rng.integers(0, 8, rows)
    item = np.where(known, rng.integers(0, 12, rows), 12 + rng.integers(0, 1500, rows))
    table = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 8))
    logit = np.where(known, 1.5 * table[np.minimum(item, 11), place], 0.0)
    click = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    pl.DataFrame({"click": click, "item": item, "place": place}).write_csv(folder / "clicks.csv")
    fields = "item: categorical, place: categorical"
    (folder / "clicks.yaml").write_text(f"files: clicks.csv\nlabel: click\nfields: {{{fields}}}\n")
    prepare("table", folder / "clicks.yaml", folder / "out", quiet=True)
    return folder / "out"


def test_values_that_are_met_often_are_weighed_wide_and_rare_ones_narrow(popular: Path, tmp_path: Path) -> None:
    words = ["search.candidates=[0, 2, 8]", "search.training.epochs=8", "search.outer.lr=0.002", "model.backbone=mlp"]
    found = search(popular, tmp_path, *words)
    item = dict(zip(found.schema.names, found.provenance["width_by_popularity"], strict=True))["item"]
    # A frequent item has some 230 training rows of 4000; most of the rare ones one to three.
    assert item[8] > 5 > 1 > max(item[1:3])


def test_fields_that_do_not_matter_are_dropped_and_budgets_are_held(data: Path, tmp_path: Path) -> None:
    found = search(data, tmp_path, "search.candidates=[0, 2, 4, 8]", "search.pareto=[60]")
    assert found.widths["big"] == found.widths["idle"] == 0
    assert min(found.widths["left"], found.widths["right"]) >= 2  # the planted rank
    some = Allocation.load(tmp_path / "allocations" / "autoemb-60.json", found.schema)
    assert 0 < some.total("parameters") <= 60
    assert some.provenance["probabilities"] == found.provenance["probabilities"]


def test_a_first_candidate_of_a_width_that_tables_cannot_have_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.candidates: the widest must be a multiple of 4"):
        open_autoemb(data, tmp_path, "search.candidates=[2, 6]")
