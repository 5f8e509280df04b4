"""The columns of the highest score of all tables together: by magnitude, by saliency, by the share that is kept."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

import torch

from embsearch_dist.allocation import cost
from embsearch_dist.errors import UserError
from embsearch_dist.methods.budget import Budget
from embsearch_dist.schema import Schema

Cost = Callable[[Sequence[int]], float]
"""What the widths of all fields cost together; grows with each width."""


def cost_of(schema: Schema, resource: str, extra: int) -> Cost:
    """The :data:`Cost` of a data set's tables in one of ``allocation.RESOURCES``."""
    return partial(_cost, schema, resource, extra)


def best_columns(scores: torch.Tensor, keep: float, summed: torch.Tensor | None = None) -> list[int]:
    """Width of a field = how many of its columns are among the highest of all tables that together hold a share
    ``keep`` of the summed scores ``[F, w]`` (at least 0); of ``summed [F, w]``, where scores only say the order."""
    order = _highest_first(scores)
    held = (scores if summed is None else summed).flatten()[order].cumsum(0)
    return _counts(order[: 1 + int((held[:-1] < keep * held[-1]).sum())], scores)


def best_columns_under(
    scores: torch.Tensor, cost: Cost, limit: float, summed: torch.Tensor | None = None
) -> tuple[list[int], float]:
    """The widths of the most of the highest columns that cost at most ``limit``, and their share of the summed scores,
    or of ``summed [F, w]``, where scores only say the order.

    No lower column is kept in place of a higher one that does not fit: what is kept is above one threshold.

    Raises:
        ValueError: not even the highest one fits.
    """
    order = _highest_first(scores)
    counts = list(range(1, len(order) + 1))
    kept = counts[last_that_fits(counts, lambda n: cost(_counts(order[:n], scores)) <= limit)]
    flat = (scores if summed is None else summed).flatten()
    return _counts(order[:kept], scores), float(flat[order[:kept]].sum() / flat.sum().clamp(min=1e-300))


def check_one_column(found: Sequence[tuple[str, Budget | None]], schema: Schema, extra: int) -> None:
    """Refuse budgets under which :func:`best_columns_under` may find nothing: the highest column may be any field's.

    Raises:
        UserError: a budget that does not hold one column of the largest table.
    """
    dearest = max(schema.cardinalities)
    for _, budget in found:
        if budget and cost(budget.resource, dearest, 1, extra) > budget.limit:
            raise UserError(
                f"config key search.budget: {budget.text!r} does not hold one column of the largest field "
                f"({dearest:,} values), so a choice of columns may find nothing. Raise it"
            )


def last_that_fits(values: Sequence[float], fits: Callable[[float], bool]) -> int:
    """Place of the last of ascending values that fits, where all that fit come first.

    Raises:
        ValueError: none does.
    """
    place = bisect_right(values, False, key=lambda v: not fits(v)) - 1
    if place < 0:
        raise ValueError("not even the least fits")
    return place


def _cost(schema: Schema, resource: str, extra: int, widths: Sequence[int]) -> float:
    return float(sum(cost(resource, f.cardinality, w, extra) for f, w in zip(schema.fields, widths, strict=True)))


def _highest_first(scores: torch.Tensor) -> torch.Tensor:
    return scores.flatten().argsort(descending=True, stable=True)


def _counts(columns: torch.Tensor, scores: torch.Tensor) -> list[int]:
    fields, width = scores.shape
    return torch.bincount(columns // width, minlength=fields).tolist()
