"""Rows that are kept or dropped by their size: a learned threshold per field (OptEmbed, first half)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embsearch_dist.models.model import SubnetModel
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import ShardedTables


def slope(x: torch.Tensor) -> torch.Tensor:
    """The surrogate gradient of the unit step: ``2 - 4|x|`` up to 0.4, 0.4 up to 1, 0 beyond."""
    size = x.abs()
    return torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, torch.full_like(x, 0.4), torch.zeros_like(x)))


class _Step(torch.autograd.Function):
    """1 where ``x > 0``, else 0, with :func:`slope` for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * slope(x)


class RowThreshold(nn.Module):
    """``x [B, F, d]`` times ``step(||x||_1 - t)``, with one t for each field."""

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(fields))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        opened: torch.Tensor = _Step.apply(x.abs().sum(-1) - self.t)  # type: ignore[no-untyped-call]
        return x * opened[..., None]

    def push(self) -> torch.Tensor:
        """``sum exp(-t)``, which falls as thresholds rise."""
        return (-self.t).exp().sum()


@torch.no_grad()
def sizes_of_rows(sharded: ShardedTables, width: int) -> dict[str, torch.Tensor]:
    """``||e||_1`` of every row ``[cardinality]`` of every table over its first ``width`` columns, on CPU, the same on
    all ranks; all call it."""
    context = sharded.context
    found = {n: torch.zeros(t.rows) for n, t in sharded.tables.items()}
    for shard in sharded.local_shards():
        if not shard.replicated or context.rank == 0:
            own = shard.tensor.detach()[:, : max(0, width - shard.column_offset)]
            rows = slice(shard.row_offset, shard.row_offset + len(own))
            found[shard.table.name][rows] += own.float().abs().sum(1).cpu()
    return {n: context.sum(x.to(context.device)).cpu() for n, x in found.items()}


def kept_rows(model: SubnetModel, schema: Schema, thresholds: RowThreshold, width: int) -> list[torch.Tensor]:
    """Of each field ``[cardinality]`` bool: the rows above its threshold."""
    sizes = sizes_of_rows(model.sharded, width)
    return [sizes[n] > float(t) for n, t in zip(schema.names, thresholds.t.detach(), strict=True)]
