"""How far figures may be off by the luck of the rows: bootstrap intervals, also of differences on the same rows.

A resample weighs each row by a Poisson number of mean 1, which is what drawing N of N rows with replacement comes to
for many rows (Chamandy et al. 2012). A model is sorted once; a resample only weighs the sorted rows, exactly and with
ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from embsearch_dist.train.measures import areas_by_group, normalised_entropy, probabilities

RESAMPLES = 200
LEVEL = 0.95
FIGURES = ("auc", "logloss", "ne", "calibration", "group_auc")
PIECE = 1 << 20  # rows that are added up in double precision at a time


def _poisson_table() -> np.ndarray:
    """Poisson numbers of mean 1 by 16 random bits; their chances are right to 1/65536."""
    chances = np.exp(-1.0) / np.array([math.factorial(k) for k in range(12)])
    counts = np.round(np.cumsum(chances) * (1 << 16)).astype(np.int64)
    return np.repeat(np.arange(12, dtype=np.uint8), np.diff(counts, prepend=0))


_POISSON = _poisson_table()


def row_weights(seed: int, resample: int, rows: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Weights ``[rows]`` uint8 of one resample, the same for every number of ranks.

    Args:
        groups: ``[rows]`` ids: all rows of one id get one weight, since they were not drawn one by one. Those of id 0,
            which are not of one value, are drawn by rows.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, resample]))
    draw = np.iinfo(np.uint16).max + 1
    weights = _POISSON[rng.integers(0, draw, rows, dtype=np.uint16)] if groups is None or (groups == 0).any() else None
    if groups is None:
        assert weights is not None
        return weights
    of_groups = _POISSON[rng.integers(0, draw, int(groups.max(initial=0)) + 1, dtype=np.uint16)]
    together = of_groups[groups]
    return together if weights is None else np.where(groups == 0, weights, together)


class Sample:
    """A model's answers to rows, made ready to be weighed.

    Args:
        logits: ``[N]`` float32.
        labels: ``[N]`` 0 or 1.
        groups: ``[N]`` ids, or None: then there is no AUC by group.
    """

    def __init__(self, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> None:
        self.order = np.argsort(logits, kind="stable")
        ordered = logits[self.order]
        self.clicked = labels > 0.5
        self.clicked_in_order = self.clicked[self.order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        self.ties = None if len(starts) >= len(ordered) else starts
        signs = np.where(self.clicked, np.float32(-1), np.float32(1))
        self.losses = np.logaddexp(np.float32(0), signs * logits)
        self.predicted = probabilities(logits).astype(np.float32)
        self.areas = None
        if groups is not None:
            found = areas_by_group(logits, labels, groups)
            # Rows of a group are weighed alike, so its AUC is the same in every resample.
            first = np.full(int(groups.max(initial=0)) + 1, -1, np.int64)
            first[groups[::-1]] = np.arange(len(groups))[::-1]
            self.areas = (found, first[found.groups])

    def figures(self, weights: np.ndarray) -> np.ndarray:
        """:data:`FIGURES` of the rows, each counted so often as ``weights [N]`` uint8 says; NaN where undefined.

        With groups, the rows of one must have one weight.
        """
        rows = clicks = loss = predicted = 0.0
        for start in range(0, len(weights), PIECE):
            part = slice(start, start + PIECE)
            w = weights[part].astype(np.float64)
            rows += float(w.sum())
            clicks += float(w @ self.clicked[part])
            loss += float(w @ self.losses[part])
            predicted += float(w @ self.predicted[part])
        logloss = loss / rows if rows else math.nan
        entropy = normalised_entropy(logloss, clicks / rows) if rows else math.nan
        calibration = predicted / clicks if clicks else math.nan
        return np.array([self._area(weights), logloss, entropy, calibration, self._by_group(weights)])

    def _area(self, weights: np.ndarray) -> float:
        ordered = weights[self.order]
        positive = np.where(self.clicked_in_order, ordered, np.uint8(0))
        negative = ordered - positive
        if self.ties is not None:
            positive = np.add.reduceat(positive, self.ties, dtype=np.int64)
            negative = np.add.reduceat(negative, self.ties, dtype=np.int64)
        to_here = np.cumsum(negative, dtype=np.int64)
        places = np.flatnonzero(positive)
        p, own = positive[places].astype(np.int64), negative[places].astype(np.int64)
        pairs = int(p.sum()) * int(to_here[-1]) if len(to_here) else 0
        return float(p @ (2 * to_here[places] - own)) / (2 * pairs) if pairs else math.nan

    def _by_group(self, weights: np.ndarray) -> float:
        if self.areas is None:
            return math.nan
        found, first = self.areas
        share = weights[first] * found.rows
        return float(share @ found.areas) / int(share.sum()) if share.any() else math.nan


def resampled(
    samples: Sequence[Sample], seed: int, resamples: Sequence[int], groups: np.ndarray | None = None
) -> np.ndarray:
    """:data:`FIGURES` of one model, or what the first has more than the second, ``[len(resamples), figures]``.

    Args:
        samples: one model, or two on the same rows, which then get the same weights: what is hard for both in a
            resample cancels out.
        resamples: numbers of the resamples; each depends on its number and ``seed`` alone.
        groups: ``[N]``, to draw groups of rows instead of rows.
    """
    rows = len(samples[0].order)
    found = np.empty((len(resamples), len(FIGURES)))
    for k, number in enumerate(resamples):
        weights = row_weights(seed, number, rows, groups)
        figures = [s.figures(weights) for s in samples]
        found[k] = figures[0] if len(figures) == 1 else figures[0] - figures[1]
    return found


def as_told(value: np.ndarray, spread: np.ndarray) -> dict[str, dict[str, Any]]:
    """For a result file: of each defined figure its value, the ends of its percentile interval at :data:`LEVEL` (Efron
    1979), and its standard error.

    Args:
        value: ``[figures]`` of the rows as they are.
        spread: ``[resamples, figures]`` of :func:`resampled`; resamples without a value (of one class) do not count.
    """
    told = {}
    for name, own, column in zip(FIGURES, value.tolist(), spread.T, strict=True):
        column = column[np.isfinite(column)]
        if math.isfinite(own) and len(column) > 1:
            low, high = np.quantile(column, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
            told[name] = {"value": own, "low": low, "high": high, "standard_error": float(column.std(ddof=1))}
    return told
