"""Steps that must not wait for a GPU: no boolean mask, the same bits as with one, and subnets drawn ahead."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torchrec.distributed import dist_data

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.methods.adass.ahead import AHEAD, Subnets
from embsearch_dist.methods.adass.config import SamplingConfig
from embsearch_dist.methods.adass.sampling import Sampler
from embsearch_dist.models.norm import UnifyNorm
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.statistics import BLOCK_ROWS, block_rows
from embsearch_dist.sharding.tables import Table
from tests.factories import one_rank, random_batch, rank_context, small_schema
from tests.raw_lists import list_schema, random_lists
from tests.waits import Waits

FIELDS, ROWS, WIDTH = 4, 20, 6
# Field 0 is dropped and shares a candidate with field 2, which is kept; candidate 1 is a dropped field's alone.
CHOICE, KEEP = torch.tensor([2, 0, 2, 1]), torch.tensor([False, True, True, False])
SCHEMA = small_schema(1000, 50, 10)


def masked_update(norm: UnifyNorm, before: Any, choice: torch.Tensor, keep: torch.Tensor, u: torch.Tensor) -> Any:
    """Running statistics after a step as boolean masks write them, from those before it."""
    row = torch.arange(FIELDS) if norm.kind == "field" else torch.zeros_like(choice)
    mean, variance = (b.clone() for b in before)
    if norm.kind == "field" and not norm.synchronise:
        running = mean[row, choice].flatten(), variance[row, choice].flatten()
        flat = u.transpose(0, 1).reshape(ROWS, FIELDS * WIDTH)
        torch.nn.functional.batch_norm(flat, *running, training=True, momentum=norm.momentum, eps=norm.eps)
        for buffer, new in zip((mean, variance), running, strict=True):
            buffer[row[keep], choice[keep]] = new.view(FIELDS, WIDTH)[keep]
        return mean, variance
    found, biased, count = norm._batch_moments(u, choice, keep)
    unbiased = biased * (count / (count - 1).clamp(min=1))
    for buffer, new in ((mean, found), (variance, unbiased)):
        old = buffer[row[keep], choice[keep]]
        buffer[row[keep], choice[keep]] = old + norm.momentum * (new[keep] - old)
    return mean, variance


@pytest.mark.parametrize(("kind", "synchronise"), [("field", False), ("field", True), ("width", False)])
def test_running_statistics_have_the_bits_that_masks_would_give_and_nothing_waits(kind: str, synchronise: bool) -> None:
    one_rank()
    norm = UnifyNorm(FIELDS, 3, WIDTH, kind, 0.1, synchronise)
    for step in range(3):
        u = torch.randn(FIELDS, ROWS, WIDTH) * 2 + 1
        before = norm.mean.clone(), norm.variance.clone()
        expected = masked_update(norm, before, CHOICE, KEEP, u)
        with Waits() as waits:
            norm(u, CHOICE, KEEP)
        assert torch.equal(norm.mean, expected[0]), step
        assert torch.equal(norm.variance, expected[1]), step
        assert not torch.equal(norm.mean, before[0])
        assert waits.found == []


def test_without_dropped_fields_all_statistics_move() -> None:
    every = torch.ones(FIELDS, dtype=torch.bool)
    for kind in ("field", "width"):
        plain, masked = (UnifyNorm(FIELDS, 3, WIDTH, kind, 0.1, False) for _ in range(2))
        u = torch.randn(FIELDS, ROWS, WIDTH)
        assert torch.equal(plain(u, CHOICE), masked(u, CHOICE, every))
        assert torch.equal(plain.mean, masked.mean)
        assert torch.equal(plain.variance, masked.variance)
        assert int((plain.mean != 0).any(-1).sum()) == (4 if kind == "field" else 3)


def sampler(**changes: Any) -> Sampler:
    one = Sampler(SamplingConfig(**changes), SCHEMA, [0, 2, 4, 8], 5, warmup_steps=6)
    one.start(torch.full((3, 4), 0.5))
    return one


def update(one: Sampler) -> None:
    one.update(torch.rand(3, 4), torch.rand(3), torch.rand(3))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("mode", "subnets"), [("adaptive", 1), ("weighted_uniform", 1), ("adaptive", 4)])
def test_subnets_drawn_ahead_are_those_drawn_step_by_step(mode: str, subnets: int, rank: int) -> None:
    ahead, plain = (sampler(mode=mode, update_every=4, subnets=subnets) for _ in range(2))
    drawn = Subnets(ahead, rank_context(rank, 2))
    for step in range(3, 20):  # from amid a warm-up, over several updates
        choices, keeps = drawn.of(step)
        expected = plain.draw_all(step, rank)
        assert len(choices) == subnets or step < 6
        assert torch.equal(choices, expected[0])
        assert torch.equal(keeps, expected[1])
        assert torch.equal(drawn.kept(step), expected[1].any(0).nonzero().squeeze(1))
        if plain.due(step):
            for one in (ahead, plain):
                torch.manual_seed(step)
                update(one)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_loaded_state_and_another_step_are_drawn_anew(in_place: bool) -> None:
    ahead, other = sampler(), sampler()
    update(other)
    subnets = Subnets(ahead, one_rank())
    subnets.of(10)
    if in_place:
        ahead.logits_e.copy_(other.logits_e)
        ahead.logits_f.copy_(other.logits_f)
    else:
        ahead.load_state(other.state())
    for step in (11, 3, 40):
        for found, expected in zip(subnets.of(step), other.draw(step), strict=True):
            assert torch.equal(found, expected[None])


def test_subnets_are_drawn_up_to_the_next_update_and_no_further() -> None:
    one = sampler(update_every=10)
    subnets = Subnets(one, one_rank())
    with mock.patch.object(one, "draw", wraps=one.draw) as drawn:
        for step in range(14, 20):
            subnets.of(step)
        assert [call.args[0] for call in drawn.call_args_list] == list(range(14, 20))
    with mock.patch.object(one, "due", return_value=False), mock.patch.object(one, "draw", wraps=one.draw) as drawn:
        subnets.of(20)
        assert drawn.call_count == AHEAD


def test_a_gpu_sums_columns_in_few_large_blocks() -> None:
    assert block_rows(64, torch.device("cpu")) == block_rows(8, torch.device("cpu")) == BLOCK_ROWS
    gpu = torch.device("cuda", 0)
    assert 33_800_000 / block_rows(64, gpu) < 300  # about ten launches each
    assert block_rows(64, gpu) * 64 == block_rows(16, gpu) * 16  # the same memory, however wide
    assert block_rows(4096, gpu) == BLOCK_ROWS


@pytest.mark.parametrize("lists", [False, True])
def test_one_rank_looks_up_as_torchrec_does_without_an_order_for_others(lists: bool) -> None:
    schema = list_schema() if lists else SCHEMA
    batch = random_lists(schema) if lists else random_batch(schema)
    tables = [Table.of(f, 4 * k + 4) for k, f in enumerate(schema.fields)]
    tables.reverse()  # fields have to be put into the tables' order
    sharded = ShardedTables(tables, one_rank(), DistConfig(), OptimConfig(), 0, 0.1)
    expected = sharded.collection(batch.sparse)
    with mock.patch.object(dist_data, "_get_recat", side_effect=AssertionError("copied to the device")):
        found = sharded.exchange.look_up(batch.sparse)
    assert found.keys() == expected.keys()
    assert torch.equal(found.values(), expected.values())
