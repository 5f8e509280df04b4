"""What logits are worth beside AUC and logloss: normalised entropy, calibration, its curve, and AUC by group.

All of it is numpy on whole arrays, and a function of the set of rows: their order, and so the number of ranks, changes
nothing but the last bits of sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CURVE_BINS = 20
ROWS_AT_A_TIME = 1 << 22  # of grouped rows; more only where one group has more


def pack(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Integers ``[N]`` int64 in the order of (score, label): one sort of them is several times faster than an argsort
    and a gather.

    Args:
        scores: ``[N]``, taken as float32; -0 counts as 0, NaN as more than infinity.
        labels: ``[N]`` 0 or 1.
    """
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32)
    return (_flipped(bits).astype(np.int64) << 1) | (labels > 0.5)


def _flipped(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 as int32 in the order of the numbers, and back: it undoes itself."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def normalised_entropy(logloss: float, click_rate: float) -> float:
    """Logloss against that of always predicting the rows' own click rate (He et al. 2014, section 2, equation 1).

    Args:
        logloss: mean over the rows, in nats.
        click_rate: share of clicks among the same rows.

    Returns:
        Below 1 where the model knows more than the click rate; NaN where all rows are of one class.
    """
    if not 0 < click_rate < 1:
        return math.nan
    return logloss / -(click_rate * math.log(click_rate) + (1 - click_rate) * math.log1p(-click_rate))


@dataclass(frozen=True)
class Curve:
    """Rows in the order of their predictions, cut into bins: what was predicted and what came.

    Attributes:
        rows: of each bin, ``[B]``.
        predicted: mean probability of each bin.
        clicked: share of clicks of each bin.
    """

    rows: np.ndarray
    predicted: np.ndarray
    clicked: np.ndarray

    @property
    def calibration(self) -> float:
        """Predicted clicks over clicks (He et al. 2014, section 2); NaN without a click."""
        clicks = float(self.rows @ self.clicked)
        return float(self.rows @ self.predicted) / clicks if clicks else math.nan

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini et al. 2015), over bins of equally many rows."""
        rows = int(self.rows.sum())
        return float(self.rows @ np.abs(self.predicted - self.clicked)) / rows if rows else math.nan

    def body(self) -> dict[str, list[float]] | None:
        """For a result file; None where a prediction is no number."""
        if not np.isfinite(self.predicted).all():
            return None
        return {"rows": self.rows.tolist(), "predicted": self.predicted.tolist(), "clicked": self.clicked.tolist()}


def reliability(ordered: np.ndarray, bins: int = CURVE_BINS) -> Curve:
    """The reliability curve in bins of equally many rows.

    Rows of one prediction are never parted, or their order in the data would count: a bin may be larger then, and there
    may be fewer of them.

    Args:
        ordered: ``[N]`` :func:`pack` of logits and labels, sorted.
    """
    rows = len(ordered)
    cuts = {0, rows}
    for k in range(1, bins):
        at = rows * k // bins
        if at < rows:
            cuts.add(int(np.searchsorted(ordered, (ordered[at] >> 1) << 1)))
    edges = sorted(cuts)
    sizes, predicted, clicked = [], [], []
    for start, stop in zip(edges, edges[1:], strict=False):
        part = ordered[start:stop]
        sizes.append(stop - start)
        clicked.append(np.count_nonzero(part & 1) / len(part))
        predicted.append(float(probabilities(_flipped((part >> 1).astype(np.int32)).view(np.float32)).mean()))
    return Curve(np.array(sizes, np.int64), np.array(predicted), np.array(clicked))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Sigmoid in double precision."""
    with np.errstate(over="ignore"):  # the exponential of a very negative logit: infinity gives the right 0
        return 1 / (1 + np.exp(-logits.astype(np.float64)))


@dataclass(frozen=True)
class GroupAreas:
    """AUC inside each group that has rows of both classes.

    Attributes:
        groups: their ids, ascending, ``[G]`` int64.
        rows: rows of each.
        areas: AUC of each.
        share: their rows against all rows.
    """

    groups: np.ndarray
    rows: np.ndarray
    areas: np.ndarray
    share: float

    @property
    def mean(self) -> float:
        """Mean AUC, each group weighed by its rows (GAUC: Zhu et al. 2017, Zhou et al. 2018); NaN without a group."""
        return float(self.rows @ self.areas) / int(self.rows.sum()) if len(self.rows) else math.nan


def areas_by_group(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, without: int | None = 0) -> GroupAreas:
    """AUC of each group, exactly, ties counted as one half.

    Group, score and label are packed into one integer of 64 bits and sorted in place, then pieces of whole groups are
    counted: 8 bytes a row, and some 100 bytes for each row of a piece.

    Args:
        scores: ``[N]``, as :func:`pack` takes them.
        labels: ``[N]`` 0 or 1.
        groups: ``[N]`` ids, at least 0 and below 2**31.
        without: an id whose rows are no group. Id 0 holds rare, unseen and missing values, so its rows are not those of
            one user or item. None: every id is a group.
    """
    packed = pack(scores, labels).view(np.uint64)
    packed += np.uint64(1 << 32)  # scores count from 0 on now, in 33 bits with the label
    packed |= groups.astype(np.uint64) << np.uint64(33)
    packed.sort()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    while start < len(packed):
        last = packed[min(start + ROWS_AT_A_TIME, len(packed)) - 1] | np.uint64((1 << 33) - 1)  # the end of its group
        stop = int(np.searchsorted(packed, last, side="right"))
        found.append(_areas(packed[start:stop]))
        start = stop
    ids, rows, areas = (np.concatenate(part) for part in zip(*found, strict=True)) if found else [np.zeros(0)] * 3
    kept = ~np.isnan(areas) if without is None else ~np.isnan(areas) & (ids != without)
    ids, rows, areas = ids[kept], rows[kept], areas[kept]
    return GroupAreas(ids, rows, areas, int(rows.sum()) / len(packed) if len(packed) else math.nan)


def _areas(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, rows and AUC (NaN: one class) of the groups in a sorted piece of whole groups."""
    ties = np.flatnonzero(_changes(packed >> np.uint64(1)))  # where rows of another group or score begin
    positives = np.add.reduceat((packed & np.uint64(1)).astype(np.int64), ties)
    negatives = np.diff(np.append(ties, len(packed))) - positives
    owner = packed[ties] >> np.uint64(33)
    heads = np.flatnonzero(_changes(owner))
    below = negatives.cumsum() - negatives
    below -= np.repeat(below[heads], np.diff(np.append(heads, len(ties))))  # negatives of the own group alone
    twice = np.add.reduceat(positives * (2 * below + negatives), heads)
    p, n = np.add.reduceat(positives, heads), np.add.reduceat(negatives, heads)
    with np.errstate(invalid="ignore"):
        areas = twice / (2 * p * n)
    return owner[heads].astype(np.int64), p + n, areas


def _changes(values: np.ndarray) -> np.ndarray:
    """Whether a value differs from the one before it; the first does."""
    return np.concatenate(([True], values[1:] != values[:-1]))
