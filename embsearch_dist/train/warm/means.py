"""What a model keeps of columns that are cut and of fields that are dropped: their mean, which is a bias.

A row's embedding of a field is its kept columns k and what is cut, whose mean over the training rows is c. To hold the
cut part at its mean changes a model less than to leave it out, and a model without these columns can say it: in the
first layer and in the linear part c is a bias; in FM's products ``<k + c, k' + c'> = <k, k'> + <k, c'> + <c, k'> +
<c, c'>``, of two fields, it is a linear weight of every other field's kept columns, and a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.warm.dense import INPUTS, Layout, Tensors
from embsearch_dist.train.warm.fill import Saved, table_key
from embsearch_dist.train.warm.widths import FieldMove


@dataclass(frozen=True)
class Means:
    """What is cut of each field, at its mean.

    Attributes:
        columns: field -> ``[old width]`` float32, turned as the table is; zeros where columns are kept.
        weights: field that is dropped -> mean of its values' own first-order weights; 0 where values have none.
    """

    columns: Mapping[str, torch.Tensor]
    weights: Mapping[str, float]

    def beside(self, field: str, count: int) -> torch.Tensor:
        """``[count]``: what the cut parts of all other fields are to FM beside a field's first ``count`` columns."""
        total = torch.zeros(count)
        for other, c in self.columns.items():
            if other != field:
                width = min(count, len(c))
                total[:width] += c[:width]
        return total

    def products(self) -> float:
        """Sum over pairs of fields of the products of their cut parts."""
        if not self.columns:
            return 0.0
        longest = max(map(len, self.columns.values()))
        parts = torch.stack([torch.nn.functional.pad(c.double(), (0, longest - len(c))) for c in self.columns.values()])
        return float(0.5 * (parts.sum(0).square().sum() - parts.square().sum()))


def foldable(head: Any, norm: str, maps: tuple[bool, bool]) -> bool:
    """Whether means can be kept: the backbone is a sum over fields up to its first layer, with nothing learned in front
    of it."""
    return type(head.backbone) is Backbone and norm == "none" and not any(maps)


def cut_means(
    saved: Saved, moves: Mapping[str, FieldMove], weights: Mapping[str, torch.Tensor], extra: int, context: Context
) -> Means:
    """Rank 0 reads the earlier tables of the fields that lose columns, and tells.

    Args:
        moves: of fields with a mean; new width 0 drops one.
        weights: ``[earlier rows]`` of each: how often its values occur in a training row on average.
        extra: columns behind the width.
    """
    losing = [f for f, m in moves.items() if m.new < m.old]
    if not losing:
        return Means({}, {})

    def find() -> dict[str, list[float]]:
        found = {}
        for field in losing:
            table = saved.read("tables", table_key(field))
            assert table is not None
            move = moves[field]
            mean = weights[field] @ table[:, : move.old + extra].double()
            own = mean[: move.old] if move.rotation is None else mean[: move.old] @ move.rotation.double()
            own[: move.kept] = 0
            found[field] = [*own.tolist(), *mean[move.old :].tolist()]
        return found

    found = context.share(context.first("reading the means of what is cut", find)) or {}
    columns = {f: torch.tensor(v[: moves[f].old]) for f, v in found.items()}
    return Means(columns, {f: sum(v[moves[f].old :]) for f, v in found.items() if not moves[f].new})


@torch.no_grad()
def fold(means: Means, head: Any, earlier: Tensors, old: Layout, new: Layout, moves: Mapping[str, FieldMove]) -> None:
    """Add what is cut to the biases, and to the linear weights, of a head that was filled already.

    Args:
        earlier: the earlier head's tensors.
        old, new: what stands in front of the two backbones.
    """
    backbone: Backbone = head.backbone
    if backbone.deep and (before := earlier.get(INPUTS[0])) is not None and len(before) == backbone.first_width:
        backbone.first.bias.add_(_read(before, means, old, moves).to(backbone.first.bias))
    shift = sum(means.weights.values())
    if not backbone.values:
        shift += float(_read(earlier[INPUTS[1]], means, old, moves))
    if backbone.fm:
        shift += means.products()
        if not backbone.values:  # else the weights of values take it, in the tables
            for field, places in new.slices().items():
                if field in moves:
                    kept = moves[field].kept
                    row = backbone.linear.weight[0, places.start : places.start + kept]
                    row += means.beside(field, kept).to(row)
    backbone.linear.bias.add_(shift)


def _read(weight: torch.Tensor, means: Means, old: Layout, moves: Mapping[str, FieldMove]) -> torch.Tensor:
    """``[outputs]``: what weights ``[outputs, old inputs]`` make of the cut parts."""
    total, slices = torch.zeros(len(weight)), old.slices()
    for field, c in means.columns.items():
        rows = weight[:, slices[field]]
        rotation = moves[field].rotation
        total += (rows if rotation is None else rows @ rotation.to(rows)) @ c.to(rows)
    return total
