"""From the variances of trained tables to widths, under a share to keep or under a budget: FDO."""

from __future__ import annotations

import torch

from embsearch_dist.methods.columns import Cost, last_that_fits


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
    place = last_that_fits(steps, lambda keep: cost(fdo_widths(variances, keep)) <= limit)
    return fdo_widths(variances, steps[place]), steps[place]


def _shares(variances: torch.Tensor) -> torch.Tensor:
    """``[F, w]``: share of a field's variance in its first k + 1 components; 1 where there is none."""
    summed = variances.clamp(min=0).cumsum(1)
    return torch.where(summed[:, -1:] > 0, summed / summed[:, -1:], 1.0)
