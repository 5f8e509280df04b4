"""Candidates of a field that cannot differ: drawn, searched and counted once, at the cheapest of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embsearch_dist.config.sections import Config
from embsearch_dist.models.distinct import distinct_candidates
from embsearch_dist.schema import Schema

NAMED = 6  # fields of one line of :func:`describe`


def distinct_of(config: Config, schema: Schema) -> torch.Tensor:
    """``[F, T]`` bool: :func:`distinct_candidates` of an AdaS&S run; all with ``search.distinct: false``."""
    search = config.search
    if not search.distinct:
        return torch.ones(len(schema.fields), len(search.candidates), dtype=torch.bool)
    return distinct_candidates(schema, search.candidates, config.model)


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
