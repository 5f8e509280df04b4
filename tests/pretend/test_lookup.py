"""The look-up that is written again for the pretend device, against FBGEMM's own for CPU and against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table
from tests.factories import one_rank
from tests.pretend.worker import Worker
from tests.raw_lists import list_schema, random_lists

WIDTHS = {"one": 4, "mean": 8, "sum": 20, "scaled": 64}
STEPS = 3
Figures = dict[str, list[Any]]


def context(device: str) -> Context:
    one_rank()
    return Context(0, 1, torch.device(device))


def tables_on(device: str, schema: Schema, optimizer: str, lr: float) -> ShardedTables:
    tables = [Table.of(f, WIDTHS[f.name]) for f in schema.fields]
    optim = OptimConfig(embedding=optimizer, embedding_lr=lr)
    return ShardedTables(tables, context(device), DistConfig(), optim, seed=3, init_std=0.5)


def whole(sharded: ShardedTables) -> dict[str, torch.Tensor]:
    return {s.table.name: s.tensor.detach().to("cpu", copy=True) for s in sharded.local_shards()}


def learn(device: str, optimizer: str, weighted: bool, empty: str) -> Figures:
    """Pooled rows of every step, and the tables after the last; gradients are random."""
    schema = list_schema(weighted=weighted)
    sharded = tables_on(device, schema, optimizer, 0.1)
    order = schema.names
    found: Figures = {"pooled": [], **{name: [] for name in order}}
    dice = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        sharded.set_lr(1.0 / (step + 1))
        sharded.zero_grad()
        batch = random_lists(schema, 32, step, empty).to(torch.device(device))
        pooled = sharded(batch.sparse).to_dict()
        assert all(v.device.type == torch.device(device).type for v in pooled.values())
        together = torch.cat([pooled[name] for name in order], 1)
        together.backward(torch.randn(together.shape, generator=dice).to(device))
        sharded.step()
        found["pooled"].append(together.detach().tolist())
    return found | {name: [value.tolist()] for name, value in whole(sharded).items()}


@pytest.mark.parametrize("weighted, empty", [(True, ""), (False, "sum"), (True, "scaled")])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_pooled_rows_and_updates_are_those_of_fbgemm_on_cpu(
    pretend: Worker, optimizer: str, weighted: bool, empty: str
) -> None:
    device, host = (pretend(learn, where, optimizer, weighted, empty) for where in ("cuda", "cpu"))
    for name, values in host.items():
        torch.testing.assert_close(torch.tensor(device[name]), torch.tensor(values), rtol=1e-5, atol=1e-6)
    started = pretend(untouched, weighted)
    assert all(host[name][0] != started[name] for name in WIDTHS if name != empty), "the tables have learned"


def untouched(weighted: bool) -> dict[str, Any]:
    return {n: v.tolist() for n, v in whole(tables_on("cuda", list_schema(weighted=weighted), "sgd", 0.1)).items()}


def adam() -> tuple[Figures, Figures]:
    """The device's tables, and those of the formula (FBGEMM's: of the rows looked up, steps counted for all rows)."""
    schema = list_schema()
    sharded = tables_on("cuda", schema, "adam", 0.1)
    tables = whole(sharded)
    moments = {n: (torch.zeros_like(t), torch.zeros_like(t)) for n, t in tables.items()}
    dice = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        batch = random_lists(schema, 32, step)
        pooled = sharded(batch.to(torch.device("cuda")).sparse).to_dict()
        loss = torch.zeros((), device="cuda")
        for field in schema.fields:
            gradient = torch.randn(32, WIDTHS[field.name], generator=dice)
            loss = loss + (pooled[field.name] * gradient.to("cuda")).sum()
            one = batch.sparse[field.name]
            total, looked_up = torch.zeros_like(tables[field.name]), set()
            ends = one.offsets().tolist()
            for row, (first, last) in enumerate(zip(ends, ends[1:])):
                for place in range(first, last):
                    number = int(one.values()[place])
                    scale = (
                        one.weights()[place] if field.weighted else 1 / (last - first) if field.pooling == "mean" else 1
                    )
                    total[number] += scale * gradient[row]
                    looked_up.add(number)
            rows = sorted(looked_up)
            m, v = moments[field.name]
            m[rows] = 0.9 * m[rows] + 0.1 * total[rows]
            v[rows] = 0.999 * v[rows] + 0.001 * total[rows] ** 2
            corrected, spread = m[rows] / (1 - 0.9**step), (v[rows] / (1 - 0.999**step)).sqrt()
            tables[field.name][rows] -= 0.1 * corrected / (spread + 1e-8)
        loss.backward()
        sharded.step()
    return ({n: t.tolist() for n, t in whole(sharded).items()}, {n: t.tolist() for n, t in tables.items()})


def test_adam_moves_the_rows_that_were_looked_up(pretend: Worker) -> None:
    device, formula = pretend(adam)
    for name, values in formula.items():
        torch.testing.assert_close(torch.tensor(device[name]), torch.tensor(values), rtol=1e-4, atol=1e-5)


def look_up_on_the_host() -> str:
    schema = list_schema()
    sharded = tables_on("cuda", schema, "sgd", 0.1)
    try:
        sharded(random_lists(schema).sparse)
    except RuntimeError as e:
        return str(e)
    return ""


def test_ids_on_the_host_are_refused(pretend: Worker) -> None:
    assert "on the CPU" in pretend(look_up_on_the_host)
