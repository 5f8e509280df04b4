"""Local search, sweeps and pruning on made-up values, so that the right answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from embsearch_dist.methods.adass.local import Problem, pair_moves, prune, refine, single_moves, sweep


class Table:
    """Stands for a scorer: the loss of a subnet is a sum over its fields, seen on rows with noise of their own."""

    def __init__(self, losses: np.ndarray, noise: float = 0.0, rows: int = 400, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.losses = losses[..., None] + noise * rng.standard_normal((*losses.shape, rows))
        self.scored: list[tuple[int, ...]] = []

    def __call__(self, base: Sequence[int], choices: torch.Tensor) -> list[dict[str, float]]:
        fields, own = np.arange(len(base)), self.losses[np.arange(len(base)), list(base)].sum(0)
        out = []
        for choice in choices.tolist():
            self.scored.append(tuple(choice))
            rows = self.losses[fields, choice].sum(0)
            gain = own - rows
            error = float(gain.std(ddof=1)) / len(gain) ** 0.5
            out.append({"logloss": float(rows.mean()), "gain": float(gain.mean()), "gain_se": error})
        return out


def problem(table: Any, costs: np.ndarray, limit: float = np.inf, **changes: Any) -> Problem:
    fields, candidates = costs.shape
    given = {"price": np.zeros(costs.shape), "allowed": np.ones(costs.shape, bool), "widths": np.arange(candidates)}
    given |= changes
    return Problem(table, lambda m: -m["logloss"], costs=costs, limit=limit, **given)


@pytest.mark.parametrize("seed", range(10))
def test_refinement_never_leaves_the_budget_and_ends_where_no_single_change_helps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = np.outer(rng.integers(1, 100, 5), [0, 2, 4, 8]).astype(float)
    allowed = rng.random((5, 4)) < 0.8
    allowed[:, 0] = allowed[4, 1] = True
    table = Table(rng.normal(size=(5, 4)))
    p = problem(table, costs, 0.4 * costs[:, -1].sum(), allowed=allowed, price=rng.random((5, 4)))
    start = [0, 0, 0, 0, 1]
    best = refine(p, start, seed)
    assert p.fit(np.array(table.scored)).all()  # nothing forbidden is even scored
    assert p.value(best) >= p.value(start)
    for f, k in single_moves(p, best):
        move = [k if i == f else j for i, j in enumerate(best)]
        if p.fit(np.array([move]))[0]:
            assert p.value(move) <= p.value(best)


def test_refinement_trades_width_between_two_fields() -> None:
    # From [1, 0] no single change fits or helps; widening the second needs the first to shrink.
    losses = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert refine(problem(Table(losses), np.array([[0.0, 1.0]] * 2), 1.0), [1, 0], 0) == [0, 1]


def test_changes_that_gain_are_taken_together() -> None:
    losses = np.tile([1.0, 0.5, 0.0], (30, 1))
    p = problem(Table(losses), np.tile([0.0, 1.0, 2.0], (30, 1)))
    rounds: list[int] = []
    assert refine(p, [0] * 29 + [1], 0, moves=256, tick=rounds.append) == [2] * 30
    assert len(rounds) <= 5  # one or two fields a round would take fifteen


def test_no_round_scores_more_than_its_moves_and_promising_ones_come_first() -> None:
    fields = 400
    losses = np.tile([0.0, 1.0], (fields, 1))
    losses[:8, 1] = -1.0
    table, promise = Table(losses), np.zeros((fields, 2))
    promise[:8, 1] = 20.0
    best = refine(problem(table, np.tile([0.0, 1.0], (fields, 1))), [0] * (fields - 1) + [1], 0, 64, promise, rounds=1)
    assert len(table.scored) < 80
    assert sum(best[:8]) >= 7


def test_pairs_of_many_fields_are_drawn_not_listed() -> None:
    p = problem(Table(np.zeros((1200, 3))), np.ones((1200, 3)))
    choice = np.full(1200, 1)
    moves = pair_moves(p, choice.tolist(), 100, np.random.default_rng(0))
    assert moves.shape == (100, 1200)
    assert ((moves != choice).sum(1) == 2).all()
    assert (moves.max(1) == 2).all()  # one goes up at least


def test_a_sweep_finds_the_best_choice_of_independent_fields_within_a_budget() -> None:
    rng = np.random.default_rng(0)
    losses = -np.sort(rng.random((100, 3)), 1)  # wider is better everywhere, here more and there less
    costs = np.outer(rng.integers(1, 1000, 100), [0, 1, 2]).astype(float)
    p = problem(Table(losses), costs, 0.3 * costs[:, -1].sum())
    choice, gains = sweep(p, [1] * 100)
    assert p.fit(np.array([choice]))[0]
    ratio = refine(p, [0] * 99 + [1], 0, moves=10_000, rounds=300)
    assert p.value(choice) >= p.value(ratio)
    assert gains.shape == (100, 3)


def test_a_sweep_does_not_follow_noise() -> None:
    # One field gains, 299 differ by chance alone: the best of so many chances would all be taken.
    losses = np.zeros((300, 2))
    losses[7, 1] = -0.2
    table = Table(losses, noise=0.3, rows=200)
    choice, gains = sweep(problem(table, np.tile([0.0, 1.0], (300, 1))), [0] * 299 + [1], rounds=1)
    assert choice[7] == 1
    assert int((gains[:, 1] > 0).sum()) < 0.25 * 300  # half of all means are above 0


def test_what_a_large_step_promises_is_checked_and_a_part_of_it_taken() -> None:
    class Crowded(Table):
        """Each field gains alone, but more than two wide ones harm each other."""

        def __call__(self, base: Sequence[int], choices: torch.Tensor) -> list[dict[str, float]]:
            found = [{"logloss": -min(s := sum(c), 2) + 5.0 * max(0, s - 2)} for c in choices.tolist()]
            return found

    p = problem(Crowded(np.zeros((8, 2))), np.tile([0.0, 1.0], (8, 1)), widths=np.array([1, 2]))
    choice, _ = sweep(p, [0] * 8)
    assert 1 <= sum(choice) <= 2


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_pruning_takes_columns_whose_use_the_rows_do_not_show(noise: float) -> None:
    losses = np.array([[0.5, 0.2, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.001, 0.002]])
    p = problem(Table(losses, noise), np.tile([1.0, 2.0, 3.0], (4, 1)), widths=np.array([2, 4, 8]))
    assert prune(p, [2, 2, 2, 2], 1.0)[:2] == [2, 1]
    narrow = prune(p, [2, 2, 2, 2], 1.0)
    assert narrow[3] == 0
    if noise == 0:
        assert narrow == [2, 1, 0, 0]


def test_pruning_never_loses_more_in_all_than_the_evidence_allows() -> None:
    def score_near(base: Sequence[int], choices: torch.Tensor) -> list[dict[str, float]]:
        """Each narrowed field loses 0.7 standard errors; n of them together 0.7 n with an error of sqrt(n)."""
        changed = [int((c < torch.tensor(base)).sum()) for c in choices]
        return [{"logloss": 0.0, "gain": -0.7 * n, "gain_se": max(n, 1) ** 0.5} for n in changed]

    p = problem(score_near, np.tile([1.0, 2.0], (100, 1)), widths=np.array([2, 4]))
    assert sum(j == 0 for j in prune(p, [1] * 100, 1.0)) == 1  # of two the error would be 1.4, the loss 1.4
    assert sum(j == 0 for j in prune(p, [1] * 100, 2.0)) == 6


def test_pruning_keeps_a_field_and_skips_candidates_that_are_not_allowed() -> None:
    allowed = np.ones((2, 3), bool)
    allowed[0, 1] = False
    p = problem(Table(np.zeros((2, 3))), np.tile([0.0, 1.0, 2.0], (2, 1)), allowed=allowed)
    end = prune(p, [2, 2], 1.0)
    assert sum(end) > 0 and allowed[[0, 1], end].all()
