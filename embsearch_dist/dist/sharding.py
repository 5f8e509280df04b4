"""Tables sharded by TorchRec: one EmbeddingBagCollection under DistributedModelParallel.

The plan is built by hand, because TorchRec's planner refuses row-wise sharding and dense kernels on
CPU although both run there. Every rank computes the same plan from the same numbers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.optim.optimizer import Optimizer
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardedTensor, ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from embsearch_dist.config import DistConfig, OptimConfig
from embsearch_dist.dist.context import Context
from embsearch_dist.dist.quiet import quieten
from embsearch_dist.errors import UserError

quieten()
INIT_BLOCK_ROWS = 4096
ROWS_PER_RANK = 1024  # a table with fewer rows than this a rank gains nothing from being split by rows
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "sgd": (torch.optim.SGD, {}),
}


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder without its CPU restriction: row-wise tables train on gloo too."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return types + [t for t in ("row_wise", "table_row_wise", "grid_shard") if t not in types]


@dataclass(frozen=True)
class Table:
    """One table: ``rows`` x ``width`` (physical, a multiple of 4), looked up by the feature ``name``."""

    name: str
    rows: int
    width: int


@dataclass(frozen=True)
class LocalShard:
    """The part of a table that lives on this rank; ``tensor`` is the live storage."""

    table: Table
    row_offset: int
    column_offset: int
    tensor: torch.Tensor
    replicated: bool


class ShardedTables(nn.Module):
    """An EmbeddingBagCollection over the ranks, its initial values and its optimizer.

    Initial values depend on seed, table and row alone, so that every world size and every sharding
    starts equal. ``forward`` maps a KeyedJaggedTensor with batch size B to a KeyedTensor ``[B, sum of widths]``
    whose key order depends on the plan: read it by name.
    """

    def __init__(
        self, tables: Sequence[Table], context: Context, dist: DistConfig, optim: OptimConfig, seed: int, init_std: float
    ) -> None:
        super().__init__()
        for t in tables:
            if t.width % 4 or t.width <= 0:
                raise UserError(f"table {t.name!r}: physical width {t.width} is not a positive multiple of 4")
        unknown = sorted(set(dist.tables) - {t.name for t in tables})
        self.tables = {t.name: t for t in tables}
        self.context = context
        self.fused = not (optim.embedding == "adam" and context.device.type == "cpu")
        self.kinds = choose_sharding(tables, context.world_size, dist)
        if unknown and context.rank == 0:
            warnings.warn(f"dist.tables names {unknown[0]!r}, which has no table in this model", stacklevel=2)
        collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=t.name,
                    embedding_dim=t.width,
                    num_embeddings=t.rows,
                    feature_names=[t.name],
                    pooling=PoolingType.SUM,
                )
                for t in tables
            ],
            device=torch.device("meta"),
        )
        optimizer, options = OPTIMIZERS[optim.embedding]
        options = {"lr": optim.embedding_lr, **options}
        if self.fused:
            sharded = [p for n, p in collection.named_parameters() if self.kinds[n.split(".")[1]] != "data_parallel"]
            if sharded:
                apply_optimizer_in_backward(optimizer, sharded, options)
        self.collection = self._shard(collection, tables, context)
        self._initialise(seed, init_std)
        own = list(self._torch_parameters())
        if optim.embedding == "adam":
            options["fused"] = True  # torch's own: one pass over weights and state, 4 times faster on CPU
        self.torch_optimizer = optimizer(own, **options) if own else None  # type: ignore[arg-type]

    def _shard(
        self, collection: EmbeddingBagCollection, tables: Sequence[Table], context: Context
    ) -> DistributedModelParallel:
        sharder = Sharder()
        kernel = "fused" if self.fused else "dense"
        plan = construct_module_sharding_plan(
            collection,
            _generators(tables, self.kinds, context.world_size, kernel),
            sharder=sharder,  # type: ignore[arg-type]
            local_size=context.world_size,
            world_size=context.world_size,
            device_type=context.device.type,
        )
        return DistributedModelParallel(
            collection,
            device=context.device,
            plan=ShardingPlan({"": plan}),
            sharders=[sharder],  # type: ignore[list-item]
        )

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        return self.collection(sparse)

    def local_shards(self) -> Iterator[LocalShard]:
        """Every part of a table on this rank, tables in their given order."""
        state = self.collection.state_dict()
        for table in self.tables.values():
            value = state[f"embedding_bags.{table.name}.weight"]
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    row, column = shard.metadata.shard_offsets
                    yield LocalShard(table, row, column, shard.tensor, replicated=False)
            else:
                yield LocalShard(table, 0, 0, value, replicated=True)

    def _torch_parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.collection.named_parameters():
            table = name.split(".weight")[0].split(".")[-1]
            if not self.fused or self.kinds[table] == "data_parallel":
                yield parameter

    @torch.no_grad()
    def _initialise(self, seed: int, std: float) -> None:
        for shard in self.local_shards():
            rows, columns = shard.tensor.shape
            first = shard.row_offset // INIT_BLOCK_ROWS
            last = (shard.row_offset + rows - 1) // INIT_BLOCK_ROWS if rows else first - 1
            for block in range(first, last + 1):
                values = initial_block(seed, shard.table, block, std)
                start = max(block * INIT_BLOCK_ROWS, shard.row_offset)
                stop = min(block * INIT_BLOCK_ROWS + len(values), shard.row_offset + rows)
                part = values[start - block * INIT_BLOCK_ROWS : stop - block * INIT_BLOCK_ROWS]
                target = shard.tensor[start - shard.row_offset : stop - shard.row_offset]
                target.copy_(part[:, shard.column_offset : shard.column_offset + columns])

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.torch_optimizer is not None:
            self.torch_optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Update the tables whose optimizer does not run inside backward."""
        if self.torch_optimizer is not None:
            self.torch_optimizer.step()

    def scale_lr(self, factor: float) -> None:
        """Multiply the learning rate. A fused optimizer takes notice only at its own ``step``."""
        fused = self.collection.fused_optimizer
        for group in [*fused.param_groups, *(self.torch_optimizer.param_groups if self.torch_optimizer else [])]:
            group["lr"] *= factor
        if fused.param_groups:
            fused.step()


