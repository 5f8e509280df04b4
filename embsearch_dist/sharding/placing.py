"""Put tables on the ranks so that a failure on one rank is a failure on all, within seconds.

TorchRec builds a rank's part and calls collectives in one constructor. A rank that fails on its part (its
memory is full, FBGEMM refuses a shape) leaves, and the others wait in a collective until it times out. So
the ranks agree twice: when each has built its part, before the first collective, and at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm import intra_and_cross_node_pg
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingEnv, ShardingPlan

from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding.tables import Sharder, Table, check_widths
from embsearch_dist.sharding.uneven import allow_uneven_batches
from embsearch_dist.sharding.versions import init_collective_validation

DOING = "placing the tables"
# Of the groups of ranks within and across machines: a warning per group, about nothing that is wrong.
logging.getLogger("torchrec.distributed.comm").setLevel(logging.ERROR)


class AgreeingCollection(ShardedEmbeddingBagCollection):
    """Calls ``agree`` once this rank's part of every table exists.

    The constructor makes look-ups and then output distributions; what is left then only puts together what is
    there, until it calls the collectives of data-parallel tables.
    """

    def __init__(self, agree: Callable[[], None], **arguments: Any) -> None:
        object.__setattr__(self, "agree", agree)  # before torch's Module is ready for attributes
        super().__init__(**arguments)

    def _create_output_dist(self) -> None:
        super()._create_output_dist()
        self.agree()


class AgreeingSharder(Sharder):
    """Makes :class:`AgreeingCollection` where TorchRec's sharder makes its base class."""

    def __init__(self, agree: Callable[[], None]) -> None:
        super().__init__()
        self.agree = agree

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        return AgreeingCollection(
            self.agree,
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )


def place(
    collection: EmbeddingBagCollection, plan: EmbeddingModuleShardingPlan, context: Context
) -> DistributedModelParallel:
    """Shard ``collection`` as ``plan`` says; all ranks return, or all raise."""
    # Both are collectives that TorchRec would otherwise call on first need, in the midst of the constructor.
    init_collective_validation(context.group)
    allow_uneven_batches()
    if any(p.sharding_type in ("table_row_wise", "grid_shard") for p in plan.values()):
        intra_and_cross_node_pg(context.device, backend=dist.get_backend(context.group))
    state = "building"

    def agree() -> None:
        nonlocal state
        state = "refused"  # unless the next line returns
        with context.together(DOING):
            pass
        state = "agreed"

    try:
        model = DistributedModelParallel(
            collection,
            device=context.device,
            plan=ShardingPlan({"": plan}),
            sharders=[AgreeingSharder(agree)],  # type: ignore[list-item]
        )
    except Exception:
        if state == "refused":
            raise  # all ranks are here, each with the error already
        with context.together(DOING):
            raise
    with context.together(DOING):
        if state != "agreed":
            raise RuntimeError("TorchRec placed the tables without asking whether all ranks have built their parts")
    return model


def check_same_tables(tables: Sequence[Table], context: Context) -> None:
    """Raise on every rank unless all ranks were given the same tables, of widths that FBGEMM can hold.

    Each rank reads schema and allocation for itself. Ranks that read different files would exchange parts
    of other shapes than expected, and hang or crash in a collective.
    """
    with context.together("checking the tables"):
        check_widths(tables)
    first = context.share([[t.name, t.rows, t.width] for t in tables])
    with context.together("checking the tables"):
        mine = [[t.name, t.rows, t.width] for t in tables]
        if mine != first:
            here, there = next(
                ((a, b) for a, b in zip(mine, first, strict=False) if a != b),
                (f"{len(mine)} tables", f"{len(first)} tables"),
            )
            raise UserError(
                f"rank {context.rank} has {_told(here)}, rank 0 has {_told(there)}: every rank must read the same "
                "prepared data, allocation and config"
            )


def _told(table: list[Any] | str) -> str:
    return table if isinstance(table, str) else f"table {table[0]!r} of {table[1]:,} rows x {table[2]}"
