"""Embedding tables of a supernet (MaxTables) and of a found model (MixedTables), both sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import KeyedJaggedTensor, KeyedTensor

from embsearch_dist.allocation import Allocation, physical_width
from embsearch_dist.config import DistConfig, OptimConfig
from embsearch_dist.dist.context import Context
from embsearch_dist.dist.sharding import ShardedTables, Table
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema

SCHEMES = ("shared", "independent")


def stack_fields(pooled: KeyedTensor, names: Sequence[str], width: int) -> torch.Tensor:
    """Gather fields of one physical width from a KeyedTensor by name: ``[len(names), B, width]``.

    The key order of a KeyedTensor depends on the sharding plan. One view serves when the plan kept
    the order; otherwise the columns are picked by name.
    """
    values = pooled.values()
    if pooled.keys() == list(names):
        return values.view(values.shape[0], len(names), width).transpose(0, 1)
    parts = pooled.to_dict()
    return torch.stack([parts[n] for n in names])


class MaxTables(nn.Module):
    """One table per field that holds every candidate width (AdaS&S section 3.1, Fig. 3).

    * ``shared``: the max-table; candidate j is its leading ``d_j`` columns.
    * ``independent``: candidate j owns its own ``d_j`` columns. The candidates' tables lie side by side
      in one physical table, so that one look-up serves all of them; no column is shared.

    A candidate of width 0 has no columns: choosing it drops the field.
    """

    def __init__(
        self,
        schema: Schema,
        candidates: Sequence[int],
        scheme: str,
        context: Context,
        dist: DistConfig,
        optim: OptimConfig,
        seed: int,
        init_std: float,
    ) -> None:
        super().__init__()
        self.names = schema.names
        self.candidates = check_candidates(candidates)
        self.scheme = scheme
        starts = [0] * len(candidates) if scheme == "shared" else [sum(candidates[:j]) for j in range(len(candidates))]
        self.columns = [(s, s + d) for s, d in zip(starts, candidates, strict=True)]
        self.width = physical_width(self.columns[-1][1])
        mask = torch.zeros(len(candidates), self.width)
        for j, (start, stop) in enumerate(self.columns):
            mask[j, start:stop] = 1
        self.register_buffer("mask", mask.to(context.device), persistent=False)
        self.mask: torch.Tensor
        tables = [Table(f.name, f.cardinality, self.width) for f in schema.fields]
        self.sharded = ShardedTables(tables, context, dist, optim, seed, init_std)

    def forward(self, sparse: KeyedJaggedTensor) -> torch.Tensor:
        """Pooled max-table rows ``[F, B, width]``, fields in schema order, nothing masked yet."""
        return stack_fields(self.sharded(sparse), self.names, self.width)


class MixedTables(nn.Module):
    """One table per kept field, each at its own width, as an allocation says.

    ``groups`` lists (nominal width, field names) in ascending width.
    """

    def __init__(
        self,
        allocation: Allocation,
        context: Context,
        dist: DistConfig,
        optim: OptimConfig,
        seed: int,
        init_std: float,
    ) -> None:
        super().__init__()
        kept = {n: allocation.widths[n] for n in allocation.kept}
        self.groups = [(w, [n for n in kept if kept[n] == w]) for w in sorted(set(kept.values()))]
        rows = {f.name: f.cardinality for f in allocation.schema.fields}
        tables = [Table(n, rows[n], physical_width(w)) for w, names in self.groups for n in names]
        self.sharded = ShardedTables(tables, context, dist, optim, seed, init_std)

    def forward(self, sparse: KeyedJaggedTensor) -> list[torch.Tensor]:
        """Per group ``[fields of the group, B, nominal width]``."""
        pooled = self.sharded(sparse)
        if len(self.groups) == 1:
            width, names = self.groups[0]
            return [stack_fields(pooled, names, physical_width(width))[..., :width]]
        parts = pooled.to_dict()
        return [torch.stack([parts[n] for n in names])[..., :width] for width, names in self.groups]


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
