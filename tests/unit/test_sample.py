"""Rows drawn at random from a split: which they are, and how ranks share them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embsearch_dist.data.load.dataset import open_split, read_rows
from embsearch_dist.data.load.sample import random_batches
from embsearch_dist.data.store.shards import Shards
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema
from tests.factories import prepared_rows

ROWS = 800


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """800 rows in 13 row groups; the dense column ``x`` grows with the time."""
    folder = tmp_path_factory.mktemp("sample")
    return open_split(prepared_rows(folder, [f"{i % 2},{i},k{i % 9},{i}" for i in range(1000)], "key"), "train")


def drawn(shards: Shards, count: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """The ``x`` of the drawn rows in their order, as whole numbers."""
    batches = random_batches(shards, count, 64, seed, rank, world_size)
    assert all(b.size for b in batches)
    return torch.cat([b.dense[:, 0] for b in batches]).numpy()


def test_the_sample_spreads_over_the_whole_split(shards: Shards) -> None:
    everything = read_rows(shards.directory.parent, Schema.load(shards.directory.parent), "train")[1][:, 0].numpy()
    found = drawn(shards, 200)
    assert len(np.unique(found)) == 200
    parts, _ = np.histogram(np.searchsorted(np.sort(everything), found), 4, (0, ROWS))
    assert parts.min() > 30  # of 50 expected


def test_the_whole_split_is_each_row_once(shards: Shards) -> None:
    everything = read_rows(shards.directory.parent, Schema.load(shards.directory.parent), "train")[1][:, 0].numpy()
    for count in (ROWS, 10 * ROWS):
        assert np.array_equal(np.sort(drawn(shards, count)), np.sort(everything))


def test_ids_and_labels_stay_with_their_rows(shards: Shards) -> None:
    ids, dense, label = read_rows(shards.directory.parent, Schema.load(shards.directory.parent), "train")
    of = {float(x): (int(i), float(y)) for x, i, y in zip(dense[:, 0], ids[0], label, strict=True)}
    for batch in random_batches(shards, 150, 64, 1):
        found = zip(batch.dense[:, 0], batch.sparse.values(), batch.label, strict=True)
        assert all(of[float(x)] == (int(i), float(y)) for x, i, y in found)


def test_any_number_of_ranks_draws_the_same_rows_in_as_many_batches(shards: Shards) -> None:
    one = np.sort(drawn(shards, 301, seed=5))
    for world in (2, 3):
        parts = [drawn(shards, 301, 5, rank, world) for rank in range(world)]
        assert np.array_equal(np.sort(np.concatenate(parts)), one)
        assert len({len(random_batches(shards, 301, 64, 5, rank, world)) for rank in range(world)}) == 1
    assert not np.array_equal(np.sort(drawn(shards, 301, seed=6)), one)


def test_the_rows_of_a_rank_are_in_random_order(shards: Shards) -> None:
    found = drawn(shards, 400)
    halves = found[:200].mean(), found[200:].mean()
    assert abs(halves[0] - halves[1]) < 0.35 * found.std()  # in stored order they would be 1.7 apart
    assert np.array_equal(found, drawn(shards, 400))


def test_a_sample_smaller_than_the_ranks_is_refused(shards: Shards) -> None:
    with pytest.raises(UserError, match="2 rows is too small for 3 ranks"):
        random_batches(shards, 2, 64, 0, 0, 3)
