"""Embedding tables of a supernet (MaxTables) and of a found model (MixedTables), both sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from embsearch_dist.allocation import Allocation, physical_width
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.config.widths import check_candidates
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import ShardedTables, Table


class MaxTables(nn.Module):
    """One table per field that holds every candidate width (AdaS&S section 3.1, Fig. 3).

    * ``shared``: the max-table; candidate j is its leading ``d_j`` columns.
    * ``independent``: candidate j owns its own ``d_j`` columns. The candidates' tables lie side by side
      in one physical table, so that one look-up serves all of them; no column is shared.

    A candidate of width 0 has no columns: choosing it drops the field.

    With ``extra`` the column behind the last candidate's holds a first-order weight of each value, and every candidate
    that has columns reads it.
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
        extra: int = 0,
    ) -> None:
        super().__init__()
        self.names = schema.names
        self.candidates = check_candidates(candidates)
        self.scheme = scheme
        starts = [0] * len(candidates) if scheme == "shared" else [sum(candidates[:j]) for j in range(len(candidates))]
        self.columns = [(s, s + d) for s, d in zip(starts, candidates, strict=True)]
        last = self.columns[-1][1]
        self.width = physical_width(last + extra)
        self.weights = [last] * (len(self.names) if extra else 0)
        mask = torch.zeros(len(candidates), self.width)
        for j, (start, stop) in enumerate(self.columns):
            mask[j, start:stop] = 1
        self.register_buffer("mask", mask.to(context.device), persistent=False)
        self.mask: torch.Tensor
        read = mask.clone()
        read[:, last : last + extra] = (mask.sum(1, keepdim=True) > 0).float()
        # [T, width]: as ``mask``, with the first-order weight.
        self.register_buffer("read", read.to(context.device), persistent=False)
        self.read: torch.Tensor
        tables = [Table.of(f, self.width) for f in schema.fields]
        self.sharded = ShardedTables(tables, context, dist, optim, seed, init_std, partial=True)

    def forward(self, sparse: KeyedJaggedTensor) -> Pooled:
        """Pooled max-table rows, all columns of all fields, nothing masked yet."""
        return Pooled.of(self.sharded(sparse), self.names, [self.width] * len(self.names), self.weights)


class MixedTables(nn.Module):
    """One table per kept field, each at its own width, as an allocation says.

    ``extra``: columns behind the width; 1 for a first-order weight of each value.
    ``partial``: what stands behind them may close columns or fields in a step, which are then to stay as they are.
    """

    def __init__(
        self,
        allocation: Allocation,
        context: Context,
        dist: DistConfig,
        optim: OptimConfig,
        seed: int,
        init_std: float,
        partial: bool = False,
        extra: int = 0,
    ) -> None:
        super().__init__()
        allocation = allocation.counted(extra)
        self.names = list(allocation.kept)
        self.widths = [allocation.widths[n] for n in self.names]
        self.weights = self.widths if extra else []
        fields = {f.name: f for f in allocation.schema.fields}
        by_width = sorted(zip(self.widths, self.names, strict=True), key=lambda pair: pair[0])
        tables = [Table.of(fields[n], allocation.columns(n), allocation.rows(n)) for _, n in by_width]
        values = {n: kept for n, kept in allocation.values.items() if n in self.names}
        self.sharded = ShardedTables(tables, context, dist, optim, seed, init_std, partial, values)

    def forward(self, sparse: KeyedJaggedTensor) -> Pooled:
        """Pooled embeddings of the kept fields at their nominal widths."""
        return Pooled.of(self.sharded(sparse), self.names, self.widths, self.weights)
