"""Eq. 5 by growth: steps that follow the size of a difference, a bound that is kept, and the candidates it compares."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass.config import SamplingConfig
from embsearch_dist.methods.adass.distinct import describe
from embsearch_dist.methods.adass.sampling import Sampler, column_variance, own_columns
from embsearch_dist.models.distinct import candidate_mask
from embsearch_dist.models.tables import MaxTables
from embsearch_dist.sharding.statistics import column_sums
from tests.factories import CONFIGS, one_rank, small_schema, whole_tables

SCHEMA = small_schema(1000, 50, 10)
CANDIDATES = [2, 4, 8, 16]
EVEN = torch.ones(3)
FIRST = torch.tensor([[1e-4, 2e-4, 3e-4, 1e-4], [1e-4, 1e-4, 1e-4, 1e-4], [5e-4, 1e-4, 2e-4, 1e-4]])


def started(distinct: torch.Tensor | None = None, candidates: list[int] = CANDIDATES, **changes: Any) -> Sampler:
    s = Sampler(SamplingConfig(**changes), SCHEMA, candidates, 0, distinct=distinct)
    s.start(FIRST)
    return s


def after(s: Sampler, growth: torch.Tensor, updates: int) -> torch.Tensor:
    """P_E after updates of constant growth."""
    for _ in range(updates):
        s.update(FIRST.double() * growth, EVEN, EVEN)
    return s.probabilities()[0]


def test_equal_growth_is_uniform_whatever_variances_began_with_and_however_large() -> None:
    for growth in (0.5, 1.0, 300.0):
        torch.testing.assert_close(after(started(), torch.full((3, 4), growth), 200), torch.full((3, 4), 0.25))


def test_equal_growth_brings_back_what_a_difference_has_moved() -> None:
    s = started()
    apart = after(s, torch.tensor([[1.0, 2, 3, 4]] * 3), 100)
    assert apart[0, 0] > 0.3
    torch.testing.assert_close(after(s, torch.full((3, 4), 2.0), 200), torch.full((3, 4), 0.25), atol=1e-4, rtol=0)


def test_a_ten_thousandth_moves_nothing_that_counts_however_long_it_lasts() -> None:
    """The printed LayerNorm takes the same difference to its bounds."""
    growth = torch.tensor([[1.0, 1.0001, 1.0001, 1.0001]] * 3, dtype=torch.float64)
    p_e = after(started(), growth, 300)
    torch.testing.assert_close(p_e, torch.full((3, 4), 0.25), rtol=0.01, atol=0)
    assert after(started(eq5="layernorm"), growth / FIRST.double(), 300)[0, 0] > 0.6


def test_a_starved_candidate_is_drawn_more_and_the_bound_holds_for_ever() -> None:
    """exp(2 clip_e) between any two, though the input never changes and differs by a factor of a million."""
    s, floor = started(clip_e=0.6, floor_e=0.01), 0.01
    growth = torch.tensor([[1.0, 1e6, 1e6, 1e6]] * 3)
    seen = [after(s, growth, 2500)[0] for _ in range(4)]
    softmax = (seen[-1] - floor) / (1 - 4 * floor)
    assert softmax.argmax() == 0
    assert float(softmax.max() / softmax.min()) <= math.exp(2 * 0.6) + 1e-4
    assert float(s.logits_e.abs().max()) <= 0.6 + 1e-6
    torch.testing.assert_close(seen[0], seen[-1], atol=1e-5, rtol=0)  # it has settled, nothing winds up
    back = after(s, growth.flip(1), 60)[0]  # and turns round within a few times 1 / eta_e updates
    assert back.argmax() == 3


def test_the_logits_go_to_the_log_ratio_itself() -> None:
    growth = torch.tensor([[1.0, 1.1, 1.2, 1.3]] * 3, dtype=torch.float64)
    s = started()
    after(s, growth, 1)
    target = (growth.log().mean(1, keepdim=True) - growth.log()).float()
    torch.testing.assert_close(s.logits_e, 0.05 * target)
    after(s, growth, 400)
    torch.testing.assert_close(s.logits_e, target, rtol=1e-3, atol=1e-5)


def test_a_column_without_a_first_variance_says_nothing() -> None:
    s = started()
    s.start(torch.tensor([[0.0, 1, 1, 1]] * 3))
    s.update(torch.tensor([[5.0, 1, 2, 4]] * 3), EVEN, EVEN)
    assert s.logits_e[0, 0] == 0
    assert s.logits_e[0, 1] > 0 > s.logits_e[0, 3]


def test_a_width_of_zero_has_the_floor_and_no_part() -> None:
    s = started(candidates=[0, 2, 4, 8], floor_e=0.06)
    s.start(torch.tensor([[0.0, 1, 1, 1]] * 3))
    for _ in range(50):
        s.update(torch.tensor([[0.0, 1, 2, 2]] * 3), EVEN, EVEN)
    p_e = s.probabilities()[0]
    torch.testing.assert_close(p_e[:, 0], torch.full((3,), 0.06))
    assert (p_e[:, 1] > p_e[:, 2]).all()


def test_the_state_holds_the_first_variances_to_the_bit() -> None:
    s, other = started(), Sampler(SamplingConfig(), SCHEMA, CANDIDATES, 0)
    s.start(torch.rand(3, 4, dtype=torch.float64))
    s.update(torch.rand(3, 4), torch.rand(3), torch.rand(3))
    other.load_state(json.loads(json.dumps(s.state())))
    again = torch.rand(3, 4)
    for one in (s, other):
        one.update(again, EVEN, EVEN)
    assert torch.equal(s.logits_e, other.logits_e)


def test_a_training_that_noted_no_first_variances_is_refused() -> None:
    s = started()
    state = s.state()
    del state["initial"]
    s.load_state(state)
    with pytest.raises(UserError, match=r"--run\.overwrite true"):
        s.update(FIRST, EVEN, EVEN)


@pytest.mark.parametrize(("scheme", "own"), [("shared", [0, 2, 1, 5]), ("independent", [0, 2, 3, 8])])
def test_growth_looks_at_the_columns_that_no_narrower_candidate_reads(scheme: str, own: list[int]) -> None:
    tables = MaxTables(SCHEMA, [0, 2, 3, 8], scheme, one_rank(), DistConfig(), OptimConfig(), 0, 0.3)
    ranges = own_columns(tables.columns)
    assert [b - a for a, b in ranges] == own
    found = column_variance(*column_sums(tables.sharded), ranges)
    for f, table in enumerate(whole_tables(tables.sharded).values()):
        for j, (a, b) in enumerate(ranges):
            expected = table[:, a:b].double().var(0, unbiased=False).mean() if b > a else torch.zeros(())
            assert found[f, j] == pytest.approx(float(expected), rel=1e-9)


def test_a_mask_ends_with_the_first_candidate_that_has_the_rank() -> None:
    found = candidate_mask([32, 9, 8, 3, 1, None], [0, 2, 8, 16, 32, 64])
    assert [row.nonzero()[:, 0].tolist() for row in found] == [
        [0, 1, 2, 3, 4],  # 64 columns reach no rank that 32 do not
        [0, 1, 2, 3],  # 8 columns reach rank 8 of 9
        [0, 1, 2],
        [0, 1, 2],
        [0, 1],
        [0, 1, 2, 3, 4, 5],
    ]


def test_duplicates_are_said_once_for_fields_alike() -> None:
    names = ["gender", "item", "age", *(f"x{i}" for i in range(8))]
    mask = candidate_mask([2, 16, 7, *[2] * 8], [2, 8, 16])
    assert describe(names, [2, 8, 16], mask) == [
        "gender, x0, x1, x2, x3, x4 and 3 more fields: 8, 16 are the same as 2: counted once",
        "age: 16 is the same as 8: counted once",
    ]
    assert describe(["item"], [2, 8, 16], mask[1:2]) == []


@pytest.mark.parametrize("mode", ["adaptive", "random", "vanilla_uniform", "weighted_uniform"])
def test_duplicates_are_never_drawn_in_any_mode(mode: str) -> None:
    mask = candidate_mask([8, 3, 1], [0, 2, 4, 8])
    s = started(mask, [0, 2, 4, 8], mode=mode)
    if mode == "adaptive":
        s.update(FIRST * torch.tensor([9.0, 1, 2, 3]), EVEN, EVEN)
    p_e, _ = s.probabilities()
    assert (p_e[~mask] == 0).all()
    assert (p_e[mask] > 0).all()
    torch.testing.assert_close(p_e.sum(1), torch.ones(3))
    drawn = torch.stack([s.draw(step)[0] for step in range(200)])
    assert drawn.amax(0).tolist() == [3, 2, 1]


def test_the_widest_and_the_narrowest_are_distinct_candidates_with_columns() -> None:
    mask = candidate_mask([8, 3, 1], [0, 2, 4, 8])
    s = Sampler(SamplingConfig(subnets=4, keep_start=0.6), SCHEMA, [0, 2, 4, 8], 0, 300, mask)
    drawn = [s.draw_all(step) for step in range(340)]
    for choices, keeps in drawn:
        assert choices[0].tolist() == [3, 2, 1]
        assert keeps[0].all()
    for choices, keeps in drawn[300:]:
        assert choices[1].tolist() == [1, 1, 1]
        assert keeps[1].all() and keeps.any(1).all() and len(choices) == 4
    assert len({str(c[2:]) for c, _ in drawn[300:]}) > 20
    alone = [len(c) == 1 for c, _ in drawn]
    assert alone[0] and sum(alone[:100]) > sum(alone[200:300]) + 30


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.sampling.eq5=layer", "search.sampling.eq5: 'layer' is none of growth, layernorm"),
        ("search.sampling.eta_e=1.5", r"search.sampling.eta_e: must be in \(0, 1\] with growth"),
        ("search.sampling.clip_e=0", "search.sampling.clip_e: must be above 0"),
        ("search.sampling.subnets=2", "search.sampling.subnets: must be 1, or 3 or more"),
        ("search.supernet.panel=0", "search.supernet.panel: must be at least 1"),
        ("search.supernet.panel_rows=0", "search.supernet.panel_rows: must be at least 1"),
        ("search.supernet.keep=first", "search.supernet.keep: 'first' is none of best, last"),
    ],
)
def test_a_setting_out_of_range_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"config key {message}"):
        load_config(CONFIGS, None, [override], method="adass")
