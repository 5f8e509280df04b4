"""A model that was made, not trained, so that a search in it has a right answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.making import BatchMaker
from embsearch_dist.models.model import SubnetModel
from tests.factories import one_rank, set_tables, small_config, small_schema, whole_tables

# Three pairs of fields, (rank, first column of that pair), and two idle fields.
PAIRS = [(1, 0), (2, 1), (4, 3)]
PLANTED = [1, 1, 2, 2, 4, 4, 0, 0]
SCHEMA = small_schema(*[30] * 8, dense=0)


def planted_model(
    rotated: bool = True, pairs: Sequence[tuple[int, int]] = ((0, 1), (2, 3), (4, 5))
) -> tuple[SubnetModel, list[Batch]]:
    """A factorisation machine of width 8 in which each pair of fields meets in columns of its own, and rows with labels
    that it makes.

    Args:
        rotated: all tables are turned by one rotation, which changes no inner product.
        pairs: the fields of each pair, in the order of :data:`PAIRS`.
    """
    config = small_config("no-data", "no-run", "model.backbone=fm", "model.unify=mixed", method="ues")
    model = SubnetModel(config, Allocation.uniform(SCHEMA, 8), one_rank())
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    values = {name: torch.zeros_like(table) for name, table in whole_tables(model.sharded).items()}
    for (rank, column), fields in zip(PAIRS, pairs, strict=True):
        for f in fields:
            values[f"f{f}"][:, column : column + rank] = torch.randn(30, rank, generator=generator)
    set_tables(model.sharded, {name: table @ rotation if rotated else table for name, table in values.items()})
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    batches = []
    for _ in range(4):
        ids = torch.randint(30, (8, 2000), generator=generator).int()
        batch = Batch(torch.zeros(2000, 0), BatchMaker(SCHEMA).sparse(ids), torch.zeros(2000), Position(0, 1))
        with torch.no_grad():
            label = (torch.rand(2000, generator=generator) < model.eval()(batch)[0].sigmoid()).float()
        batches.append(Batch(batch.dense, batch.sparse, label, batch.position))
    return model, batches
