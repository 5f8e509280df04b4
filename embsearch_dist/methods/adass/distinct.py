"""Candidates of a field that cannot differ: drawn, searched and counted once, at the cheapest of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embsearch_dist.config import Config
from embsearch_dist.schema import Schema

NAMED = 6  # fields of one line of :func:`describe`


def distinct_candidates(cardinalities: Sequence[int], candidates: Sequence[int], bound: int | None) -> torch.Tensor:
    """Which candidates of each field can give what no cheaper one gives.

    Behind a learned linear map a table ``E [n, d]`` appears as the product ``E W`` alone, whose rank is at most
    min(n, d, d_f). With r = min(n, d_f), every candidate of r columns or more reaches every matrix of that rank, so
    the cheapest of them stands for all; those of fewer than r columns differ from each other. A width of 0 is
    always distinct.

    This is exact for d >= d_f and for a map of the field's own. A map that fields of one width share keeps the rank
    and ties the directions: a field of n values at a width between n and d_f lies in the subspace of that width.

    Args:
        cardinalities: rows of each table, or what else bounds the rank of a field, at least 1 each.
        candidates: widths, ascending.
        bound: rank that the transform lets through: d_f of a linear one, None when it does not narrow.

    Returns:
        ``[F, T]`` bool; at least one candidate with columns in every row.
    """
    rank = torch.tensor([n if bound is None else min(n, bound) for n in cardinalities])[:, None]
    cheaper = torch.tensor([0, *candidates[:-1]])  # candidates ascend, so the neighbour below is the widest cheaper one
    return cheaper < rank


def distinct_of(config: Config, schema: Schema) -> torch.Tensor:
    """:func:`distinct_candidates` of an AdaS&S run, as its supernet's transform makes them; all with
    ``search.distinct: false``."""
    search = config.search
    if not search.distinct:
        return torch.ones(len(schema.fields), len(search.candidates), dtype=torch.bool)
    return distinct_candidates(schema.cardinalities, search.candidates, config.model.unified_width)


def describe(names: Sequence[str], candidates: Sequence[int], distinct: torch.Tensor) -> list[str]:
    """A line for each set of duplicates: ``gender: 16, 32 are the same as 8: counted once``."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name, row in zip(names, distinct.tolist(), strict=True):
        if not all(row):
            groups.setdefault(tuple(row), []).append(name)
    lines = []
    for row, fields in groups.items():
        more = f" and {len(fields) - NAMED} more fields" if len(fields) > NAMED else ""
        same = [str(d) for d, own in zip(candidates, row, strict=True) if not own]
        kept = max(d for d, own in zip(candidates, row, strict=True) if own)
        verb = "is" if len(same) == 1 else "are"
        lines.append(f"{', '.join(fields[:NAMED])}{more}: {', '.join(same)} {verb} the same as {kept}: counted once")
    return lines
