"""Candidate widths: what they may be, and how a supernet's tables hold them."""

from __future__ import annotations

from collections.abc import Sequence

from embsearch_dist.errors import UserError

SCHEMES = ("shared", "independent")


def check_candidates(candidates: Sequence[int], key: str = "search.candidates") -> list[int]:
    """Candidate widths: at least two, whole, >= 0, strictly ascending.

    Raises:
        UserError: naming the key and the offending pair.
    """
    widths = list(candidates)
    if len(widths) < 2:
        raise UserError(f"config key {key}: at least two candidate widths are needed, got {widths}")
    if widths[0] < 0:
        raise UserError(f"config key {key}: widths must be >= 0 (0 = drop the field), got {widths[0]}")
    for a, b in zip(widths, widths[1:], strict=False):
        if b <= a:
            raise UserError(f"config key {key}: widths must ascend, but {b} follows {a}; write {sorted(set(widths))}")
    return widths
