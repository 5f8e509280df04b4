"""Search from one choice to better ones near it: sweeps over all single changes, hill climbing, and pruning.

All three compare subnets that differ in few fields (``score_near``), so a comparison costs the same whatever the number
of fields, and is paired: both sides see the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embsearch_dist.methods.budget import knapsack

ScoreNear = Callable[[Sequence[int], torch.Tensor], list[dict[str, float]]]
Metrics = dict[str, float]
Tick = Callable[[int], None]
PAIRS = 128  # two-field moves of a round, at most
ROUNDS = 20  # of hill climbing
SWEEPS = 3
TICK_MOVES = 256  # of a sweep, between two signs of life


@dataclass(frozen=True)
class Problem:
    """What is maximised and what has to be obeyed; ``[F, T]`` arrays by field and candidate.

    Attributes:
        score_near: metrics of subnets near another one, see :meth:`Scoring.score_near`.
        reward: the part of a subnet's value that its metrics give.
        price: what each candidate takes from the value.
        costs: in the budget's unit, whole numbers.
        limit: the most that a choice may cost.
        allowed: candidates that may be chosen.
        widths: ``[T]`` columns of each candidate.
    """

    score_near: ScoreNear
    reward: Callable[[Metrics], float]
    price: np.ndarray
    costs: np.ndarray
    limit: float
    allowed: np.ndarray
    widths: np.ndarray

    def fit(self, choices: np.ndarray) -> np.ndarray:
        """Which of ``choices [K, F]`` obey the budget, choose allowed candidates, and keep a field."""
        fields = np.arange(choices.shape[1])
        within = self.costs[fields, choices].sum(1) <= self.limit
        return within & self.allowed[fields, choices].all(1) & (self.widths[choices].sum(1) > 0)

    def near(self, base: Sequence[int], choices: np.ndarray) -> tuple[np.ndarray, list[Metrics]]:
        """Values ``[K]`` and metrics of ``choices [K, F]``."""
        metrics = self.score_near(base, torch.from_numpy(choices))
        return self.values(choices, metrics), metrics

    def values(self, choices: np.ndarray, metrics: Sequence[Metrics]) -> np.ndarray:
        """Values ``[K]`` of ``choices [K, F]`` with these metrics."""
        price = self.price[np.arange(choices.shape[1]), choices].sum(1)
        return np.array([self.reward(m) for m in metrics]) - price

    def value(self, choice: Sequence[int]) -> float:
        return float(self.near(choice, np.array([choice]))[0][0])


def sweep(
    problem: Problem, start: Sequence[int], rounds: int = SWEEPS, tick: Tick = lambda n: None
) -> tuple[list[int], torch.Tensor]:
    """Score every single change of ``start``, change all fields that gain at once, and again from there.

    The gains of single changes are added up as if fields were independent, and a knapsack takes the best within the
    budget. Near ``start`` that is a good guess, further away less so: the whole step, a half, a quarter ... of its
    changes (the largest gains first) are scored, and the best is taken.

    A gain is shrunk by the share of it that is noise (``1 - (se / gain)^2`` of its paired loss, not below 0; the
    positive-part James-Stein rule): among thousands of changes the largest gains are chance first of all.

    Args:
        start: a choice; it need not obey the budget.
        tick: told how many changes were scored.

    Returns:
        The best choice found that obeys the budget, and the shrunk gains ``[F, T]`` of the last sweep.
    """
    base, best = list(start), float("-inf")
    gains = torch.zeros(problem.costs.shape, dtype=torch.float64)
    for _ in range(rounds):
        moves = single_moves(problem, base)
        own = problem.value(base)
        if problem.fit(np.array([base]))[0]:
            best = max(best, own)
        gains = torch.zeros(problem.costs.shape, dtype=torch.float64)
        for some in (moves[i : i + TICK_MOVES] for i in range(0, len(moves), TICK_MOVES)):
            values, metrics = problem.near(base, changed(base, some))
            for (f, k), value, found in zip(some, values, metrics, strict=True):
                gains[f, k] = (value - own) * _trust(found)
            tick(len(some))
        masked = gains.masked_fill(~torch.from_numpy(problem.allowed), -np.inf)
        target = within_budget(problem, masked)
        steps = [s for s in _steps(base, target, gains) if problem.fit(np.array([s]))[0]]
        if not steps:
            break
        found_values = problem.near(base, np.array(steps))[0]
        top = int(found_values.argmax())
        if found_values[top] <= best:
            break
        base, best = steps[top], float(found_values[top])
    return base, gains


def within_budget(problem: Problem, scores: torch.Tensor) -> list[int]:
    """The choice with the highest sum of ``scores [F, T]`` (-inf: not allowed) that obeys the budget and keeps a
    field."""
    choice = knapsack(scores, torch.from_numpy(problem.costs), min(problem.limit, float(problem.costs.max(1).sum())))
    if problem.widths[choice].sum() > 0:
        return choice
    # All were dropped: the field and width that lose least are added.
    moves = [(f, int(k)) for f in range(len(choice)) for k in np.flatnonzero(problem.allowed[f] & (problem.widths > 0))]
    moves = [m for m in moves if problem.fit(changed(choice, [m]))[0]]
    f, k = max(moves, key=lambda m: float(scores[m] - scores[m[0], choice[m[0]]]))
    return [k if i == f else j for i, j in enumerate(choice)]


def _trust(metrics: Metrics) -> float:
    gain, error = metrics.get("gain"), metrics.get("gain_se", 0.0)
    if gain is None or error == 0:
        return 1.0
    return max(0.0, 1 - (error / gain) ** 2) if gain else 0.0


def _steps(base: Sequence[int], target: Sequence[int], gains: torch.Tensor) -> list[list[int]]:
    """The whole way from ``base`` to ``target``, and ever smaller parts of it, the largest gains first."""
    fields = [f for f, (a, b) in enumerate(zip(base, target, strict=True)) if a != b]
    # First what saves (a budget may be broken now), then what gains.
    fields.sort(key=lambda f: -float(gains[f, target[f]] - gains[f, base[f]]))
    steps, count = [], len(fields)
    while count:
        some = set(fields[:count])
        steps.append([b if f in some else a for f, (a, b) in enumerate(zip(base, target, strict=True))])
        count //= 2
    return steps


def single_moves(problem: Problem, choice: Sequence[int]) -> list[tuple[int, int]]:
    """All (field, other allowed candidate)."""
    return [(f, int(k)) for f, j in enumerate(choice) for k in np.flatnonzero(problem.allowed[f]) if k != j]


def changed(choice: Sequence[int], moves: Sequence[tuple[int, int]]) -> np.ndarray:
    """``[len(moves), F]``: the choice after each change of one field."""
    out = np.tile(np.array(choice), (len(moves), 1))
    for row, (f, k) in zip(out, moves, strict=True):
        row[f] = k
    return out


def refine(
    problem: Problem,
    start: Sequence[int],
    seed: int,
    moves: int = 384,
    promise: np.ndarray | None = None,
    rounds: int = ROUNDS,
    tick: Tick = lambda n: None,
) -> list[int]:
    """Hill-climb from ``start`` over changes of one field's candidate and of two fields' together.

    Changes that gain and touch different fields are also tried together, the best half, quarter ... of them.

    Args:
        moves: about so many changes a round. All single changes if they are no more, else some, the promising ones
            more likely; and two-field changes, drawn by ``seed``.
        promise: ``[F, T]`` log-probabilities that a candidate is right; None: all alike.
        tick: told of each round.

    Returns:
        A choice that no sampled change improves; never one that does not obey the budget, unless ``start`` did not.
    """
    rng = np.random.default_rng(seed)
    best = list(start)
    best_value = problem.value(best)
    pairs = min(PAIRS, moves // 2)
    for _ in range(rounds):
        tick(1)
        singles = changed(best, _some(single_moves(problem, best), best, moves - pairs, promise, rng))
        tried = np.unique(np.concatenate([singles, pair_moves(problem, best, pairs, rng)]), axis=0)
        tried = tried[problem.fit(tried)]
        if not len(tried):
            break
        values, _ = problem.near(best, tried)
        better = np.flatnonzero(values > best_value)
        if not len(better):
            break
        order = better[np.argsort(-values[better], kind="stable")]
        top, top_value = tried[order[0]].tolist(), float(values[order[0]])
        together = _together(problem, best, tried[order])
        if together:
            joint, _ = problem.near(best, np.array(together))
            if joint.max() > top_value:
                top, top_value = together[int(joint.argmax())], float(joint.max())
        best, best_value = top, top_value
    return best


def _some(
    moves: list[tuple[int, int]],
    choice: Sequence[int],
    count: int,
    promise: np.ndarray | None,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """At most ``count`` of the moves, drawn without repetition in proportion to what they promise (Gumbel top-k)."""
    if len(moves) <= count:
        return moves
    noise = rng.gumbel(size=len(moves))
    if promise is not None:
        noise += np.array([promise[f, k] - promise[f, choice[f]] for f, k in moves])
    return [moves[i] for i in np.sort(np.argsort(-noise, kind="stable")[:count])]


def _together(problem: Problem, base: Sequence[int], better: np.ndarray) -> list[list[int]]:
    """The first half, quarter ... of improving moves joined, each whose fields no earlier one touches and that fits."""
    own = np.array(base)
    joined: list[list[int]] = []
    count = len(better)
    while count > 1:
        choice, used = own.copy(), np.zeros(len(own), bool)
        for move in better[:count]:
            fields = move != own
            if (used & fields).any():
                continue
            attempt = np.where(fields, move, choice)
            if problem.fit(attempt[None])[0]:
                choice, used = attempt, used | fields
        if choice.tolist() not in joined:
            joined.append(choice.tolist())
        count //= 2
    return joined


def pair_moves(problem: Problem, choice: Sequence[int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Moves ``[K, F]`` that no single change reaches: two fields up together (fields that matter as a pair gain
    nothing one by one), and one up while another goes down (what a tight budget needs to get unstuck)."""
    above = [
        next((int(k) for k in np.flatnonzero(a) if k > j), -1) for a, j in zip(problem.allowed, choice, strict=True)
    ]
    below = [[int(k) for k in np.flatnonzero(a) if k < j] for a, j in zip(problem.allowed, choice, strict=True)]
    up = [f for f, k in enumerate(above) if k >= 0]
    sizes = np.array([len(up) - 1 - i for i in range(len(up))] + [0])
    downs = sum(map(len, below))
    total = int(sizes.sum()) + len(up) * downs
    if total <= 16 * count:
        every = [(a, b, above[b]) for a in up for b in up if a < b]
        every += [(a, b, k) for a in up for b in range(len(choice)) if a != b for k in below[b]]
        if len(every) > count:
            every = [every[i] for i in rng.choice(len(every), count, replace=False)]
    else:
        every = [_drawn_pair(up, above, below, rng) for _ in range(count)]
    moves = np.tile(np.array(choice), (len(every), 1))
    for move, (raised, other, k) in zip(moves, every, strict=True):
        move[raised], move[other] = above[raised], k
    return moves


