"""Adaptive Sampling: Eq. 5 as printed, Eq. 6, the floors, and what a draw depends on; Eq. 5 by growth has a file of
its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.methods.adass.config import SamplingConfig
from embsearch_dist.methods.adass.sampling import Sampler, candidate_variance
from embsearch_dist.models.tables import MaxTables
from embsearch_dist.sharding.statistics import column_sums
from tests.factories import CONFIGS, one_rank, small_schema, whole_tables

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = small_schema(1000, 50, 10)
CANDIDATES = [2, 4, 8, 16]
WITH_ZERO = [0, 2, 4, 8]
EVEN = torch.ones(3)


def sampler(seed: int = 0, candidates: Sequence[int] = CANDIDATES, **changes: Any) -> Sampler:
    return Sampler(SamplingConfig(**{"eq5": "layernorm", **changes}), SCHEMA, candidates, seed)


def test_the_first_draws_favour_no_candidate() -> None:
    p_e, p_f = sampler(keep_start=0.8).probabilities()
    torch.testing.assert_close(p_e, torch.full((3, 4), 0.25))
    torch.testing.assert_close(p_f, torch.full((3,), 0.8))


def test_eq5_draws_the_candidate_with_the_lower_variance_more_often() -> None:
    s = sampler()
    variance = torch.tensor([[0.05, 0.1, 0.2, 0.3], [0.3, 0.2, 0.1, 0.05], [0.1, 0.4, 0.2, 0.3]])
    s.update(variance, EVEN, EVEN)
    p_e, _ = s.probabilities()
    for row, v in zip(p_e, variance, strict=True):
        assert row.argsort(descending=True).tolist() == v.argsort().tolist()
    torch.testing.assert_close(p_e.sum(1), torch.ones(3))


def test_a_width_of_zero_has_the_floor_however_long_eq5_runs() -> None:
    """It has no columns, so a variance of 0 for ever, which does not mean that it is the least trained."""
    s, without = sampler(candidates=WITH_ZERO, floor_e=0.06), sampler(candidates=WITH_ZERO[1:], floor_e=0.06)
    variance = torch.tensor([[0.0, 0.1, 0.2, 0.4], [0.0, 0.3, 0.2, 0.1], [0.0, 0.2, 0.2, 0.2]])
    for updates in range(60):
        p_e, others = s.probabilities()[0], without.probabilities()[0]
        torch.testing.assert_close(p_e[:, 0], torch.full((3,), 0.06))
        torch.testing.assert_close(p_e.sum(1), torch.ones(3))
        # The others share the rest as if it were not there; at first they do so evenly.
        if updates < 20:  # later each has met its own bound
            share = (p_e[:, 1:] - 0.06) / (1 - 4 * 0.06)
            torch.testing.assert_close(share, (others - 0.06) / (1 - 3 * 0.06))
        s.update(variance, EVEN, EVEN)
        without.update(variance[:, 1:], EVEN, EVEN)
    assert s.probabilities()[0].argmax(1).tolist()[:2] == [1, 3]


def test_shipped_candidates_of_width_zero_are_drawn_with_the_floor() -> None:
    found = 0
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if path.parent.name in ("sources", "comparisons"):
            continue
        config = load_config(CONFIGS, path, [])
        if config.method != "adass" or config.search.candidates[0] > 0:
            continue
        search = config.search
        s = Sampler(search.sampling, SCHEMA, search.candidates, 0)
        widths = torch.tensor(search.candidates).expand(3, -1)
        s.start(widths)
        for _ in range(100):
            s.update(torch.where(widths > 0, 1 + 1 / widths, 0.0), EVEN, EVEN)
        torch.testing.assert_close(s.probabilities()[0][:, 0], torch.full((3,), search.sampling.floor_e))
        found += 1
    assert found


def printed(logits: torch.Tensor, variance: torch.Tensor, own: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The update of Eq. 5 with LayerNorm as results before ``eq5`` were made with it."""
    x = variance[:, own].double()
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    step = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-8).float()
    spread = math.log((1 - logits.shape[1] * config.floor_e) / config.floor_e)
    new, out = logits[:, own] - config.eta_e * step, logits.clone()
    out[:, own] = (new - new.amax(1, keepdim=True)).clamp(min=-spread)
    return out


