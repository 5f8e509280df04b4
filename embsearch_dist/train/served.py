"""Figures of a trained model whose tables are rounded as they will be served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from embsearch_dist.allocation import REFERENCE_WIDTH, Allocation
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.precision import served
from embsearch_dist.quantised import rounded
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.metrics import area_of, evaluate
from embsearch_dist.train.retrain import SubnetTask

ROWS = 1 << 16  # that are rounded at a time


def evaluate_served(
    task: SubnetTask, allocation: Allocation, precision: str, stream: BatchStream, split: str, context: Context
) -> dict[str, object]:
    """What ``evaluation.json`` tells under ``served``: precision, bytes of the tables at it and of those of UES-32, AUC
    and logloss of a split with tables that are rounded to it. The training's own values are there again afterwards.

    Raises:
        UserError: see :func:`rounded_tables`.
    """
    task.model.eval()
    with rounded_tables(task, allocation, precision, context):
        metrics = evaluate(task.predict, stream.epoch(0), context)
    figures = {**area_of(metrics, split), "logloss": metrics["logloss"]}
    reference = Allocation.uniform(allocation.schema, REFERENCE_WIDTH).counted(allocation.extra)
    sizes = {"bytes": allocation.total(served(precision)), "ues32_bytes": reference.total(served(precision))}
    return {"precision": precision, **sizes, **figures}


@contextmanager
def rounded_tables(task: SubnetTask, allocation: Allocation, precision: str, context: Context) -> Iterator[None]:
    """Inside, tables hold the values that an export at ``precision`` computes with; on all ranks.

    ``precision``: ``mixed`` for that of each field, as the allocation says.

    Raises:
        UserError: a table is split by columns (scale and shift are those of whole rows), or has values that the
            precision cannot hold.
    """
    tables = task.model.tables
    extra = 1 if tables.weights else 0
    columns = {n: w + extra for n, w in zip(tables.names, tables.widths, strict=True)}
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad(), context.together(f"rounding the tables to {precision}"):
            for shard in task.model.sharded.local_shards():
                name = shard.table.name
                if shard.tensor.shape[1] != shard.table.width:
                    raise UserError(
                        f"table {name!r} is split by columns over the ranks, and {precision} rounds whole rows. "
                        "Evaluate on one rank, or with --dist.sharding row_wise"
                    )
                live = shard.tensor[:, : columns[name]]
                before.append((live, live.detach().cpu().clone()))
                for start in range(0, len(live), ROWS):
                    part = live[start : start + ROWS]
                    part.copy_(rounded(part.float(), allocation.precision_of(name, precision), name))
        yield
    finally:
        with torch.no_grad():
            for live, values in before:
                live.copy_(values)
