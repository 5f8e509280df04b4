"""Several subnets a step: their loss, who teaches whom, and which columns move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.models.tables import MaxTables
from embsearch_dist.train.guard import Gate
from tests.factories import one_rank, open_run, prepared, small_config, streams, whole_tables


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def made(data: Path, directory: Path, *overrides: str) -> tuple[SupernetTask, Any]:
    """A supernet with four subnets a step, and a batch."""
    run = open_run(small_config(data, directory, "search.sampling.subnets=4", *overrides), one_rank())
    return SupernetTask(run), next(iter(streams(run)[0].epoch(0)))


def test_the_widest_learns_from_labels_and_the_others_from_the_widest(data: Path, tmp_path: Path) -> None:
    task, batch = made(data, tmp_path, "model.init_std=0.5", "optim.embedding_l2=0.1")
    choices, keeps = task.sampler.draw_all(3)
    assert len(choices) == 4
    head = list(task.model.head.parameters())
    found = task.loss(batch, 3)
    with torch.no_grad():
        pooled = task.model.tables(batch.sparse)
    logits = [task.model.head(batch.dense, pooled, c, k) for c, k in zip(choices, keeps, strict=True)]
    targets = [batch.label] + [torch.sigmoid(logits[0].detach())] * 3
    expected = sum(binary_cross_entropy_with_logits(x, t) for x, t in zip(logits, targets, strict=True)) / 4
    assert isinstance(expected, torch.Tensor)
    mask = task.model.tables.mask
    size = pooled.stack().square().sum(1)
    l2 = sum(float((size * mask[c] * k[:, None]).sum()) for c, k in zip(choices, keeps, strict=True)) / 4
    assert float(found.detach()) == pytest.approx(float(expected.detach()) + 0.1 * l2 / batch.size, rel=1e-5)
    gradients = [torch.autograd.grad(x, head, allow_unused=True) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def step(task: SupernetTask, batch: Any, number: int) -> None:
    """One step of the tables, as the trainer takes it."""
    with Gate(task.model.sharded) as gate:
        task.loss(batch, number).backward()
        gate.pass_on()
        task.model.sharded.step()


def test_a_column_moves_when_any_subnet_of_the_step_reads_it(data: Path, tmp_path: Path) -> None:
    """Under Adam, with a table per candidate, so that the widest does not read all columns."""
    task, batch = made(data, tmp_path, "model.init_std=0.3", "search.scheme=independent", "optim.embedding=adam")
    tables = task.model.tables
    assert isinstance(tables, MaxTables)
    for number in (3, 4, 6):
        before = {n: t.clone() for n, t in whole_tables(tables.sharded).items()}
        step(task, batch, number)
        choices, keeps = task.sampler.draw_all(number)
        read = (tables.mask[choices] * keeps[..., None]).amax(0)
        assert 0 < read.sum() < read.numel()
        for f, (name, table) in enumerate(whole_tables(tables.sharded).items()):
            rows = batch.sparse[name].values().long().unique()
            moved = table[rows] != before[name][rows]
            assert not moved[:, read[f] == 0].any()
            assert moved[:, read[f] == 1].double().mean() > 0.9  # a ReLU may close a row's path
            others = torch.ones(len(table), dtype=torch.bool)
            others[rows] = False
            assert torch.equal(table[others], before[name][others])


def test_the_sampler_learns_from_all_subnets_of_a_step(data: Path, tmp_path: Path) -> None:
    """The widest keeps every field, so every field has a gradient of its own."""
    task, batch = made(data, tmp_path, "model.init_std=0.3", "search.sampling.update_every=1")
    with Gate(task.model.sharded):
        task.loss(batch, 0).backward()
    assert task._gradient is not None and task._size is not None
    assert (task._gradient > 0).all()
    assert task._gradient.unique().numel() == len(task._gradient)
    pooled = task.model.tables(batch.sparse).stack().detach()
    torch.testing.assert_close(task._size, pooled.abs().mean((1, 2)))
