"""The policy and the whole search on a reward that is made up, so that the right answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from embsearch_dist.methods.adass.config import AdassConfig, PolicyConfig
from embsearch_dist.methods.adass.policy import (
    AdditiveValue,
    Policy,
    SearchTrace,
    argmax_choice,
    factored_advantage,
    nearest_allowed,
    penalty,
    search,
)
from embsearch_dist.methods.adass.search_stage import Searcher, budgets_of
from embsearch_dist.methods.budget import cost_table, parse_budget, total_cost
from tests.factories import small_schema

CANDIDATES = [0, 2, 4, 8]
SCHEMA = small_schema(100, 40, 7, 300)
WIDTHS = torch.tensor(CANDIDATES, dtype=torch.float32).expand(4, 4)
BEST = [2, 0, 3, 1]


@dataclass
class AdditiveScorer:
    """Stands for a supernet: the AUC of a subnet is a sum over its fields, highest at ``best``."""

    best: list[int]
    strength: float = 0.02
    archive: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)

    def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
        out = []
        for row in choices.tolist():
            auc = 0.7 - self.strength * sum(abs(j - b) for j, b in zip(row, self.best, strict=True))
            self.archive[tuple(row)] = {"auc": auc, "logloss": 1 - auc, "accuracy": auc}
            out.append(self.archive[tuple(row)])
        return out

    def score_near(self, base: Sequence[int], choices: torch.Tensor) -> list[dict[str, float]]:
        (own,) = self.score(torch.tensor([list(base)]))
        return [{**m, "gain": own["logloss"] - m["logloss"], "gain_se": 1e-6} for m in self.score(choices)]

    def part(self, rows: int) -> AdditiveScorer:
        return self


@dataclass
class GrowingScorer(AdditiveScorer):
    """Wider is always a little better: only penalties and budgets hold the search back."""

    def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
        out = []
        for row in choices.tolist():
            auc = 0.6 + self.strength * sum(row)
            self.archive[tuple(row)] = {"auc": auc, "logloss": 1 - auc, "accuracy": auc}
            out.append(self.archive[tuple(row)])
        return out


def policy(**changes: Any) -> PolicyConfig:
    quick = {"steps": 120, "batch": 16, "lr": 5e-3, "model_width": 16, "heads": 2, "layers": 1}
    return PolicyConfig(**quick | {"lambda_r": 0.0, "lambda_c": 0.0} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["auc", "logloss", "accuracy"])
def test_the_policy_finds_the_best_widths_of_an_additive_reward(metric: str) -> None:
    p = search(AdditiveScorer(BEST, 0.05).score, WIDTHS, policy(metric=metric, steps=250), seed=0)
    assert argmax_choice(p) == BEST
    torch.testing.assert_close(p.sum(1), torch.ones(4))


def test_the_policy_starts_at_the_uniform_distribution() -> None:
    p = Policy(4, 4, policy())(torch.tensor([BEST])).softmax(2)
    assert torch.equal(p, torch.full((1, 4, 4), 0.25))


def test_the_same_seed_searches_alike_and_another_one_does_not() -> None:
    runs = [search(AdditiveScorer(BEST).score, WIDTHS, policy(steps=10), seed=s) for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_search_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    search(AdditiveScorer(BEST).score, WIDTHS, policy(steps=2), seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_penalty_is_eq_9() -> None:
    p = torch.rand(2, 4, 4).softmax(2)
    expected = 0.0
    for b in range(2):
        size = sum(float(p[b, i, j]) * CANDIDATES[j] for i in range(4) for j in range(4))
        spread = sum(float((p[b, i] - 0.25).square().sum()) ** 0.5 for i in range(4))
        expected += 0.3 / 4 * size - 0.7 / 4 * spread
    assert float(penalty(p, WIDTHS, 0.3, 0.7)) == pytest.approx(expected / 2, rel=1e-5)


def test_lambda_r_shrinks_the_expected_width() -> None:
    sizes = []
    for lambda_r in (0.0, 0.5):
        p = search(GrowingScorer([], 0.002).score, WIDTHS, policy(lambda_r=lambda_r), seed=0)
        sizes.append(float((p * WIDTHS).sum()))
    assert sizes[0] > 25  # of 32: wider is better
    assert sizes[1] < 5


def test_lambda_c_rewards_a_decided_policy() -> None:
    uniform, leaning = torch.full((1, 4, 4), 0.25), torch.tensor([0.4, 0.2, 0.2, 0.2]).expand(1, 4, 4)
    decided = torch.eye(4)[None]
    values = [float(penalty(p, WIDTHS, 0.0, 0.08)) for p in (uniform, leaning, decided)]
    assert values[0] == 0 > values[1] > values[2]


def test_a_budget_pulls_the_expected_cost_towards_it() -> None:
    costs = cost_table(SCHEMA, CANDIDATES, "parameters").float()
    limit = 0.3 * float(costs[:, -1].sum())
    expected = []
    for budget in (None, limit):
        p = search(GrowingScorer([]).score, WIDTHS, policy(), 0, absolute_costs=costs, budget=budget)
        expected.append(float((p * costs).sum()))
    assert expected[0] > 2 * limit
    assert expected[1] < 1.25 * limit


def test_a_field_that_gains_nothing_is_not_carried_along_by_the_others() -> None:
    best = [3] * 10 + [0, 0]
    strengths = torch.tensor([0.02] * 10 + [0.001] * 2)

    def reward(choices: torch.Tensor) -> list[dict[str, float]]:
        away = (choices - torch.tensor(best)).abs().float() @ strengths
        return [{"auc": 0.8 - float(a)} for a in away]

    p = search(reward, WIDTHS[:1].expand(12, 4), policy(steps=250, batch=32), seed=0)
    assert argmax_choice(p) == best


def test_additive_values_are_those_of_an_additive_reward() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(5, 4, generator=generator)
    value = AdditiveValue(5, 4, ridge=1e-3)
    assert not value.values().any()
    for _ in range(20):
        choices = torch.randint(4, (32, 5), generator=generator)
        value.update(choices, 0.7 + truth.T.gather(0, choices).sum(1))
    centred = truth - truth.mean(1, keepdim=True)
    found = value.values()
    torch.testing.assert_close(found - found.mean(1, keepdim=True), centred, rtol=1e-3, atol=1e-3)


def test_a_known_additive_reward_leaves_no_noise_of_other_fields_in_the_advantage() -> None:
    generator = torch.Generator().manual_seed(1)
    values, choices = torch.randn(5, 4, generator=generator), torch.randint(4, (16, 5), generator=generator)
    own = values.T.gather(0, choices)
    found = factored_advantage(0.7 + own.sum(1), choices, values)
    others = (own.sum(0) - own) / 15
    torch.testing.assert_close(found, own - others, rtol=1e-4, atol=1e-5)


def test_without_known_values_the_advantage_is_that_over_the_other_subnets() -> None:
    rewards, choices = torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, 2, dtype=torch.int64)
    found = factored_advantage(rewards, choices, torch.zeros(2, 4))
    torch.testing.assert_close(found, torch.tensor([[-3.0, -3.0], [-1.5, -1.5], [4.5, 4.5]]))


def test_the_factored_advantage_leaves_the_gradient_unbiased() -> None:
    # Two fields of two candidates: the expected gradient over all actions is worked out exactly.
    logits = torch.tensor([[0.3, -0.2], [0.5, 0.1]], requires_grad=True)
    table = torch.tensor([[0.2, 0.9], [0.4, 0.1]])  # reward of every pair of choices, not additive
    values = torch.tensor([[0.7, -0.4], [1.3, 0.2]])  # whatever was fitted before
    actions = torch.tensor([[a, b] for a in (0, 1) for b in (0, 1)])
    rewards = table[actions[:, 0], actions[:, 1]]

    def probability(k: torch.Tensor) -> torch.Tensor:
        return torch.stack([logits[f].softmax(0)[k[f]] for f in (0, 1)]).prod()

    exact = sum(probability(k) * r for k, r in zip(actions, rewards, strict=True))
    (wanted,) = torch.autograd.grad(exact, logits)
    surrogate = torch.zeros(())
    for i, first in enumerate(actions):
        for j, second in enumerate(actions):
            pair = torch.stack([first, second])
            advantage = factored_advantage(rewards[[i, j]], pair, values)
            log_p = torch.stack([logits.log_softmax(1)[torch.arange(2), k] for k in pair])
            chance = (probability(first) * probability(second)).detach()
            surrogate = surrogate + chance * (log_p * advantage).sum(1).mean()
    (found,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_watcher_sees_every_update() -> None:
    traces: list[SearchTrace] = []
    search(AdditiveScorer(BEST).score, WIDTHS, policy(steps=30), seed=0, watch=traces.append)
    assert [t.step for t in traces] == list(range(30))
    assert traces[0].entropy == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-4)
    assert traces[-1].entropy < traces[0].entropy
    assert traces[-1].reward_mean > traces[0].reward_mean


def searcher(scorer: Any, distinct: torch.Tensor | None = None, **changes: Any) -> Searcher:
    config = AdassConfig(candidates=CANDIDATES, policy=policy(**changes))
    return Searcher(SCHEMA, config, scorer, distinct)


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("budget", ["3%", "10%", "999", "5KB", "1_000", "40%", "100%"])
def test_a_hard_budget_is_always_obeyed(budget: str, refine: bool) -> None:
    parsed = parse_budget(budget, SCHEMA)
    costs = cost_table(SCHEMA, CANDIDATES, parsed.resource)
    for seed in range(2):
        found = searcher(GrowingScorer([]), steps=5, refine=refine).find(seed, parsed)
        assert total_cost(found.choice, costs) <= parsed.limit
        assert any(CANDIDATES[j] for j in found.choice)


def test_the_tightest_budget_keeps_one_field() -> None:
    least = 7 * 2  # the narrowest width of the smallest field
    found = searcher(GrowingScorer([]), steps=5).find(0, parse_budget(str(least), SCHEMA))
    assert found.choice == [0, 0, 1, 0]


def test_the_local_search_finds_the_best_choice_of_an_untrained_policy() -> None:
    assert searcher(AdditiveScorer(BEST), steps=1).find(0).choice == BEST
    assert searcher(AdditiveScorer(BEST), steps=1, refine=False).find(0).choice != BEST


def test_a_budget_that_is_met_anyway_changes_nothing() -> None:
    assert searcher(AdditiveScorer(BEST)).find(0, parse_budget("100%", SCHEMA)).choice == BEST


def test_a_search_never_drops_every_field() -> None:
    scorer = AdditiveScorer([0, 0, 0, 0], strength=0.1)
    for refine in (True, False):
        found = searcher(scorer, refine=refine).find(0)
        assert any(CANDIDATES[j] for j in found.choice)


def test_the_allocation_says_where_it_comes_from() -> None:
    s = searcher(AdditiveScorer(BEST))
    found = s.find(0, parse_budget("100%", SCHEMA))
    allocation = s.allocation(found, {"seed": 5})
    assert allocation.widths == {"f0": 4, "f1": 0, "f2": 8, "f3": 2}
    assert allocation.provenance == {
        "method": "adass",
        "seed": 5,
        "budget": "100%",
        "supernet_auc": pytest.approx(0.7),
        "supernet_logloss": pytest.approx(0.3),
    }


def test_every_pareto_budget_gets_a_name_of_its_own() -> None:
    config = AdassConfig(candidates=CANDIDATES, budget="50%", pareto=["20%", "2 KB", "900"])
    names = [(name, b.limit if b else None) for name, b in budgets_of(config, SCHEMA)]
    whole = 32 * 447
    assert names == [
        ("adass", whole // 2),
        ("adass-20pct", int(0.2 * whole)),
        ("adass-2KB", 2000),
        ("adass-900", 900),
    ]


def test_a_masked_candidate_is_never_drawn_nor_found() -> None:
    allowed = torch.tensor([[True, True, False, True]] * 4)
    scorer = AdditiveScorer([2, 2, 2, 2])
    for changes in ({}, {"finder": "sweeps"}, {"refine": False}):
        s = searcher(scorer, distinct=allowed, **changes)
        for budget in (None, parse_budget("20%", SCHEMA)):
            found = s.find(0, budget)
            assert 2 not in found.choice
            assert not found.probabilities[:, 2].any()
            assert torch.isfinite(found.probabilities).all()
    assert all(2 not in key for key in scorer.archive)


def test_the_nearest_allowed_candidate_is_taken_the_lower_of_two() -> None:
    allowed = torch.tensor([[True, False, False, True], [False, True, False, True]])
    found = nearest_allowed(torch.arange(4)[:, None].repeat(1, 2), allowed)
    assert found.T.tolist() == [[0, 0, 3, 3], [1, 1, 1, 3]]


@pytest.mark.parametrize("budget", ["3%", "1_000", "40%"])
def test_sweeps_obey_the_budget_and_find_the_best_of_independent_fields(budget: str) -> None:
    parsed = parse_budget(budget, SCHEMA)
    costs = cost_table(SCHEMA, CANDIDATES, parsed.resource)
    found = searcher(GrowingScorer([]), finder="sweeps", refine=False).find(0, parsed)
    assert total_cost(found.choice, costs) <= parsed.limit
    assert searcher(AdditiveScorer(BEST), finder="sweeps", refine=False).find(0).choice == BEST


def test_many_fields_are_swept_unless_the_policy_is_asked_for() -> None:
    many = small_schema(*[10] * 65)
    for finder, expected in (("auto", True), ("policy", False)):
        config = AdassConfig(candidates=CANDIDATES, policy=policy(finder=finder))
        assert Searcher(many, config, AdditiveScorer([0] * 65)).sweeps is expected  # type: ignore[arg-type]
    assert not searcher(AdditiveScorer(BEST)).sweeps


def test_a_price_of_a_column_narrows_what_gains_less() -> None:
    # A step up gains 0.02 whatever its columns: 2, 2 and 4. At 0.006 a column the last does not pay.
    for finder in ("policy", "sweeps"):
        found = searcher(GrowingScorer([]), column_cost=0.006, finder=finder, steps=5).find(0)
        assert found.choice == [2, 2, 2, 2]
        assert searcher(GrowingScorer([]), finder=finder, steps=5).find(0).choice == [3, 3, 3, 3]


def test_columns_without_evidence_are_taken_away_and_counted() -> None:
    @dataclass
    class Flat(AdditiveScorer):
        """The first field gains, the others do not matter."""

        def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
            return [{"auc": 0.6 + 0.02 * c[0], "logloss": 0.4 - 0.02 * c[0], "accuracy": 0.5} for c in choices.tolist()]

    found = searcher(Flat([]), steps=1, refine=False).find(0)
    kept = searcher(Flat([]), steps=1, refine=False, evidence=-1.0).find(0)
    assert found.choice == [kept.choice[0], 0, 0, 0]
    assert found.pruned == sum(CANDIDATES[j] for j in kept.choice[1:]) > 0
    assert kept.pruned == 0


def test_a_search_tells_how_far_it_is_and_scores_no_more_than_it_said() -> None:
    for finder in ("policy", "sweeps"):
        s, done = searcher(AdditiveScorer(BEST), finder=finder, steps=7), []
        s.find(0, tick=done.append)
        assert len(done) > 2 and 0 < sum(done) <= s.subnets()
