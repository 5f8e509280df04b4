"""Which candidate widths of a field can differ at all.

A wide table behind a linear map may be exactly a narrow one: E W = E' W' whenever the narrow one has room for the rank
of E W. Such candidates need be trained, scored and counted once, at the cheapest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embsearch_dist.config.sections import ModelConfig
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


def candidate_mask(ranks: Sequence[int | None], candidates: Sequence[int]) -> torch.Tensor:
    """``[F, T]`` bool: each candidate but those above one that has a field's largest rank already.

    Args:
        ranks: of each field, at least 1; None: each candidate can differ.
        candidates: widths, ascending.
    """
    cheaper = torch.tensor([0, *candidates[:-1]])  # candidates ascend: the neighbour below is the widest cheaper one
    largest = torch.tensor([max(candidates) + 1 if rank is None else rank for rank in ranks])
    return cheaper < largest[:, None]


def distinct_candidates(schema: Schema, candidates: Sequence[int], model: ModelConfig) -> torch.Tensor:
    """Which candidates of each field are not exactly another, cheaper one.

    Args:
        candidates: widths, ascending.
        model: transform, norm, backbone and the sizes behind them.

    Returns:
        ``[F, T]`` bool, the first in each row True. Every candidate that is left out can be written as the last one
        that is not with the same logits for every row. What tells them apart is training alone: their starts, their
        steps, an L2.
    """
    return candidate_mask([largest_rank(f, model) for f in schema.fields], candidates)
