"""Figures over seeds, as tables of comparisons show them: one seed is called one seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> list[float]:
    """Mean and sample standard deviation, NaN for one value; both NaN where there is none."""
    if not values:
        return [math.nan, math.nan]
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan]


def with_deviation(figure: Sequence[float], form: str) -> str:
    """``0.7612 +- 0.0007``, or the mean alone of one seed."""
    return f"{figure[0]:{form}}" + ("" if math.isnan(figure[1]) else f" +- {figure[1]:{form}}")


def with_error(gain: Sequence[float], seeds: int, form: str) -> str:
    """``+0.0010 (s.e. 0.0004)``, or ``+0.0010 (one seed)``."""
    if math.isnan(gain[0]):
        return "-"
    told = "one seed" if math.isnan(gain[1]) else f"s.e. {gain[1] / math.sqrt(seeds):{form}}"
    return f"{gain[0]:+{form}} ({told})"
