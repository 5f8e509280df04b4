"""Tables sharded by TorchRec: one EmbeddingBagCollection under DistributedModelParallel.

The plan comes by hand from :mod:`embsearch_dist.sharding.tables`, or with ``dist.sharding: planner`` from
TorchRec's planner by way of :mod:`embsearch_dist.sharding.planning`. What fails on one rank alone while the
tables are placed is raised on all of them: TorchRec's own constructor would leave the others waiting.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardedTensor

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.errors import UserError
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.ranks.context import Context
from embsearch_dist.ranks.quiet import quieten
from embsearch_dist.sharding.card import fill_together
from embsearch_dist.sharding.placing import check_same_tables, place
from embsearch_dist.sharding.plan import Plan, Topology
from embsearch_dist.sharding.planning import make_plan
from embsearch_dist.sharding.prefetch import InputExchange
from embsearch_dist.sharding.row_map import RowMap
from embsearch_dist.sharding.table_adam import TableAdam
from embsearch_dist.sharding.tables import (
    OPTIMIZERS,
    Table,
    choose_sharding,
    divide_means,
    local_world_size,
    make_collection,
    module_name,
    plan_by_hand,
)

quieten()
INIT_BLOCK_ROWS = 4096


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
    whose key order depends on the plan: read it by name. Each value is the sum (or mean, as the table says)
    of the rows that the sample looks up in that table, zeros if those are none.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        context: Context,
        dist: DistConfig,
        optim: OptimConfig,
        seed: int,
        init_std: float,
        partial: bool = False,
        values: Mapping[str, KeptValues] | None = None,
    ) -> None:
        """``partial``: a step may read some columns of a row alone; Adam then leaves the others as they are.

        ``values``: of tables that have rows for some of their field's values alone.
        """
        super().__init__()
        check_same_tables(tables, context)
        unknown = sorted(set(dist.tables) - {t.name for t in tables})
        self.tables = {t.name: t for t in tables}
        self.means = any(t.mean for t in tables)
        self.context = context
        if unknown and context.rank == 0:
            warnings.warn(f"dist.tables names {unknown[0]!r}, which has no table in this model", stacklevel=2)
        with context.together("looking for memory"):
            check_memory(tables, context, local_world_size(context.world_size))
        collection = make_collection(tables)
        plan = self._plan(collection, tables, dist, optim)
        self.kinds = {t.name: plan[t.module].sharding_type for t in tables}
        self._fields = {t.module: t.name for t in tables}
        self.lr = optim.embedding_lr
        optimizer, options = OPTIMIZERS[optim.embedding]
        options = {"lr": self.lr, **options}
        adam = optim.embedding == "adam"
        by_fbgemm = adam and context.device.type == "cuda" and not partial
        sharded = [p for n, p in collection.named_parameters() if self._kind(n) != "data_parallel"]
        if sharded:
            # It compiles optimizers on import, for a third of a second that only a training should pay.
            from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward

            fused = torch.optim.SGD if adam and not by_fbgemm else optimizer
            # It keeps the mapping and TorchRec adds to it: data-parallel tables need one of their own.
            apply_optimizer_in_backward(fused, sharded, dict(options))
        self.collection = place(collection, plan, context)
        self.row_map = RowMap(values, context.device) if values else None
        self.exchange = InputExchange(self.collection, context, self.row_map)
        self._initialise(seed, init_std)
        own = dict(self._replicated_parameters())
        self.adam = TableAdam(self.collection, own, context, self.lr, partial, by_fbgemm) if adam else None
        self.torch_optimizer = optimizer(own.values(), **options) if own and not adam else None  # type: ignore[arg-type]

    def _plan(
        self, collection: EmbeddingBagCollection, tables: Sequence[Table], dist: DistConfig, optim: OptimConfig
    ) -> EmbeddingModuleShardingPlan:
        world, device = self.context.world_size, self.context.device.type
        local = local_world_size(world)
        if dist.sharding != "planner":
            return plan_by_hand(collection, tables, choose_sharding(tables, world, dist), world, local, device)

        planner = fill_together(dist.planner, self.context)

        def search() -> dict[str, Any]:
            return make_plan(tables, Topology(world, local, device, planner), dist, optim.embedding).to_dict()

        # One rank searches and tells. TorchRec's own way broadcasts too, but keeps an error to that rank.
        body = self.context.share(self.context.first("planning the tables", search))
        assert body is not None
        return Plan.from_dict(body).torchrec()

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        if self.adam is not None and torch.is_grad_enabled():
            self.adam.before(self.row_map(sparse) if self.row_map else sparse)
        pooled = self.exchange.look_up(sparse)
        return divide_means(pooled, sparse, self.tables) if self.means else pooled

    def local_shards(self) -> Iterator[LocalShard]:
        """Every part of a table on this rank, tables in their given order."""
        state = self.collection.state_dict()
        for table in self.tables.values():
            value = state[f"embedding_bags.{table.module}.weight"]
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    row, column = shard.metadata.shard_offsets
                    yield LocalShard(table, row, column, shard.tensor, replicated=False)
            else:
                yield LocalShard(table, 0, 0, value, replicated=True)

    def _replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The data-parallel tables by field: no optimizer runs inside their backward."""
        for name, parameter in self.collection.named_parameters():
            if self._kind(name) == "data_parallel":
                yield self._field(name), parameter

    def _field(self, parameter: str) -> str:
        return self._fields[parameter.removesuffix(".weight").rpartition(".")[2]]

    def _kind(self, parameter: str) -> str:
        return self.kinds[self._field(parameter)]

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
        if self.adam is not None:
            self.adam.clear()

    def step(self) -> None:
        """Count the step, and update the tables whose optimizer does not run inside backward; after backward."""
        if self.torch_optimizer is not None:
            self.torch_optimizer.step()
        if self.adam is not None:
            self.adam.step()

    def set_lr(self, factor: float) -> None:
        """Set the learning rate to ``factor`` times the config's. A fused optimizer takes notice only at its own
        ``step``."""
        fused = self.collection.fused_optimizer
        for group in [*fused.param_groups, *(self.torch_optimizer.param_groups if self.torch_optimizer else [])]:
            group["lr"] = self.lr * factor
        if fused.param_groups:
            fused.step()
        if self.adam is not None:
            self.adam.lr = self.lr * factor

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """State of the optimizers by who keeps it (``adam``, ``fused_optimizer``, ``torch_optimizer``): tensors by
        names that depend neither on rank nor on sharding. Live storage, so that a checkpoint is read in place."""
        weights = self.collection.state_dict()
        if self.adam is not None:
            return {"adam": self.adam.state(weights)}
        fused = {
            f"{parameter}/{key}": value
            for parameter, values in self.collection.fused_optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, ShardedTensor | torch.Tensor)
        }
        own = {
            f"embedding_bags.{module_name(name)}.weight/{key}": value
            for name, parameter in self._replicated_parameters()
            if self.torch_optimizer is not None
            for key, value in self.torch_optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }
        return {"fused_optimizer": fused, "torch_optimizer": own}