@pytest.mark.parametrize("candidates", [CANDIDATES, WITH_ZERO])
def test_layernorm_is_to_the_bit_what_it_was(candidates: list[int]) -> None:
    s, own = sampler(candidates=candidates), torch.tensor(candidates) > 0
    logits, generator = torch.zeros(3, 4), torch.Generator().manual_seed(0)
    for _ in range(50):
        variance = torch.rand(3, 4, generator=generator, dtype=torch.float64) * own
        s.update(variance, EVEN, EVEN)
        logits = printed(logits, variance, own, s.config)
        assert torch.equal(s.logits_e, logits)
        share = (1 - 4 * s.config.floor_e) * logits.masked_fill(~own, -math.inf).softmax(1)
        assert torch.equal(s.probabilities()[0], s.config.floor_e + share)


def test_layernorm_compares_only_candidates_that_can_be_drawn() -> None:
    """A field with fewer distinct candidates follows Eq. 5 as if it had no others."""
    distinct = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    config = SamplingConfig(eq5="layernorm")
    masked = Sampler(config, SCHEMA, CANDIDATES, 0, distinct=distinct)
    short, whole = sampler(candidates=CANDIDATES[:2]), sampler()
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        variance = torch.rand(3, 4, generator=generator)
        masked.update(variance, EVEN, EVEN)
        short.update(variance[:, :2], EVEN, EVEN)
        whole.update(variance, EVEN, EVEN)
    p_e = masked.probabilities()[0]
    assert torch.equal(p_e[[0, 2]], whole.probabilities()[0][[0, 2]])
    torch.testing.assert_close(p_e[1], torch.cat([short.probabilities()[0][1], torch.zeros(2)]))


def test_eq5_compares_within_a_field_only_and_ignores_its_scale() -> None:
    one, other = sampler(), sampler()
    variance = torch.tensor([[1.0, 2, 3, 4]] * 3)
    one.update(variance, EVEN, EVEN)
    other.update(variance * torch.tensor([[1.0], [1e-9], [1e6]]), EVEN, EVEN)
    torch.testing.assert_close(one.probabilities()[0], other.probabilities()[0], rtol=1e-3, atol=1e-4)


def test_eq6_keeps_fields_with_larger_gradients_or_values_more_often() -> None:
    for by_gradient in (True, False):
        s = sampler(lambda_fs=1.0 if by_gradient else 0.0)
        large, flat = torch.tensor([3.0, 1.0, 2.0]), EVEN
        s.update(torch.ones(3, 4), large if by_gradient else flat, flat if by_gradient else large)
        _, p_f = s.probabilities()
        assert p_f[0] > p_f[2] > p_f[1]
        assert p_f[0] > 0.8 > p_f[1]


def test_eq6_weighs_gradient_against_size_by_lambda_whatever_their_units() -> None:
    # Gradients are orders of magnitude smaller than values; that alone must not decide.
    s = sampler(lambda_fs=0.9)
    s.update(torch.ones(3, 4), torch.tensor([3e-7, 1e-7, 2e-7]), torch.tensor([1.0, 3.0, 2.0]))
    _, p_f = s.probabilities()
    assert p_f[0] > p_f[2] > p_f[1]


def test_floors_hold_however_long_one_direction_is_pushed() -> None:
    s = sampler(floor_e=0.07, floor_f=0.6, keep_start=0.7, eta_e=1.0, eta_f=1.0)
    variance = torch.tensor([[0.5, 1, 2, 3]] * 3)
    for _ in range(300):
        s.update(variance, torch.tensor([1.0, 2.0, 3.0]), EVEN)
    p_e, p_f = s.probabilities()
    assert p_e.min() >= 0.07 - 1e-6
    assert p_f.min() >= 0.6 - 1e-6
    assert p_f.max() <= 1
    assert p_e[0, 0] > 0.5
    torch.testing.assert_close(p_e.sum(1), torch.ones(3))


def test_a_pushed_down_candidate_comes_back_within_a_few_updates() -> None:
    s = sampler(eta_e=0.5)
    for _ in range(500):
        s.update(torch.tensor([[0.5, 1, 2, 3]] * 3), EVEN, EVEN)
    for _ in range(30):
        s.update(torch.tensor([[3.0, 2, 1, 0.5]] * 3), EVEN, EVEN)
    assert (s.probabilities()[0].argmax(1) == 3).all()


def test_equal_statistics_change_nothing() -> None:
    s = sampler()
    s.update(torch.full((3, 4), 0.5), EVEN, EVEN)
    torch.testing.assert_close(s.probabilities()[0], torch.full((3, 4), 0.25))
    torch.testing.assert_close(s.probabilities()[1], torch.full((3,), 0.8))


