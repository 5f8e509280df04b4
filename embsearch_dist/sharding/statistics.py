"""Sums over sharded tables, reduced across ranks and never gathered."""

from __future__ import annotations

import torch

from embsearch_dist.sharding.sharded_tables import ShardedTables

BLOCK_ROWS = 8192  # a block of 64 columns stays in the second-level cache
# A block is about ten launches, however small it is. This one takes some 0.2 GB beside the table.
CUDA_BLOCK_VALUES = 1 << 23


@torch.no_grad()
def column_sums(tables: ShardedTables) -> tuple[torch.Tensor, torch.Tensor]:
    """Per table and column: sum, sum of squares and sum of magnitudes over all rows of all ranks.

    Returns:
        sums ``[n_tables, widest, 3]`` float64 (columns past a table's width are 0) and row counts
        ``[n_tables]`` float64, both equal on every rank.
    """
    order = {name: i for i, name in enumerate(tables.tables)}
    widest = max(t.width for t in tables.tables.values())
    device = tables.context.device
    sums = torch.zeros(len(order), widest, 3, dtype=torch.float64, device=device)
    for shard in tables.local_shards():
        if shard.replicated and tables.context.rank != 0:
            continue
        columns = slice(shard.column_offset, shard.column_offset + shard.tensor.shape[1])
        target = sums[order[shard.table.name], columns]
        for block in shard.tensor.split(block_rows(shard.tensor.shape[1], device)):
            wide = block.double()
            target[:, 0] += wide.sum(0)
            target[:, 1] += wide.square().sum(0)
            target[:, 2] += wide.abs().sum(0)
    tables.context.sum(sums)
    rows = torch.tensor([t.rows for t in tables.tables.values()], dtype=torch.float64, device=device)
    return sums, rows


def block_rows(width: int, device: torch.device) -> int:
    """Rows of a block of a table ``width`` columns wide."""
    return BLOCK_ROWS if device.type != "cuda" else max(BLOCK_ROWS, CUDA_BLOCK_VALUES // max(1, width))