def _drawn_pair(
    up: list[int], above: list[int], below: list[list[int]], rng: np.random.Generator
) -> tuple[int, int, int]:
    """One of the pairs of :func:`pair_moves`, without a list of them all: it would grow with fields squared."""
    raised = up[int(rng.integers(len(up)))]
    while True:
        other = int(rng.integers(len(above)))
        ways = ([above[other]] if above[other] >= 0 else []) + below[other]
        if other != raised and ways:
            return raised, other, ways[int(rng.integers(len(ways)))]


def prune(problem: Problem, start: Sequence[int], evidence: float, tick: Tick = lambda n: None) -> list[int]:
    """Give every field the narrower of two candidates unless held-out rows speak for the wider.

    The wider one of a field is kept when its mean loss is lower by more than ``evidence`` standard errors of the
    paired differences on the scored rows. What is given up together must also pass: against ``start``, all narrowed
    fields at once may not lose by more than that; else only the half that loses least is narrowed, and so on.

    Args:
        start: a choice; its losses are what all is compared with.
        evidence: standard errors; 0 leaves a narrower candidate only when it is better.
        tick: told of each round.
    """
    start = [int(j) for j in start]
    base, fields = list(start), set(range(len(start)))
    while fields:
        tick(1)
        moves = [(f, _narrower(problem, f, base[f])) for f in sorted(fields)]
        moves = [m for m in moves if m[1] >= 0 and problem.fit(changed(base, [m]))[0]]
        if not moves:
            break
        _, metrics = problem.near(base, changed(base, moves))
        scored = sorted((_loss(m), f, k) for (f, k), m in zip(moves, metrics, strict=True))
        weak = [(f, k) for loss, f, k in scored if loss <= evidence]
        fields = set()
        while weak:
            attempt = list(base)
            for f, k in weak:
                attempt[f] = k
            if problem.fit(np.array([attempt]))[0]:
                _, (against,) = problem.near(start, np.array([attempt]))
                if _loss(against) <= evidence:
                    base, fields = attempt, {f for f, _ in weak}
                    break
            weak = weak[: len(weak) // 2]
    return base


def _narrower(problem: Problem, field: int, candidate: int) -> int:
    """The next allowed candidate below, -1 if there is none."""
    below = np.flatnonzero(problem.allowed[field][:candidate])
    return int(below[-1]) if len(below) else -1


def _loss(metrics: Metrics) -> float:
    """What a change loses, in standard errors; a change without any effect loses nothing."""
    gain, error = metrics["gain"], metrics["gain_se"]
    return -gain / error if error > 0 else (0.0 if gain >= 0 else float("inf"))
