"""Embedding tables in plain torch: one array per field and precision, looked up without TorchRec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.allocation import physical_width
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.quantised import BITS, CODES, SCALE, SHIFT, unpacked
from embsearch_dist.schema import Field


@dataclass(frozen=True)
class Ids:
    """What a model looks at in some rows; every field of the schema may be there, a model takes its own.

    Attributes:
        single: field -> ``[B]`` int64, of fields with one id a row.
        lists: field -> :class:`Bag` or :class:`Padded`.
        dense: ``[B, n_dense]`` float32.
    """

    single: Mapping[str, torch.Tensor]
    lists: Mapping[str, Bag | Padded]
    dense: torch.Tensor

    @property
    def rows(self) -> int:
        """B; not ``len``, which a traced program would take for a constant."""
        return self.dense.shape[0]

    def take(self, rows: torch.Tensor | slice) -> Ids:
        """Some of the rows, lists as bags."""
        single = {name: ids[rows] for name, ids in self.single.items()}
        return Ids(single, {name: bag.take(rows) for name, bag in self.lists.items()}, self.dense[rows])


@dataclass(frozen=True)
class Bag:
    """Lists as they are stored: ``ids [E]``, ``offsets [B + 1]``, both int64, ``weights [E]`` float32 or None."""

    ids: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        return self.offsets.diff()

    def take(self, rows: torch.Tensor | slice) -> Bag:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self.offsets) - 1)
            offsets = self.offsets[start : max(start, stop) + 1]
            inside = slice(int(offsets[0]), int(offsets[-1]))
            return Bag(self.ids[inside], offsets - offsets[0], None if self.weights is None else self.weights[inside])
        lengths, starts = self.lengths[rows], self.offsets[:-1][rows]
        offsets = functional.pad(lengths.cumsum(0), (1, 0))
        places = torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], lengths)
        return Bag(self.ids[places], offsets, None if self.weights is None else self.weights[places])

    def padded(self) -> Padded:
        """The same as a matrix, at least one column wide."""
        lengths = self.lengths
        inside = torch.arange(max(1, int(lengths.max()) if len(lengths) else 1)) < lengths[:, None]
        ids, weights = torch.zeros(inside.shape, dtype=torch.int64), torch.zeros(inside.shape)
        ids[inside] = self.ids
        weights[inside] = torch.ones(len(self.ids)) if self.weights is None else self.weights
        return Padded(ids, weights)


@dataclass(frozen=True)
class Padded:
    """Lists as matrices ``[B, L]``: ids int64, and float32 weights, which are zero behind a row's last id and one
    where the field has none."""

    ids: torch.Tensor
    weights: torch.Tensor

    def take(self, rows: torch.Tensor | slice) -> Padded:
        return Padded(self.ids[rows], self.weights[rows])


@dataclass(frozen=True)
class TableSpec:
    """A table: field, nominal width, columns that are stored (the width and a first-order weight, if any), its
    precision, one of :data:`embsearch_dist.precision.PRECISIONS`, and the values that have rows, if not all have."""

    field: Field
    width: int
    columns: int
    precision: str
    values: KeptValues | None = None

    @property
    def rows(self) -> int:
        """Of the array."""
        return self.field.cardinality if self.values is None else self.values.rows


class PlainTables(nn.Module):
    """The tables of one model.

    Args:
        specs: kept fields, in schema order.
        padded: fields come in the order and at the physical widths that the sharded tables of a training on one rank
            have, for products over all columns that are to have the same bits.
    """

    def __init__(self, specs: Sequence[TableSpec], padded: bool = False) -> None:
        super().__init__()
        self.specs, self.padded = list(specs), padded
        order = sorted(range(len(specs)), key=lambda k: specs[k].width) if padded else range(len(specs))
        self._order = list(order)
        widths = [physical_width(s.columns) if padded else s.columns for s in self.specs]
        starts, at = [0] * len(specs), 0
        for k in self._order:
            starts[k], at = at, at + widths[k]
        self._starts = tuple(starts)
        self._weights = tuple(s + spec.width for s, spec in zip(starts, self.specs) if spec.columns > spec.width)
        self._fills = [w - s.columns for w, s in zip(widths, self.specs)]
        self._parts: list[dict[str, str]] = [{} for _ in specs]
        for k, spec in enumerate(self.specs):
            if spec.values is not None:
                self.register_buffer(f"row_of{k}", torch.from_numpy(spec.values.row_of), persistent=False)

    def fill(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Take the tables out of ``tensors``, where they are called ``PREFIX + FIELD`` and ``.../codes`` and so on.

        Raises:
            KeyError: one is missing. ValueError: one has another shape or type.
        """
        for k, spec in enumerate(self.specs):
            parts = [CODES, SCALE, SHIFT] if spec.precision in BITS else [""]
            for part in parts:
                tensor = tensors[f"{prefix}{spec.field.name}{'/' if part else ''}{part}"]
                self._check(spec, part, tensor)
                own = f"t{k}{part}"
                self.register_buffer(own, tensor, persistent=False)
                self._parts[k][part] = own

    def _check(self, spec: TableSpec, part: str, tensor: torch.Tensor) -> None:
        rows, columns = spec.rows, spec.columns
        if part == CODES:
            wanted, kind = [rows, columns if spec.precision == "int8" else -(-columns // 2)], torch.uint8
        elif part:
            wanted, kind = [rows], torch.float16
        else:
            wanted, kind = [rows, columns], torch.float32 if spec.precision == "fp32" else torch.float16
        if list(tensor.shape) != wanted or tensor.dtype != kind:
            raise ValueError(
                f"table {spec.field.name!r} is {tensor.dtype} {list(tensor.shape)}, not {kind} {list(wanted)}"
            )

    def rows(self, k: int, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the k-th table: ``ids [...]`` int64 -> ``[..., columns]`` float32."""
        parts = {part: getattr(self, own) for part, own in self._parts[k].items()}
        if "" in parts:
            return functional.embedding(ids, parts[""]).float()
        codes = functional.embedding(ids, parts[CODES])
        values = unpacked(codes, self.specs[k].columns, BITS[self.specs[k].precision])
        scale, shift = (functional.embedding(ids, parts[p][:, None]).float() for p in (SCALE, SHIFT))
        return values * scale + shift

    def forward(self, ids: Ids) -> Pooled:
        """Pooled embeddings of the kept fields."""
        found = [self._pooled(k, ids) for k in range(len(self.specs))]
        parts = [functional.pad(found[k], (0, self._fills[k])) if self._fills[k] else found[k] for k in self._order]
        widths = tuple(s.width for s in self.specs)
        return Pooled(torch.cat(parts, 1) if len(parts) > 1 else parts[0], self._starts, widths, self._weights)

    def _pooled(self, k: int, ids: Ids) -> torch.Tensor:
        field = self.specs[k].field
        if not field.is_list:
            return self.rows(k, self._mapped(k, ids.single[field.name]))
        bag = ids.lists[field.name]
        bag = replace(bag, ids=self._mapped(k, bag.ids))
        if isinstance(bag, Padded):
            total = (self.rows(k, bag.ids) * bag.weights[..., None]).sum(1)
            count = bag.weights.sum(1, keepdim=True)
        else:
            total, count = self._summed(k, bag), bag.lengths[:, None].to(torch.float32)
        return total / count.clamp(min=1) if field.pooling == "mean" else total

    def _mapped(self, k: int, ids: torch.Tensor) -> torch.Tensor:
        """The rows of the k-th table that ids look up, int64."""
        if self.specs[k].values is None:
            return ids
        return self.get_buffer(f"row_of{k}")[ids].long()

    def _summed(self, k: int, bag: Bag) -> torch.Tensor:
        weights = bag.weights if self.specs[k].field.weighted else None
        if self.specs[k].precision == "fp32":
            table = getattr(self, self._parts[k][""])
            return functional.embedding_bag(
                bag.ids, table, bag.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
            )
        rows = self.rows(k, bag.ids)
        rows = rows if weights is None else rows * weights[:, None]
        place = torch.repeat_interleave(torch.arange(len(bag.offsets) - 1), bag.lengths)
        return rows.new_zeros(len(bag.offsets) - 1, rows.shape[1]).index_add_(0, place, rows)


def ids_of(
    single: Mapping[str, np.ndarray],
    lists: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    dense: np.ndarray,
) -> Ids:
    """From arrays: ids of any integer type, lists as ids, offsets and weights."""
    return Ids(
        {name: torch.from_numpy(x.astype(np.int64, copy=False)) for name, x in single.items()},
        {
            name: Bag(
                torch.from_numpy(x.astype(np.int64, copy=False)),
                torch.from_numpy(offsets.astype(np.int64, copy=False)),
                None if weights is None else torch.from_numpy(weights),
            )
            for name, (x, offsets, weights) in lists.items()
        },
        torch.from_numpy(dense),
    )