def check_memory(tables: Sequence[Table], context: Context, local: int) -> None:
    """Refuse tables whose weights alone are larger than the memory of the machines they would lie on.

    On a GPU with offloading they may lie in main memory, so that counts too.

    Raises:
        UserError: names the largest table.
    """
    there = psutil.virtual_memory().total / local
    if context.device.type == "cuda":
        there += torch.cuda.get_device_properties(context.device).total_memory
    need, room = sum(t.bytes for t in tables), there * context.world_size
    if need > room:
        t = max(tables, key=lambda t: t.bytes)
        raise UserError(
            f"the tables take {need / 2**30:,.1f} GiB, the {context.world_size} rank(s) have {room / 2**30:,.1f} GiB: "
            f"the largest is {t.name!r}, {t.rows:,} rows x {t.width:,}. Lower its width (search.candidates, the "
            "allocation) or use more machines"
        )


def initial_block(seed: int, table: Table, block: int, std: float) -> torch.Tensor:
    """Initial values of rows ``[block * 4096, ...)`` of a table, ``[<= 4096, width]``, on CPU."""
    digest = hashlib.sha256(f"{seed}/{table.name}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    rows = min(INIT_BLOCK_ROWS, table.rows - block * INIT_BLOCK_ROWS)
    return torch.empty(rows, table.width).normal_(0.0, std, generator=generator)