def draws(s: Sampler, steps: range, rank: int = 0) -> list[tuple[list[int], list[bool]]]:
    return [(c.tolist(), k.tolist()) for c, k in (s.draw(step, rank) for step in steps)]


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    torch.manual_seed(1)
    first = draws(sampler(), range(20))
    torch.manual_seed(2)
    s = sampler()
    assert [*reversed(draws(s, range(19, -1, -1)))] == first  # in any order
    assert draws(sampler(seed=1), range(20)) != first
    assert len({str(d) for d in first}) > 10


def test_ranks_draw_together_or_each_its_own() -> None:
    together, apart = sampler(same_subnet=True), sampler(same_subnet=False)
    assert draws(together, range(20), 1) == draws(together, range(20), 0)
    assert draws(apart, range(20), 1) != draws(apart, range(20), 0)


def test_a_draw_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    sampler().draw(5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_frequencies_match_the_probabilities() -> None:
    s = sampler()
    s.logits_e = torch.tensor([[0.0, -1, -2, 0], [0, 0, 0, 0], [-3, 0, 0, -3.0]])
    s.logits_f = torch.tensor([2.0, 0.0, -2.0])
    p_e, p_f = s.probabilities()
    steps = 4000
    drawn = [s.draw(step) for step in range(steps)]
    counts = torch.stack([torch.nn.functional.one_hot(c, 4) for c, _ in drawn]).double().mean(0)
    kept = torch.stack([k for _, k in drawn]).double().mean(0)
    torch.testing.assert_close(counts.float(), p_e, rtol=0, atol=0.04)
    torch.testing.assert_close(kept.float(), p_f, rtol=0, atol=0.04)


def test_at_least_one_field_is_always_kept() -> None:
    s = sampler(floor_f=0.0, keep_start=0.01)
    kept = [s.draw(step)[1] for step in range(300)]
    assert all(k.any() for k in kept)
    assert torch.stack(kept).any(0).all()  # not always the same one


def test_the_random_mode_is_uniform_and_keeps_with_probability_0_6() -> None:
    p_e, p_f = sampler(mode="random").probabilities()
    torch.testing.assert_close(p_e, torch.full((3, 4), 0.25))
    torch.testing.assert_close(p_f, torch.full((3,), 0.6))


def test_the_vanilla_uniform_mode_follows_the_widths_and_keeps_all() -> None:
    p_e, p_f = sampler(candidates=WITH_ZERO, mode="vanilla_uniform").probabilities()
    torch.testing.assert_close(p_e, torch.tensor([[1.0, 2, 4, 8]] * 3) / 15)
    assert (p_f == 1).all()


def test_the_weighted_uniform_mode_keeps_large_fields_more_often() -> None:
    _, p_f = sampler(mode="weighted_uniform").probabilities()
    assert p_f[0] == 1
    assert p_f[0] > p_f[1] > p_f[2] >= 0.6


@pytest.mark.parametrize("mode", ["random", "vanilla_uniform", "weighted_uniform"])
def test_fixed_modes_never_ask_for_an_update(mode: str) -> None:
    assert not any(sampler(mode=mode, update_every=1).due(step) for step in range(5))
    assert [step for step in range(9) if sampler(update_every=3).due(step)] == [2, 5, 8]


def test_the_state_continues_the_same_draws() -> None:
    s = sampler()
    s.update(torch.rand(3, 4), torch.rand(3), torch.rand(3))
    other = sampler()
    other.load_state(s.state())
    assert draws(other, range(20)) == draws(s, range(20))
    assert torch.equal(other.probabilities()[0], s.probabilities()[0])


@pytest.mark.parametrize("scheme", ["shared", "independent"])
def test_candidate_variance_equals_torch_var_of_the_slices(scheme: str) -> None:
    tables = MaxTables(SCHEMA, [0, 2, 3, 8], scheme, one_rank(), DistConfig(), OptimConfig(), 0, 0.3)
    found = candidate_variance(*column_sums(tables.sharded), tables.columns)
    for f, (name, table) in enumerate(whole_tables(tables.sharded).items()):
        assert name == SCHEMA.names[f]
        for j, (start, stop) in enumerate(tables.columns):
            expected = table[:, start:stop].double().var(unbiased=False) if stop > start else torch.zeros(())
            assert found[f, j] == pytest.approx(float(expected), rel=1e-9)


def test_warm_up_trains_the_widest_subnet_ever_more_rarely() -> None:
    s = Sampler(SamplingConfig(keep_start=0.6), SCHEMA, CANDIDATES, 0, warmup_steps=300)
    widest = [c.tolist() == [3, 3, 3] and bool(k.all()) for c, k in (s.draw(step) for step in range(400))]
    assert widest[0]
    assert sum(widest[:100]) > sum(widest[200:300]) + 30
    assert sum(widest[300:]) < 10
