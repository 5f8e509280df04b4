"""Tables of list fields against torch's embedding_bag, and the search and the training on them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.models.tables import MixedTables
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.plan import Topology
from embsearch_dist.sharding.planning import make_plan
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table, make_collection
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer
from tests.factories import one_rank, open_run, small_config, streams, table_gradients, whole_tables
from tests.raw_lists import list_schema, make_lists, plain_pooled, random_lists


def sharded(schema: Schema, optimizer: str = "adam", lr: float = 1.0) -> ShardedTables:
    tables = [Table.of(f, 8) for f in schema.fields]
    return ShardedTables(tables, one_rank(), DistConfig(), OptimConfig(embedding=optimizer, embedding_lr=lr), 0, 0.5)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("empty", ["", "mean", "sum", "scaled"])
def test_pooling_and_its_gradients_are_those_of_embedding_bag(weighted: bool, empty: str) -> None:
    schema = list_schema(weighted=weighted)
    tables, batch = sharded(schema, "sgd", lr=1e4), random_lists(schema, empty=empty)
    before = whole_tables(tables)
    pooled = tables(batch.sparse).to_dict()
    leaves = {n: t.clone().requires_grad_() for n, t in before.items()}
    plain = {f.name: plain_pooled(leaves[f.name], f, batch) for f in schema.fields}
    for name, expected in plain.items():
        torch.testing.assert_close(pooled[name], expected, rtol=1e-6, atol=1e-6)
        nothing = batch.sparse[name].lengths() == 0
        assert not pooled[name][nothing].any() and (nothing.any() or name == "one")
    torch.stack([pooled[n].pow(3).sum() for n in plain]).sum().backward()
    torch.stack([x.pow(3).sum() for x in plain.values()]).sum().backward()
    for name, gradient in table_gradients(tables, before).items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_optimizers_inside_backward_see_the_pooled_gradient(optimizer: str) -> None:
    schema = list_schema()
    tables, batch = sharded(schema, optimizer), random_lists(schema)
    before = {n: t.clone().requires_grad_() for n, t in whole_tables(tables).items()}
    tables(batch.sparse).values().sum().backward()
    sum(plain_pooled(before[f.name], f, batch).sum() for f in schema.fields).backward()  # type: ignore[union-attr]
    for name, after in whole_tables(tables).items():
        gradient = before[name].grad
        assert gradient is not None
        state = gradient.square() if optimizer == "adagrad" else gradient.square().mean(1, keepdim=True)
        step = gradient if optimizer == "sgd" else gradient / (state.sqrt() + 1e-8)
        torch.testing.assert_close(after, before[name].detach() - step, rtol=1e-4, atol=1e-4)


def test_only_weighted_fields_make_weighted_collections_and_only_means_are_divided() -> None:
    def collection(*tables: Table) -> EmbeddingBagCollection:
        return make_collection(tables)

    plain, mean = Table("a", 9, 4), Table("b", 9, 4, mean=True)
    assert not collection(plain, mean).is_weighted()
    assert collection(plain, mean, Table("c", 9, 4, weighted=True)).is_weighted()
    schema = list_schema(weighted=False)
    tables = sharded(Schema("x", tuple(f for f in schema.fields if f.name != "mean"), ()))
    assert not tables.means and sharded(schema).means


def test_a_mean_leaves_the_bits_of_the_other_fields_alone() -> None:
    schema = list_schema(weighted=False)
    batch = random_lists(schema)
    found = sharded(schema)(batch.sparse).to_dict()
    without = sharded(Schema("x", tuple(f for f in schema.fields if f.name != "mean"), ()))
    for name, value in without(batch.sparse).to_dict().items():
        assert torch.equal(found[name], value)


def test_a_model_that_drops_the_weighted_field_still_reads_the_batch() -> None:
    schema = list_schema()
    allocation = Allocation(schema, {"one": 4, "mean": 6, "sum": 2, "scaled": 0})
    tables = MixedTables(allocation, one_rank(), DistConfig(), OptimConfig(), 0, 0.5)
    batch = random_lists(schema)
    assert batch.sparse.weights_or_none() is not None
    whole, pooled = whole_tables(tables.sharded), tables(batch.sparse)
    for start, width, name in zip(pooled.starts, pooled.widths, ("one", "mean", "sum"), strict=True):
        field = next(f for f in schema.fields if f.name == name)
        expected = plain_pooled(whole[name], field, batch)[:, :width]
        torch.testing.assert_close(pooled.values[:, start : start + width], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["none", "field"])
def test_the_scorer_scores_subnets_of_lists_as_the_supernet_does(norm: str) -> None:
    schema, candidates = list_schema(), [0, 2, 6]
    config = small_config("no-data", "no-run", f"model.norm={norm}", "model.init_std=0.5", "model.gain=1")
    model = SupernetModel(config, schema, candidates, "shared", one_rank(), True).eval()
    batches = [random_lists(schema, rows, rows) for rows in (100, 100, 37)]
    scorer = SubnetScorer(model, batches, one_rank())
    choices = torch.tensor(list(itertools.product(range(3), repeat=4)))
    found = scorer.logits(choices)
    if norm == "field":  # the statistics of the sample, as the scorer takes them
        unify = model.bare_head.unify
        with torch.no_grad():
            pooled = torch.cat([model.tables(b.sparse).stack() for b in batches], 1)
            for j in range(len(candidates)):
                u = unify.mapped(pooled, torch.full((4,), j))
                unify.norm.mean[:, j], unify.norm.variance[:, j] = u.mean(1), u.var(1, unbiased=False)
    keep = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        for choice, logits in zip(choices, found, strict=True):
            own = torch.cat([model(b, choice, keep)[0] for b in batches])
            torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)


def test_a_model_learns_from_every_value_of_a_list(tmp_path: Path) -> None:
    """The click depends on whether any tag is a good one: with the first tag alone the AUC is far lower."""
    source, _ = make_lists(tmp_path, rows=6000, fields="\n  tags: {kind: list, pooling: sum, max_length: 4}\n")
    first = source.with_name("first.yaml")
    first.write_text(source.read_text().replace("max_length: 4", "max_length: 1"))
    auc = {}
    for path in (source, first):
        prepare("table", path, tmp_path / path.stem / "out", quiet=True)
        config = small_config(
            tmp_path / path.stem / "out",
            tmp_path / path.stem / "run",
            "train.epochs=6",
            "optim.embedding_l2=0",
            "optim.embedding_lr=0.01",
        )
        run = open_run(config, one_rank())
        task = SubnetTask(config, Allocation.uniform(run.schema, 8), run.context)
        with Monitor(run.dir, "fit", 0, quiet=True) as monitor:
            Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, run.dir / "c").fit()
        task.model.eval()
        test = run.stream("test", 200, shuffle=False)
        auc[path.stem] = evaluate(task.predict, test.epoch(0), run.context)["auc"]
    assert auc["source"] > 0.75 and auc["source"] > auc["first"] + 0.1, auc


@pytest.mark.parametrize("sharding", ["planner", "row_wise"])
def test_a_plan_counts_what_a_list_looks_up(sharding: str) -> None:
    dist, found = DistConfig(sharding=sharding, tables={"f": "row_wise"}), []
    for length in (1.0, 50.0):
        topology = Topology(4, 4, "cuda", dist.planner)
        (placement,) = make_plan([Table("f", 100_000, 32, length=length)], topology, dist, "adam").placements
        found.append((placement.shards[0].times[0], placement.shards[0].hbm))
    assert found[1][0] > 5 * found[0][0] and found[1][1] > found[0][1]
    no_value_at_all = [Table("f", 100_000, 32, length=0.0)]
    assert make_plan(no_value_at_all, topology, dist, "adam").placements[0].kind == "row_wise"


def test_the_loss_of_a_batch_with_an_empty_field_is_finite() -> None:
    schema = list_schema()
    config = small_config("no-data", "no-run")
    model = SupernetModel(config, schema, [0, 2, 6], "shared", one_rank(), True)
    batch = random_lists(schema, empty="mean")
    logits, _ = model(batch, torch.full((4,), 2), torch.ones(4, dtype=torch.bool))
    loss = binary_cross_entropy_with_logits(logits, batch.label)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
