"""Candidate widths: what they may be, and how a supernet's tables hold them."""

from __future__ import annotations

from collections.abc import Sequence

from embsearch_dist.config.options import require
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


def check_table_width(width: int) -> None:
    """Of the key ``search.width``, of a search whose tables have no columns beside it.

    Raises:
        UserError: it is no multiple of 4, at least 4.
    """
    require(width >= 4 and width % 4 == 0, "search.width", f"must be a multiple of 4, got {width}")


def check_table_candidates(candidates: Sequence[int]) -> None:
    """Of the key ``search.candidates``, of a search whose tables are as wide as the widest of them.

    Raises:
        UserError: as :func:`check_candidates`, or the widest is no multiple of 4.
    """
    widest = check_candidates(candidates)[-1]
    require(widest % 4 == 0, "search.candidates", f"the widest must be a multiple of 4, got {widest}")
