"""The order of samples is a function of seed and epoch alone: any number of ranks, at any time, sees the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.schema import Schema
from tests.factories import prepared_rows

ROWS = 1000
WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 training, 100 validation and 100 test rows; dense ``x`` tells any two rows apart."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [f"{i * 7 % 2},{i},{i % 13},{i}" for i in range(ROWS)]
    return prepared_rows(folder, lines, "n")


def cells(batch: Batch) -> np.ndarray:
    return np.column_stack([batch.sparse.values().numpy(), batch.dense.numpy(), batch.label.numpy()])


def global_batches(
    directory: Path, world: int, epoch: int, start: int = 0, split: str = "train", batch: int = 96, shuffle: bool = True
) -> list[np.ndarray]:
    """The global batches of an epoch from ``start`` on, put together from all ranks in their order."""
    ranks = []
    for rank in range(world):
        stream = BatchStream(
            directory, Schema.load(directory), split, batch, rank, world, shuffle, seed=3, window_rows=200
        )
        ranks.append([cells(b) for b in stream.epoch(epoch, start)])
    assert len({len(batches) for batches in ranks}) == 1, "ranks must agree on the number of batches"
    return [np.concatenate(parts) for parts in zip(*ranks, strict=True)]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for k, (a, b) in enumerate(zip(found, wanted)):
        assert np.array_equal(a, b), f"batch {k}"


# 96: a tail of 32 rows is dropped; 97: nothing divides evenly; 100: no tail; 900: one batch of all rows.
@pytest.mark.parametrize("batch", [96, 97, 100, 900])
def test_every_number_of_ranks_trains_on_the_same_global_batches(prepared: Path, batch: int) -> None:
    for epoch in (0, 5):
        alone = global_batches(prepared, 1, epoch, batch=batch)
        assert len(alone) == max(1, 800 // batch), "the tail is dropped, whatever the number of ranks"
        assert all(len(b) == min(batch, 800) for b in alone)
        for world in WORLDS[1:]:
            assert_same(global_batches(prepared, world, epoch, batch=batch), alone)


@pytest.mark.parametrize("then", WORLDS)
def test_another_number_of_ranks_goes_on_in_the_middle_where_the_first_stopped(prepared: Path, then: int) -> None:
    whole = [b for epoch in (0, 1) for b in global_batches(prepared, 1, epoch)]
    assert len(whole) == 16
    for first in WORLDS:
        for stop in (1, 5, 8):
            begun = global_batches(prepared, first, 0)[:stop]
            rest = global_batches(prepared, then, 0, start=stop) + global_batches(prepared, then, 1)
            assert_same(begun + rest, whole)


@pytest.mark.parametrize("batch", [33, 40])
def test_every_number_of_ranks_evaluates_all_rows_in_one_order(prepared: Path, batch: int) -> None:
    """Only where the last batch is cut depends on the ranks: a rest of fewer rows than ranks joins the one before."""
    alone = global_batches(prepared, 1, 0, split="test", batch=batch, shuffle=False)
    assert len(np.concatenate(alone)) == 100
    for world in WORLDS[1:]:
        found = global_batches(prepared, world, 0, split="test", batch=batch, shuffle=False)
        assert np.array_equal(np.concatenate(found), np.concatenate(alone))
        assert_same(found[:2], alone[:2])


@pytest.mark.parametrize(("world", "batch"), [(1, 50), (2, 50), (3, 50), (4, 7), (3, 5000)])
def test_means_over_ranks_weighed_by_their_rows_are_those_of_the_global_batch(
    prepared: Path, world: int, batch: int
) -> None:
    schema = Schema.load(prepared)
    ranks = [BatchStream(prepared, schema, "train", batch, rank=r, world_size=world) for r in range(world)]
    batches = [next(iter(stream.epoch(0))) for stream in ranks]
    weights = [stream.weight(own) for stream, own in zip(ranks, batches, strict=True)]
    mean = sum(w * float(b.dense.mean()) for w, b in zip(weights, batches, strict=True)) / world
    assert mean == pytest.approx(float(np.concatenate([b.dense.numpy() for b in batches]).mean()), abs=1e-6)
    assert (set(weights) == {1.0}) == (len({b.size for b in batches}) == 1)
