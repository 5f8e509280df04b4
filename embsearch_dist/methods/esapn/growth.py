"""Sizes that only grow: which field is next, and what a budget leaves of a recorded growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from embsearch_dist.methods.columns import Cost


@dataclass
class Growth:
    """The present size of every field, and how it came to be.

    Attributes:
        sizes: place among the candidates, per field.
        steps: (step, field) of every enlargement, in order.
    """

    sizes: list[int]
    steps: list[tuple[int, int]] = field(default_factory=list)

    def enlarge(self, step: int, probability: Sequence[float], largest: int) -> bool:
        """Enlarge, by one candidate, every field whose ``probability`` of that is above one half, the most probable
        first, of equal ones the first; none beyond ``largest``. Whether there was one."""
        due = [f for f, p in enumerate(probability) if p > 0.5 and self.sizes[f] < largest]
        for f in sorted(due, key=lambda f: -probability[f]):
            self.sizes[f] += 1
            self.steps.append((step, f))
        return bool(due)


def replayed(growth: Growth, candidates: Sequence[int], cost: Cost, limit: float) -> tuple[list[int], int]:
    """The widths after all enlargements in order, without those that would cost more than ``limit``, and how many those
    are. The field of a refused one stays as it is for good: the others only grow."""
    sizes, refused = [0] * len(growth.sizes), 0
    for _, f in growth.steps:
        tried = sizes.copy()
        tried[f] += 1
        if cost([candidates[k] for k in tried]) <= limit:
            sizes = tried
        else:
            refused += 1
    return [candidates[k] for k in sizes], refused