def initial_block(seed: int, table: Table, block: int, std: float) -> torch.Tensor:
    """Initial values of rows ``[block * 4096, ...)`` of a table, ``[<= 4096, width]``, on CPU."""
    digest = hashlib.sha256(f"{seed}/{table.name}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    rows = min(INIT_BLOCK_ROWS, table.rows - block * INIT_BLOCK_ROWS)
    return torch.empty(rows, table.width).normal_(0.0, std, generator=generator)


def choose_sharding(tables: Sequence[Table], world_size: int, config: DistConfig) -> dict[str, str]:
    """Sharding kind of each table. ``auto`` splits by rows what would fill more than one rank's fair share."""
    kinds = {}
    fair = sum(t.rows * t.width for t in tables) / world_size
    for t in tables:
        kind = config.tables.get(t.name, config.sharding)
        if kind == "auto":
            kind = "row_wise" if t.rows * t.width > fair else "table_wise"
        if kind == "row_wise" and (world_size == 1 or t.rows < ROWS_PER_RANK * world_size):
            kind = "table_wise"
        if kind == "column_wise" and (world_size == 1 or t.width // 4 < world_size):
            kind = "table_wise"
        if kind == "data_parallel" and world_size == 1:
            kind = "table_wise"
        kinds[t.name] = kind
    return kinds


def _generators(
    tables: Sequence[Table], kinds: dict[str, str], world_size: int, kernel: str
) -> dict[str, ParameterShardingGenerator]:
    """Placement: whole tables go to the rank with the fewest bytes so far, largest first."""
    load = [0] * world_size
    per_table: dict[str, ParameterShardingGenerator] = {}
    for t in sorted(tables, key=lambda t: (-t.rows * t.width, t.name)):
        kind = kinds[t.name]
        if kind == "table_wise":
            rank = load.index(min(load))
            load[rank] += t.rows * t.width
            per_table[t.name] = table_wise(rank=rank, compute_kernel=kernel)
        elif kind == "row_wise":
            per_table[t.name] = row_wise(compute_kernel=kernel)
        elif kind == "column_wise":
            per_table[t.name] = column_wise(ranks=list(range(world_size)), compute_kernel=kernel)
        else:
            per_table[t.name] = data_parallel()
    return per_table
