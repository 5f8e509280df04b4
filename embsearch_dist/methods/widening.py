"""What was found, widened: more columns for the kept fields while the budget holds them and validation rows gain.

A search asks how many directions of a field a trained model needs. To *train* a model of so few columns is harder than
to cut one down to them, and a budget that is not spent may make it easier. So twice the widths are tried, then twice
those, as long as each is clearly better than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.fallback import Trained, compare
from embsearch_dist.methods.found import budget_of

WORTH = 1.2
"""A wider allocation is worth a training if it is so many times as large: a column more for gender is not."""
MARGIN = 2.0
"""Standard errors by which a wider model must be better: several are tried, and tables of twice the size must pay."""
FRESH = "-fresh"  # behind the name of widened widths that began with fresh weights
Train = Callable[[str, Allocation, bool], Trained]
"""Trains an allocation under a name; true: from fresh weights, whatever the others begin with."""


def widened(found: Allocation, candidates: Sequence[int], factor: int) -> Allocation | None:
    """``found`` with each kept field at a wider candidate (:func:`next_wider`) as far as its budget holds that:
    small tables first.

    Args:
        candidates: widths that a field may get, ascending.
        factor: of the first allocation of the ladder, for the record.

    Returns:
        None where that is not :data:`WORTH` a training; without a budget there is nothing to spend.
    """
    budget = budget_of(found)
    wider = found
    for name in sorted(found.kept, key=lambda n: (found.rows(n), n)):
        step = replace(wider, widths=wider.widths | {name: next_wider(found.widths[name], candidates)})
        if step.total(budget.resource) <= budget.limit:
            wider = step
    if wider.total(budget.resource) < WORTH * found.total(budget.resource):
        return None
    return replace(wider, provenance=found.provenance | {"widened": factor})


def next_wider(width: int, candidates: Sequence[int]) -> int:
    """The widest candidate of at most twice ``width``, or the next one above it; ``width`` where it is the widest."""
    above = [c for c in candidates if c > width]
    within = [c for c in above if c <= 2 * width]
    return within[-1] if within else min(above, default=width)


def climb(
    name: str,
    first: Trained,
    found: Allocation,
    candidates: Sequence[int],
    train: Train,
    labels: np.ndarray,
    metric: str,
    fresh: bool,
    agreed: Callable[[bool], bool],
) -> Trained:
    """Train wider allocations than ``found`` while each is better than the one before, by :data:`MARGIN`.

    Args:
        name: of what was found; wider ones are called ``NAME-x2``, ``NAME-x4``, ...
        first: its model.
        train: see :data:`Train`.
        labels: of the validation split ``[N]``.
        metric: ``auc`` or ``logloss``: by which models are compared, see :func:`fallback.compare`.
        fresh: train the widest one that was better from fresh weights, too.
        agreed: what rank 0 says, on all ranks: they may round otherwise, and train together.

    Returns:
        The model that is kept: ``first`` where there is nothing to spend, or nothing is gained by it.
    """
    best, called, factor = first, name, 2
    while (wider := widened(found, candidates, factor)) is not None:
        model = train(f"{name}-x{factor}", wider, False)
        if not agreed(compare(model, best, labels, metric, MARGIN).first):
            break
        best, called, found, factor = model, f"{name}-x{factor}", wider, 2 * factor
    if fresh and best is not first:
        begun = train(called + FRESH, found, True)
        best = begun if agreed(compare(begun, best, labels, metric).first) else best
    return best
