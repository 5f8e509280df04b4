"""The dense part of an earlier model in a new one: copied, or its inputs moved field by field.

A weight of the same name and shape is copied. Where fields or widths have changed, weights that read embeddings are
moved field by field: the first layer and the linear part of FM, DeepFM, Wide & Deep and the MLP, and the linear maps in
front. What has no counterpart stays as the new model made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.unify import MixedUnify
from embsearch_dist.train.warm.widths import FieldMove

INPUTS = ("backbone.first.weight", "backbone.linear.weight")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """What stands in front of a backbone.

    Attributes:
        fields: kept fields in their order.
        widths: of their tables.
        places: inputs of the backbone that are each field's.
        dense: dense columns, behind them.
        maps: the tables' rows pass a learned linear map.
    """

    fields: tuple[str, ...]
    widths: tuple[int, ...]
    places: tuple[int, ...]
    dense: tuple[str, ...]
    maps: bool

    @classmethod
    def of(cls, model: Mapping[str, Any], fields: Sequence[str], widths: Sequence[int], dense: Sequence[str]) -> Layout:
        """Args:
        model: ``transform``, ``unify`` and ``unified_width`` of the model section.
        """
        alike = len(set(widths)) == 1 and model["unify"] == "mixed"
        maps = model["transform"] != "identity" and not alike
        places = [int(model["unified_width"])] * len(fields) if maps else widths
        return cls(tuple(fields), tuple(widths), tuple(places), tuple(dense), maps)

    def slices(self) -> dict[str, slice]:
        """Inputs of each field."""
        ends = list(accumulate(self.places, initial=0))
        return {f: slice(a, b) for f, a, b in zip(self.fields, ends, ends[1:], strict=False)}


class DenseMove:
    """Values of the earlier head's tensors for the new head.

    Args:
        head: the new one.
        old, new: what stands in front of the two backbones.
        moves: of the fields that both have.
        transform: ``model.transform``, the same of both.
    """

    def __init__(self, head: Any, old: Layout, new: Layout, moves: Mapping[str, FieldMove], transform: str) -> None:
        self.old, self.new, self.moves, self.transform = old, new, moves, transform
        turned = any(m.rotation is not None for m in moves.values())
        self.same = old == new and not turned
        self.additive = type(head.backbone) is Backbone
        self.values = self.additive and head.backbone.values
        self.unify = head.unify if isinstance(head.unify, MixedUnify) else None

    def __call__(self, earlier: Tensors, target: Tensors, squares: bool = False) -> dict[str, torch.Tensor]:
        """Values for as many names of ``target`` as have a counterpart, on the CPU.

        ``squares``: the tensors are means of squared gradients, kept by an optimizer for the weights of these names.
        """
        found: dict[str, torch.Tensor] = {}
        for name, value in target.items():
            if name not in earlier:
                continue
            before = earlier[name]
            if not self.same and name.startswith("unify."):
                continue  # names count maps of fields or widths, which may be others now
            if not self.same and self.additive and name in INPUTS:
                if before.shape[0] == value.shape[0]:
                    found[name] = self._inputs(before, value.shape[1], name, squares)
            elif before.shape == value.shape:
                found[name] = before
        if not self.same and self.unify is not None and self.old.maps:
            found |= self._maps(earlier, target, squares)
        return found

    def _inputs(self, weight: torch.Tensor, columns: int, name: str, squares: bool) -> torch.Tensor:
        """``[outputs, old inputs]`` -> ``[outputs, columns]``; zero where an input is new."""
        out = weight.new_zeros(weight.shape[0], columns)
        first_old = first_new = 0
        if name == INPUTS[0] or not self.values:
            old, new = self.old.slices(), self.new.slices()
            for field in (f for f in self.new.fields if f in old):
                places = new[field].stop - new[field].start
                if self.old.maps or self.new.maps:
                    kept = min(places, old[field].stop - old[field].start)
                    out[:, new[field].start : new[field].start + kept] = weight[:, old[field]][:, :kept]
                else:
                    out[:, new[field]] = self.moves[field].inputs(weight[:, old[field]], places, squares)
            first_old, first_new = sum(self.old.places), sum(self.new.places)
        for k, dense in enumerate(self.new.dense):
            if dense in self.old.dense:
                out[:, first_new + k] = weight[:, first_old + self.old.dense.index(dense)]
        return out

    def _maps(self, earlier: Tensors, target: Tensors, squares: bool) -> dict[str, torch.Tensor]:
        """The linear maps, by field or by width. A width that was not there gets the mean of its fields' maps."""
        assert self.unify is not None
        by_field = self.transform == "field"
        old_groups, new_groups = sorted(set(self.old.widths)), sorted(set(self.new.widths))

        def old_map(field: str) -> int:
            k = self.old.fields.index(field)
            return k if by_field else old_groups.index(self.old.widths[k])

        sources: list[list[str]] = []
        for j in range(len(self.unify.weights)):
            own = [f for f, m in zip(self.new.fields, self.unify.maps, strict=True) if m == j and f in self.moves]
            same = [f for f in self.old.fields if not by_field and self._old_width(f) == new_groups[j]]
            sources.append(same[:1] or own)
        found: dict[str, torch.Tensor] = {}
        for j, fields in enumerate(sources):
            if f"unify.weights.{j}" in target and fields:
                parts = [self._map(earlier[f"unify.weights.{old_map(f)}"], f, j, by_field, squares) for f in fields]
                found[f"unify.weights.{j}"] = torch.stack(parts).mean(0)
        for name in ("unify.bias", "unify.after.weight", "unify.after.bias"):
            if name in target and name in earlier and target[name].shape[1:] == earlier[name].shape[1:]:
                rows = target[name].detach().cpu().clone()
                for j, fields in enumerate(sources):
                    if fields:
                        rows[j] = torch.stack([earlier[name][old_map(f)] for f in fields]).mean(0)
                found[name] = rows
        return {n: v for n, v in found.items() if v.shape == target[n].shape}

    def _map(self, weight: torch.Tensor, field: str, group: int, by_field: bool, squares: bool) -> torch.Tensor:
        """A map ``[old width, d]`` -> ``[new width, d]``."""
        assert self.unify is not None
        places = self.unify.weights[group].shape[0]
        move = self.moves[field] if by_field and field in self.moves else FieldMove(weight.shape[0], places)
        return move.inputs(weight.T, places, squares).T

    def _old_width(self, field: str) -> int:
        return self.old.widths[self.old.fields.index(field)]


def count(tensors: Tensors, names: Callable[[str], bool]) -> int:
    """Numbers in the tensors of some names."""
    return sum(t.numel() for n, t in tensors.items() if names(n))
