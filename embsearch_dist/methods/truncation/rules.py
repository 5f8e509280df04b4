"""From moments of trained tables to widths, under a share to keep or under a budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

Cost = Callable[[Sequence[int]], float]
"""What the widths of all fields cost together; grows with each width."""


def fdo_widths(variances: torch.Tensor, keep: float) -> list[int]:
    """Field-level dimension optimisation (Wang et al., GDCN, CIKM 2023, section 4.4): per field the fewest principal
    components that hold a share ``keep`` of its variance; at least one.

    Args:
        variances: ``[F, w]`` float64: variance along each component, falling.
    """
    return [1 + int((row < keep).sum()) for row in _shares(variances)[:, :-1]]


def fdo_under(variances: torch.Tensor, cost: Cost, limit: float) -> tuple[list[int], float]:
    """The widths of the largest share that costs at most ``limit``, and that share.

    Widths change at the shares that components reach, so the largest is found among these by bisection.
    """
    steps = sorted({0.0, *_shares(variances).flatten().tolist()})
    place = _last(steps, lambda keep: cost(fdo_widths(variances, keep)) <= limit)
    return fdo_widths(variances, steps[place]), steps[place]


def magnitude_widths(squares: torch.Tensor, keep: float) -> list[int]:
    """Width of a field = how many of its columns are among the largest of all tables that together hold a share
    ``keep`` of the summed mean squares ``[F, w]``."""
    order = _largest_first(squares)
    held = squares.flatten()[order].cumsum(0)
    return _counts(order[: 1 + int((held[:-1] < keep * held[-1]).sum())], squares)


def magnitude_under(squares: torch.Tensor, cost: Cost, limit: float) -> tuple[list[int], float]:
    """The widths of the most of the largest columns that cost at most ``limit``, and their share of the summed squares.

    No smaller column is kept in place of a larger one that does not fit: what is kept is above one threshold.
    """
    order = _largest_first(squares)
    counts = list(range(1, len(order) + 1))
    kept = counts[_last(counts, lambda n: cost(_counts(order[:n], squares)) <= limit)]
    flat = squares.flatten()
    return _counts(order[:kept], squares), float(flat[order[:kept]].sum() / flat.sum().clamp(min=1e-300))


def _shares(variances: torch.Tensor) -> torch.Tensor:
    """``[F, w]``: share of a field's variance in its first k + 1 components; 1 where there is none."""
    summed = variances.clamp(min=0).cumsum(1)
    return torch.where(summed[:, -1:] > 0, summed / summed[:, -1:], 1.0)


def _largest_first(squares: torch.Tensor) -> torch.Tensor:
    return squares.flatten().argsort(descending=True, stable=True)


def _counts(columns: torch.Tensor, squares: torch.Tensor) -> list[int]:
    fields, width = squares.shape
    return torch.bincount(columns // width, minlength=fields).tolist()


def _last(values: Sequence[float], fits: Callable[[float], bool]) -> int:
    """Place of the last of ascending values that fits, where all that fit come first.

    Raises:
        ValueError: none does.
    """
    place = bisect_right(values, False, key=lambda v: not fits(v)) - 1
    if place < 0:
        raise ValueError("not even the least fits")
    return place
