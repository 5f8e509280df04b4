"""The dense part of an earlier model in a new one: copied, or its inputs moved field by field.

A weight of the same name and shape is copied. Where fields or widths have changed, weights that read embeddings are
moved field by field: the first layer and the linear part of FM, DeepFM, Wide & Deep and the MLP, and the linear maps
and the BatchNorm in front. Other backbones are known by the shapes of their weights alone: where those cannot tell one
field from another, the whole backbone begins anew. What has no counterpart stays as the new model made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.unify import MixedUnify
from embsearch_dist.train.warm.widths import FieldMove

INPUTS = ("backbone.first.weight", "backbone.linear.weight")
NORM = "unify.norm."
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
        scales: mean and deviation by which each dense column was standardised, as far as they are known.
    """

    fields: tuple[str, ...]
    widths: tuple[int, ...]
    places: tuple[int, ...]
    dense: tuple[str, ...]
    maps: bool
    scales: tuple[tuple[float, float] | None, ...] = ()

    @classmethod
    def of(
        cls,
        model: Mapping[str, Any],
        fields: Sequence[str],
        widths: Sequence[int],
        dense: Sequence[str],
        scales: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Layout:
        """Args:
        model: ``transform``, ``unify`` and ``unified_width`` of the model section.
        scales: ``mean`` and ``std`` of dense columns, as a preparation notes them.
        """
        alike = len(set(widths)) == 1 and model["unify"] == "mixed"
        maps = model["transform"] != "identity" and not alike
        places = [int(model["unified_width"])] * len(fields) if maps else widths
        known = scales or {}
        own = tuple((float(known[n]["mean"]), float(known[n]["std"])) if n in known else None for n in dense)
        return cls(tuple(fields), tuple(widths), tuple(places), tuple(dense), maps, own)

    def slices(self) -> dict[str, slice]:
        """Inputs of each field."""
        ends = list(accumulate(self.places, initial=0))
        return {f: slice(a, b) for f, a, b in zip(self.fields, ends, ends[1:], strict=False)}

    def told_by_shapes(self, other: Layout) -> bool:
        """Whether weights of a backbone that read fields or dense columns by their places have other shapes behind the
        other layout, or read the same columns at the same places."""
        if (self.fields, self.dense) == (other.fields, other.dense):
            return True
        if self.fields != other.fields and len(self.fields) == len(other.fields):
            return False
        if self.dense != other.dense and len(self.dense) == len(other.dense):
            return False
        mine, theirs = (
            (len(x.fields) + len(x.dense), len(x.fields) * max(x.places) + len(x.dense)) for x in (self, other)
        )
        return mine[0] != theirs[0] and mine[1] != theirs[1]

    def scale(self, dense: str) -> tuple[float, float] | None:
        """Of a dense column."""
        return self.scales[self.dense.index(dense)] if self.scales else None

    def groups(self) -> list[int]:
        """The widths that occur, ascending: what belongs to a width is numbered so."""
        return sorted(set(self.widths))

    def width_of(self, field: str) -> int:
        """Of a field's table."""
        return self.widths[self.fields.index(field)]


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
        self.rescaled = [n for n in new.dense if n in old.dense and _differ(old.scale(n), new.scale(n))]
        alike = replace(old, scales=()) == replace(new, scales=())
        self.same = alike and not turned and not self.rescaled
        self.additive = type(head.backbone) is Backbone
        self.values = self.additive and head.backbone.values
        self.places = self.additive or new.told_by_shapes(old)
        self.unify = head.unify if isinstance(head.unify, MixedUnify) else None

    def __call__(
        self, earlier: Tensors, target: Tensors, squares: bool = False, weights: bool = True
    ) -> dict[str, torch.Tensor]:
        """Values for as many names of ``target`` as have a counterpart, on the CPU.

        ``squares``: the tensors are means of squared gradients, kept by an optimizer for the weights of these names;
        ``weights``: they are the weights themselves.
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
            elif before.shape == value.shape and (self.places or not name.startswith("backbone.")):
                found[name] = before
        if not self.same and self.unify is not None and self.old.maps:
            found |= self._maps(earlier, target, squares)
        if not self.same:
            found |= self._norm(earlier, target)
        for name in INPUTS if weights and self.additive and not self.same else ():
            if name in found:
                self._rescale(found, name, earlier[name])
        return found

    def _rescale(self, found: dict[str, torch.Tensor], name: str, before: torch.Tensor) -> None:
        """Weights and bias for dense columns that were standardised otherwise: what a raw number gives stays."""
        by_value = name == INPUTS[1] and self.values
        first_old, first_new = (0, 0) if by_value else (sum(self.old.places), sum(self.new.places))
        bias = name.removesuffix("weight") + "bias"
        for dense in self.rescaled:
            old, new = self.old.scale(dense), self.new.scale(dense)
            assert old is not None and new is not None
            own = before[:, first_old + self.old.dense.index(dense)]
            found[name][:, first_new + self.new.dense.index(dense)] = own * (new[1] / old[1])
            if bias in found:
                found[bias] = found[bias] + own * ((new[0] - old[0]) / old[1])

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
        old_groups, sources = self.old.groups(), self._sources(by_field)

        def old_map(field: str) -> int:
            return self.old.fields.index(field) if by_field else old_groups.index(self.old.width_of(field))

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

    def _sources(self, by_field: bool) -> list[list[str]]:
        """For each new field, or for each new width, the fields whose earlier weights it begins with: those of the same
        width, else those that have the width now."""
        if by_field:
            return [[f] if f in self.moves else [] for f in self.new.fields]
        found = []
        for width in self.new.groups():
            same = [f for f in self.old.fields if self.old.width_of(f) == width]
            own = [f for f in self.new.fields if self.new.width_of(f) == width and f in self.moves]
            found.append(same[:1] or own)
        return found

    def _norm(self, earlier: Tensors, target: Tensors) -> dict[str, torch.Tensor]:
        """The BatchNorm: scale and shift of each width ``[widths, d]``, and statistics ``[fields or 1, widths, d]``.

        Without maps the norm of a field ends with its columns: behind them an earlier variance is that of zeros.
        """
        sources, old_groups, new_groups = self._sources(False), self.old.groups(), self.new.groups()
        maps = self.old.maps and self.new.maps
        found: dict[str, torch.Tensor] = {}
        for name in (f"{NORM}{part}" for part in ("scale", "shift", "mean", "variance")):
            if name not in target or name not in earlier:
                continue
            before, values = earlier[name], target[name].detach().cpu().clone()
            most = min(before.shape[-1], values.shape[-1])

            def rows(field: str, before: torch.Tensor = before) -> torch.Tensor:
                own = before if before.dim() == 2 else before[self.old.fields.index(field) if len(before) > 1 else 0]
                return own[old_groups.index(self.old.width_of(field))]

            places: list[tuple[tuple[int, ...], list[str]]]
            if values.dim() == 3 and len(values) > 1:  # statistics of each field
                places = [((k, new_groups.index(self.new.width_of(f))), [f]) for k, f in enumerate(self.new.fields)]
                places = [(place, fields) for place, fields in places if fields[0] in self.moves]
            else:
                places = [((0, j) if values.dim() == 3 else (j,), fields) for j, fields in enumerate(sources) if fields]
            for place, fields in places:
                count = min([most] if maps else [most, *(self.old.width_of(f) for f in fields)])
                values[place][:count] = torch.stack([rows(f)[:count] for f in fields]).mean(0)
            found[name] = values
        return found


def _differ(old: tuple[float, float] | None, new: tuple[float, float] | None) -> bool:
    """Whether a column is known to be standardised otherwise; one that was constant has weights that say nothing."""
    return old is not None and new is not None and old != new and old[1] > 0


def count(tensors: Tensors, names: Callable[[str], bool]) -> int:
    """Numbers in the tensors of some names."""
    return sum(t.numel() for n, t in tensors.items() if names(n))
