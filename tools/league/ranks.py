"""Ranks of methods over blocks, and which differences of mean ranks are more than chance: Friedman and Nemenyi.

As Demšar, *Statistical Comparisons of Classifiers over Multiple Data Sets*, JMLR 7 (2006), section 3.2: rank the
methods in each block (1 is best, ties share their mean), test whether mean ranks differ at all, and call two methods
different where their mean ranks are further apart than the critical difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import friedmanchisquare, rankdata, studentized_range

Scores = Mapping[str, Mapping[str, float]]
"""Block -> method -> figure."""


@dataclass(frozen=True)
class Ranking:
    """Methods by mean rank, best first.

    Attributes:
        methods: names.
        ranks: ``[methods]`` mean rank over the blocks.
        blocks: how many.
        chi2: Friedman's statistic, corrected for ties; NaN below three methods or two blocks.
        p: of it, by the chi-square distribution.
        f: Iman and Davenport's statistic, less conservative; infinite where all blocks agree.
        p_f: of it.
        distance: Nemenyi's critical difference of mean ranks.
        alpha: its level.
    """

    methods: tuple[str, ...]
    ranks: tuple[float, ...]
    blocks: int
    chi2: float
    p: float
    f: float
    p_f: float
    distance: float
    alpha: float

    def apart(self, one: float, other: float) -> bool:
        """Whether two mean ranks differ by more than chance: Friedman's test (as F) says that some do, and these are
        further apart than the critical difference."""
        return self.p_f < self.alpha and abs(one - other) > self.distance

    def cliques(self) -> list[tuple[int, int]]:
        """First and last place of the longest runs of methods, two at least, none of which is told from another."""
        found: list[tuple[int, int]] = []
        for first in range(len(self.methods)):
            last = max(k for k in range(first, len(self.ranks)) if not self.apart(self.ranks[k], self.ranks[first]))
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return found


def complete(scores: Scores) -> tuple[list[str], dict[str, list[str]]]:
    """Methods that every block has, in order of appearance; and of the others the blocks that lack them."""
    every = list(dict.fromkeys(method for block in scores.values() for method in block))
    lacking = {m: [name for name, block in scores.items() if m not in block] for m in every}
    return [m for m in every if not lacking[m]], {m: blocks for m, blocks in lacking.items() if blocks}


def rank(scores: Scores, methods: Sequence[str], higher: bool = True, alpha: float = 0.05) -> Ranking:
    """Rank methods that every block has.

    Args:
        scores: of at least one block.
        methods: two or more.
        higher: whether more is better.
        alpha: level of the critical difference.
    """
    table = np.array([[block[m] for m in methods] for block in scores.values()], dtype=float)
    each = rankdata(-table if higher else table, axis=1)
    mean = each.mean(0)
    order = np.argsort(mean, kind="stable")
    n, k = table.shape
    chi2 = p = f = p_f = math.nan
    if k > 2 and n > 1 and bool((np.ptp(each, axis=1) > 0).any()):
        chi2, p = (float(x) for x in friedmanchisquare(*each.T))
        f, p_f = iman_davenport(chi2, n, k)
    names, ranks = tuple(methods[i] for i in order), tuple(float(mean[i]) for i in order)
    return Ranking(names, ranks, n, chi2, p, f, p_f, critical_difference(k, n, alpha), alpha)


def iman_davenport(chi2: float, blocks: int, methods: int) -> tuple[float, float]:
    """The F form of Friedman's statistic, and its p-value."""
    rest = blocks * (methods - 1) - chi2
    if rest <= 1e-9 * blocks:
        return math.inf, 0.0
    f = (blocks - 1) * chi2 / rest
    return f, float(f_distribution.sf(f, methods - 1, (methods - 1) * (blocks - 1)))


def critical_difference(methods: int, blocks: int, alpha: float = 0.05) -> float:
    """Nemenyi's: ``q * sqrt(k (k + 1) / (6 N))``, q the Studentized range of infinitely many degrees of freedom over
    the root of 2."""
    q = float(studentized_range.ppf(1 - alpha, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


@dataclass(frozen=True)
class Stability:
    """How alike the widths are that searches of several seeds have found for one budget.

    Attributes:
        seeds: how many.
        agreement: share of fields with the same width, mean over pairs of seeds; NaN for one seed.
        correlation: Spearman's rho of the widths over fields, mean over the pairs for which it is defined; 1 for equal
            widths, undefined where one of two different allocations is uniform.
    """

    seeds: int
    agreement: float
    correlation: float


def stability(widths: Sequence[Mapping[str, int]]) -> Stability:
    """Of the widths of one field each, one mapping a seed."""
    rows = [np.array([w[name] for name in widths[0]], dtype=float) for w in widths]
    pairs = list(combinations(rows, 2))
    if not pairs:
        return Stability(len(rows), math.nan, math.nan)
    rhos = [rho for a, b in pairs if not math.isnan(rho := spearman(a, b))]
    agreement = float(np.mean([(a == b).mean() for a, b in pairs]))
    return Stability(len(rows), agreement, float(np.mean(rhos)) if rhos else math.nan)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two allocations ``[F]``; see :class:`Stability`."""
    if np.array_equal(a, b):
        return 1.0
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
