"""Which candidate widths of a field can differ at all.

A wide table behind a linear map may be exactly a narrow one: E W = E' W' whenever the narrow one has room for the rank
of E W. Such candidates need be trained, scored and counted once, at the cheapest.
"""

from __future__ import annotations

from collections.abc import Sequence

from embsearch_dist.config import ModelConfig
from embsearch_dist.schema import Field, Schema


def largest_rank(field: Field, model: ModelConfig) -> int | None:
    """Width from which on more columns of a field's table cannot change a model; None: each can.

    * ``width``: d_f, as E W has d_f columns, and any map of full rank reaches all of them. Not the number of rows: a
      narrower map that other fields share spans a part of the common space alone. None for a list field: the shared
      biases of two widths differ, and a table can make up for that only where each sample looks up one row.
    * ``field``: also the number of rows, as a narrower map of the field's own may span what its rows need.
    * ``identity``: behind an mlp or Wide & Deep the field's inputs of the first layer (and of the linear part, where it
      reads embeddings) are such a map. An FM compares columns of one field with those of the others: each counts.
    * ``mlp``: each counts, as every width has a nonlinear layer of its own.

    With a BatchNorm, whose scale and shift belong to the width, each counts.
    """
    rows = field.cardinality
    if model.norm != "none":
        return None
    if model.transform == "width":
        return None if field.is_list else model.unified_width
    if model.transform == "field":
        return min(rows, model.unified_width)
    if model.transform == "identity" and model.backbone in ("mlp", "wide_deep"):
        outputs = (model.hidden[0] if model.hidden else 0) + int(model.backbone == "wide_deep" and not model.extra)
        return max(1, min(rows, outputs))  # width 0 drops the value's own weight as well
    return None


def distinct_candidates(schema: Schema, candidates: Sequence[int], model: ModelConfig) -> list[list[int]]:
    """For each field the numbers of the candidates that are not exactly another, cheaper one.

    Args:
        candidates: widths, ascending.
        model: transform, norm, backbone and the sizes behind them.

    Returns:
        ``[F]`` lists, ascending, each with at least the first candidate. Every candidate that is left out can be
        written as the last one of the list with the same logits for every row. What tells them apart is training
        alone: their starts, their steps, an L2.
    """
    found = []
    for field in schema.fields:
        rank = largest_rank(field, model)
        enough = [j for j, d in enumerate(candidates) if rank is not None and d >= rank]
        found.append(list(range(len(candidates)))[: enough[0] + 1 if enough else None])
    return found
