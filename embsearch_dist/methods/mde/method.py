"""The power rule of mixed dimensions, the base that a budget allows, and both as a method."""

from __future__ import annotations

from collections.abc import Sequence

from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.columns import Cost, cost_of, last_that_fits
from embsearch_dist.methods.mde.config import MDEConfig
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor


def popularities(schema: Schema) -> list[float]:
    """Per field ``k / n``: in which share of rows one of its values is met, in the mean over the values."""
    return [max(f.mean_length, 1e-9) / f.cardinality for f in schema.fields]


def thresholds(popularity: float, alpha: float, candidates: Sequence[int], rounding: str) -> list[float]:
    """The base from which on a field has each candidate width; 0 for the first.

    Whole numbers meet half-way, powers of two half-way between their exponents: ``sqrt(w * 2w)``.
    """
    pairs = zip(candidates, candidates[1:], strict=False)
    borders = [(a * b) ** 0.5 if rounding == "power2" else (a + b) / 2 for a, b in pairs]
    return [0.0, *(border / popularity**alpha for border in borders)]


def widths_of(base: float, steps: Sequence[Sequence[float]], candidates: Sequence[int]) -> list[int]:
    """Rounded and clipped ``base * p_m ** alpha`` of each field; ``steps``: its :func:`thresholds`."""
    return [candidates[sum(base >= s for s in own) - 1] for own in steps]


def largest_base(steps: Sequence[Sequence[float]], candidates: Sequence[int], cost: Cost, limit: float) -> float:
    """The largest base at which some width changes and whose widths cost at most ``limit``.

    Raises:
        ValueError: not even the narrowest widths do.
    """
    bases = sorted({s for own in steps for s in own})
    return bases[last_that_fits(bases, lambda base: cost(widths_of(base, steps, candidates)) <= limit)]


class MDEStage(AllocateStage):
    """Solve the rule for each budget."""

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: MDEConfig = run.config.search
        popularity, candidates = popularities(run.schema), search.candidates
        steps = [thresholds(p, search.alpha, candidates, search.rounding) for p in popularity]

        def find(budget: Budget | None) -> Chosen:
            base = search.width / max(popularity) ** search.alpha
            if budget:
                cost = cost_of(run.schema, budget.resource, run.config.model.extra)
                base = largest_base(steps, candidates, cost, budget.limit)
            return Chosen(widths_of(base, steps, candidates), {"alpha": search.alpha, "base": base})

        return find


class MDE(Method):
    """Mixed dimension embeddings (Ginart et al. 2019)."""

    config = MDEConfig
    trial = {"search": {"width": 4, "pareto": ["60%"]}}

    def stages(self) -> list[Stage]:
        return [MDEStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)
