"""The ids of a list field over some rows: any number of them a row, in one array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bags:
    """One bag of ids a row.

    Attributes:
        ids: ``[E]`` int32, those of the first row first.
        offsets: ``[N + 1]`` int64; row k has ``ids[offsets[k] : offsets[k + 1]]``.
        weights: ``[E]`` float32 of a weighted field, else ``None``.
    """

    ids: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """``[N]`` ids of each row."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray | slice) -> Bags:
        """The bags of the given rows, copied."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            offsets = self.offsets[start : max(start, stop) + 1]
            inside = slice(offsets[0], offsets[-1])
            weights = None if self.weights is None else self.weights[inside].copy()
            return Bags(self.ids[inside].copy(), offsets - offsets[0], weights)
        # Only the given rows are looked at: a window may have a thousand times as many.
        starts = self.offsets.take(rows)
        lengths = self.offsets.take(rows + 1) - starts
        offsets = offsets_of(lengths)
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        weights = None if self.weights is None else self.weights.take(places)
        return Bags(self.ids.take(places), offsets, weights)

    @staticmethod
    def join(parts: Sequence[Bags]) -> Bags:
        """The rows of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        weights = [p.weights for p in parts if p.weights is not None]
        return Bags(
            np.concatenate([p.ids for p in parts]),
            offsets_of(np.concatenate([p.lengths for p in parts])),
            np.concatenate(weights) if weights else None,
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """``[N]`` lengths -> ``[N + 1]`` int64 offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
