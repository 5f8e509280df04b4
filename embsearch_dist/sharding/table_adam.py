"""Adam for the tables that TorchRec has placed: the same rule on every device and for every kind of sharding.

Tables of a fused kernel are updated inside backward, by FBGEMM's own Adam where it has one that fits (a GPU, and every
row moves as a whole), else by :mod:`embsearch_dist.kernels.adam` in its place. Data-parallel tables have a dense
gradient, equal on all ranks, and are updated in :meth:`TableAdam.step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag

from embsearch_dist.errors import UserError
from embsearch_dist.kernels.adam import Bags, Layout, moved, numbers, update
from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding.tables import module_name

ROWS = 65536  # of a data-parallel table at a time: what the formula needs between weights and weights stays small
MOMENTS = ("exp_avg", "exp_avg_sq")


class TableAdam:
    """Adam of all tables, and the count of its steps.

    Attributes:
        steps: ``[]`` int64 on CPU, the steps done; skipped batches and evaluations do not count.
        lr: learning rate of the next step.

    Args:
        collection: the placed tables. With ``fbgemm`` they run FBGEMM's Adam, else its SGD, which never comes to act.
        replicated: field name -> parameter of the data-parallel tables.
        elements: see :mod:`embsearch_dist.kernels.adam`.

    Raises:
        UserError: tables lie in main memory behind a GPU's cache, where only FBGEMM can write them.
    """

    def __init__(
        self,
        collection: DistributedModelParallel,
        replicated: Mapping[str, nn.Parameter],
        context: Context,
        lr: float,
        elements: bool,
        fbgemm: bool,
    ) -> None:
        self.lr, self.elements, self.context = lr, elements, context
        self.steps = torch.zeros((), dtype=torch.int64)
        self._moments: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        self._counting: list[SplitTableBatchedEmbeddingBagsCodegen] = []
        for kernel in _fused_kernels(collection):
            if fbgemm:
                self._counting.append(kernel.emb_module)
                moments = [(m, v) for m, v, *_ in kernel.emb_module.split_optimizer_states()]
            else:
                moments = _InBackward(self, kernel.emb_module).moments
            for table, pair in zip(kernel._config.embedding_tables, moments, strict=True):
                self._moments[table.name, tuple(table.local_metadata.shard_offsets)] = pair
        self._replicated = dict(replicated)
        for name, weight in self._replicated.items():
            self._moments[module_name(name), (0, 0)] = (
                torch.zeros_like(weight.detach()),
                torch.zeros_like(weight.detach()),
            )
        marks = torch.zeros(sum(len(w) for w in self._replicated.values()), dtype=torch.uint8, device=context.device)
        self._marks = marks
        parts = marks.split([len(w) for w in self._replicated.values()])
        self._looked_up = dict(zip(self._replicated, parts, strict=True))

    @property
    def next_step(self) -> int:
        """The t of the update to come."""
        return int(self.steps) + 1

    def before(self, sparse: KeyedJaggedTensor) -> None:
        """To be called before each look-up that has gradients."""
        for module in self._counting:
            # FBGEMM counts its calls, those of evaluation too, and takes t from there; at zero it asks ``iter``.
            module.iter_cpu.fill_(int(self.steps))
            if not int(self.steps):
                module.iter.zero_()
        if not self.elements:
            for name, rows in self._looked_up.items():
                rows.index_fill_(0, sparse[name].values().long(), 1)

    def clear(self) -> None:
        """Forget gradients and what was looked up, in a step that is not to count or before the next one."""
        for weight in self._replicated.values():
            weight.grad = None
        self._marks.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Update the data-parallel tables, and count the step."""
        n = numbers(self.next_step, self.lr, self.elements)
        if self._replicated and not self.elements:
            dist.all_reduce(self._marks, dist.ReduceOp.MAX, group=self.context.group)
        for name, weight in self._replicated.items():
            if weight.grad is None:
                continue
            first, second = self._moments[module_name(name), (0, 0)]
            for start in range(0, len(weight), ROWS):
                rows = slice(start, start + ROWS)
                w, m, v, looked_up = weight[rows], first[rows], second[rows], self._looked_up[name][rows, None] > 0
                for part, value in zip((w, m, v), moved(w, m, v, weight.grad[rows], n, looked_up), strict=True):
                    part.copy_(value)
        self._marks.zero_()
        self.steps += 1

    def state(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The step count, and the moments named and sharded like ``weights``, the collection's state; live storage."""
        found: dict[str, Any] = {"steps": self.steps}
        for key, weight in weights.items():
            name = key.removeprefix("embedding_bags.").removesuffix(".weight")
            for k, field in enumerate(MOMENTS):
                if not isinstance(weight, ShardedTensor):
                    found[f"{key}/{field}"] = self._moments[name, (0, 0)][k]
                elif shards := [
                    Shard(self._moments[name, tuple(s.metadata.shard_offsets)][k], s.metadata)
                    for s in weight.local_shards()
                ]:
                    found[f"{key}/{field}"] = ShardedTensor._init_from_local_shards_and_global_metadata(
                        shards, weight.metadata(), process_group=self.context.group
                    )
        return found


class _InBackward:
    """The tables of one FBGEMM module; takes the place of its optimizer.

    Attributes:
        moments: of each table, shaped like its weights.
    """

    def __init__(self, adam: TableAdam, module: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        if module.weights_uvm.numel():
            raise UserError(
                "config key dist.planner.offload: tables of which a step reads some columns alone cannot be offloaded "
                "under optim.embedding adam; set optim.embedding to adagrad, or offload to false",
                everywhere=True,
            )
        assert module.feature_table_map == list(range(len(module.embedding_specs)))  # one feature a table
        self._adam, self._module, self._look_up = adam, module, module.forward
        tables = module.split_embedding_weights()
        places = [t.storage_offset() for t in tables]
        self.layout = Layout(
            tuple(len(t) for t in tables), tuple(t.shape[1] for t in tables), tuple(p - places[0] for p in places)
        )
        weights = self._weights()
        self._first, self._second = torch.zeros_like(weights), torch.zeros_like(weights)
        self.moments = [(self._table(self._first, t), self._table(self._second, t)) for t in range(len(tables))]
        self._trigger = torch.zeros((), device=weights.device, requires_grad=True)
        module.forward = self._forward  # type: ignore[method-assign]

    def _weights(self) -> torch.Tensor:
        held = self._module.weights_dev if self._module.weights_dev.numel() else self._module.weights_host
        return held.detach().flatten()

    def _table(self, flat: torch.Tensor, t: int) -> torch.Tensor:
        height, width, place = self.layout.heights[t], self.layout.widths[t], self.layout.places[t]
        return flat[place : place + height * width].view(height, width)

    def _forward(
        self, indices: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self._look_up(indices, offsets, per_sample_weights)
        made: torch.Tensor = _LookUp.apply(self._trigger, self, indices, offsets, per_sample_weights)
        return made

    def look_up(self, bags: Bags) -> torch.Tensor:
        """Pooled embeddings ``[B, sum of widths]``, without a graph. What FBGEMM mends in the ids stays mended."""
        return self._look_up(bags.ids, bags.offsets, bags.weights)

    def update(self, bags: Bags, gradient: torch.Tensor) -> None:
        """One step of these tables."""
        n = numbers(self._adam.next_step, self._adam.lr, self._adam.elements)
        update((self._weights(), self._first, self._second), self.layout, bags, gradient, n)


class _LookUp(torch.autograd.Function):
    """A look-up whose backward updates the tables. ``trigger`` is there so that autograd calls it."""

    @staticmethod
    def forward(
        ctx: Any,
        trigger: torch.Tensor,
        tables: _InBackward,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.tables, ctx.bags = tables, Bags(ids, offsets, weights)
        return tables.look_up(ctx.bags)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        ctx.tables.update(ctx.bags, gradients[0])
        return (None,) * 5


def _fused_kernels(collection: DistributedModelParallel) -> list[BatchedFusedEmbeddingBag]:
    """The modules of a placed collection that hold this rank's sharded tables."""
    lookups = collection.module._lookups
    return [m for lookup in lookups for m in lookup.modules() if isinstance(m, BatchedFusedEmbeddingBag)]
