"""Another click model for the made-up Criteo rows: crosses of three fields and a nonlinearity of sums.

By default a logit is inner products of two fields' vectors and effects of single columns, which is the form of a DLRM
or an FM: a search for networks has nothing to find there. Here half of the pairs' variance is left, and two parts come
that no sum of inner products has:

- a :class:`Triple` adds ``s / sqrt(r) * sum_k a_k(x) b_k(y) c_k(z)``. Of three independent signs the product says
  nothing as long as one of them is unknown, so no pair of the three fields tells anything of it;
- a :class:`Hinge` adds ``max(0, t_k - 1)``, centred, for directions k of the sum ``t_k`` of five fields' signs. Half of
  its variance is in effects of single fields, the rest in crosses of two to five.

Both read bits of the values' latent vectors that pairs and effects of single fields do not use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CLICKS = ("pairs", "crosses")
PAIR_SHARE = 0.5  # of the variance of each pair that is left
CORNER = 1  # where hinges begin to rise: further up than at 0 they are less of a straight line
TRIPLE_BIT, HINGE_BIT, MOST = 16, 24, 8  # first bits of the two, and how many each has


@dataclass(frozen=True)
class Triple:
    """Three categorical fields that interact: ``rank`` directions, ``variance`` of their part of the logit."""

    fields: tuple[str, str, str]
    rank: int
    variance: float


@dataclass(frozen=True)
class Hinge:
    """Fields whose signs are summed and cut off below in ``directions`` directions, of ``variance`` together."""

    fields: tuple[str, ...]
    directions: int
    variance: float


# Fields of few values, or with most rows in some: a triple is only learned where its values meet often.
TRIPLES = (
    Triple(("C14", "C17", "C23"), 4, 0.5),
    Triple(("C2", "C6", "C25"), 4, 0.4),
    Triple(("C1", "C8", "C13"), 2, 0.3),
)
HINGES = (
    Hinge(("C2", "C14", "C17", "C23", "C25"), 4, 0.4),
    Hinge(("C1", "C6", "C7", "C8", "C11"), 4, 0.3),
)
Columns = Mapping[str, np.ndarray]


def ranks(of_pairs: Mapping[str, int]) -> dict[str, int]:
    """Column -> directions of its vector that the logit reads, from those that pairs and single columns read."""
    found = dict(of_pairs)
    by_triples = [(name, t.rank) for t in TRIPLES for name in t.fields]
    for name, directions in [*by_triples, *((name, h.directions) for h in HINGES for name in h.fields)]:
        found[name] += directions
    return found


def parts(bits: Columns, missing: Columns) -> np.ndarray:
    """``[N]``: what all of them add to the logit. Arguments as :func:`triple_part`."""
    found = [triple_part(t, bits, missing) for t in TRIPLES]
    return np.sum([*found, *(hinge_part(h, bits, missing) for h in HINGES)], axis=0)


def triple_part(t: Triple, bits: Columns, missing: Columns) -> np.ndarray:
    """``[N]``: what a triple adds to the logit; nothing where one of its cells is blank.

    Args:
        bits: field -> latent vectors ``[N]`` uint64, a bit a sign (1 is minus).
        missing: field -> ``[N]`` bool, of fields with blanks.
    """
    a, b, c = (bits[name] for name in t.fields)
    minus = np.bitwise_count((a ^ b ^ c) >> np.uint64(TRIPLE_BIT) & np.uint64(2**t.rank - 1))
    part = (t.rank - 2.0 * minus) * (t.variance / t.rank) ** 0.5
    for name in t.fields:
        if name in missing:
            part[missing[name]] = 0
    return part


def hinge_part(h: Hinge, bits: Columns, missing: Columns) -> np.ndarray:
    """``[N]``: what a hinge adds to the logit; a blank cell's sign is 0. Arguments as :func:`triple_part`."""
    mean, variance = hinge_moments(len(h.fields))
    scale = (h.variance / (h.directions * variance)) ** 0.5
    total = np.zeros(len(bits[h.fields[0]]))
    for k in range(h.directions):
        summed = np.zeros(len(total))
        for name in h.fields:
            sign = 1.0 - 2.0 * (bits[name] >> np.uint64(HINGE_BIT + k) & np.uint64(1))
            if name in missing:
                sign[missing[name]] = 0
            summed += sign
        total += np.maximum(summed - CORNER, 0) - mean
    return total * scale


def hinge_moments(signs: int) -> tuple[float, float]:
    """Mean and variance of ``max(0, t - 1)`` for a sum t of independent fair signs."""
    values = [(max(0, signs - 2 * k - CORNER), math.comb(signs, k) / 2**signs) for k in range(signs + 1)]
    mean = sum(v * p for v, p in values)
    return mean, sum(v * v * p for v, p in values) - mean**2
