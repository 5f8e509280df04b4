"""Whole models: sharded tables and, under DDP, the dense part behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config, OptimConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.kernels.bfloat16 import warn_if_slow
from embsearch_dist.models.backbones.making import backbone_of
from embsearch_dist.models.folded import FoldedMLP, can_fold
from embsearch_dist.models.head import Head, common_width, make_head, make_unify
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.room import check_room
from embsearch_dist.models.rows import fill_rows
from embsearch_dist.models.tables import MaxTables, MixedTables
from embsearch_dist.models.unify import MixedUnify, SupernetUnify
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import ShardedTables

__all__ = ["CTRModel", "Head", "SubnetModel", "SupernetModel", "bare", "common_width", "make_unify", "seeded"]


class CTRModel(nn.Module):
    """Tables sharded by TorchRec, head under DDP; ``dense_parameters`` are the head's."""

    tables: MaxTables | MixedTables
    head: nn.Module

    def _wrap(self, module: nn.Module, context: Context) -> nn.Module:
        module = module.to(context.device)
        if context.rank == 0 and getattr(getattr(module, "backbone", None), "precision", None) is torch.bfloat16:
            warn_if_slow(context.device)
        if context.world_size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # Running statistics are equal on all ranks already (UnifyNorm reduces them).
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    @property
    def bare_head(self) -> Head:
        """The head without DDP around it."""
        return bare(self.head)  # type: ignore[return-value]

    @property
    def replicated(self) -> nn.Module:
        """Everything that is alike on all ranks, without DDP around it: what a checkpoint holds beside the tables."""
        return self.bare_head

    @property
    def outer_parameters(self) -> list[nn.Parameter]:
        """Of the replicated parameters, those that held-out rows train and nothing else (bi-level training)."""
        return []

    @property
    def sharded(self) -> ShardedTables:
        return self.tables.sharded

    def make_optimizer(self, optim: OptimConfig, outer_lr: float = 0.0) -> torch.optim.Optimizer:
        """Of everything replicated. One for head and outer parameters: what has no gradient in a step is left as it
        is, moments included."""
        groups = self.optimizer_groups()
        if self.outer_parameters:
            groups.append({"params": self.outer_parameters, "lr": outer_lr})
        if optim.dense == "adagrad":
            return torch.optim.Adagrad(groups, optim.dense_lr, weight_decay=optim.weight_decay, eps=optim.dense_eps)
        return torch.optim.Adam(groups, lr=optim.dense_lr, weight_decay=optim.weight_decay, fused=True)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The head's parameters, in groups that may have rates of their own."""
        return [{"params": list(self.bare_head.parameters())}]

    def after_backward(self) -> Sequence[torch.Tensor]:
        """The tensors whose gradients the next step of that optimizer uses, alike on all ranks by now."""
        return list(self.bare_head.parameters())

    def dense_count(self) -> int:
        """Trainable parameters of the head."""
        return sum(p.numel() for p in self.bare_head.parameters() if p.requires_grad)


class SubnetModel(CTRModel):
    """The model of one allocation (UES included): what retrain trains and evaluate loads."""

    tables: MixedTables

    def __init__(self, config: Config, allocation: Allocation, context: Context) -> None:
        super().__init__()
        m, seed = config.model, config.run.seed
        self.folds, self._folded = False, list[FoldedMLP]()  # in a list: no part of the state
        tables = MixedTables(allocation, context, config.dist, config.optim, seed, m.init_std, extra=m.extra)
        self.tables, widths = tables, tables.widths
        with seeded(seed), context.together("reading the architecture"):
            head = make_head(m, widths, len(allocation.schema.dense), context.world_size > 1)
        self.head = self._wrap(head, context)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Pooled]:
        """Logits ``[B]`` and the pooled embeddings (for L2)."""
        pooled = self.tables(batch.sparse)
        if torch.is_grad_enabled():
            return self.head(batch.dense, pooled), pooled
        whole, dense = replace(pooled, values=fill_rows(pooled.values)), fill_rows(batch.dense)
        logits = self._fold(whole)(dense, whole) if self.folds else self.head(dense, whole)
        return logits[: batch.size], pooled

    def fold(self) -> None:
        """From now on predict with :class:`FoldedMLP` where the model allows it; for weights that stay as they are."""
        head = self.bare_head
        self.folds, self._folded = can_fold(head.unify, head.backbone), []

    def _fold(self, pooled: Pooled) -> FoldedMLP:
        if not self._folded:
            head: Any = self.bare_head
            self._folded.append(FoldedMLP(head.unify, head.backbone, pooled).eval())
        return self._folded[0]

    def flops_per_sample(self) -> float:
        """Multiply-adds times two of the products in the head's forward pass for one row (look-ups have none)."""
        head: Head = self.bare_head
        backbone: Any = head.backbone
        layers = sum(m.in_features * m.out_features for m in head.modules() if isinstance(m, nn.Linear))
        unify = head.unify.products if isinstance(head.unify, MixedUnify) else 0
        return 2.0 * (layers + unify) + getattr(backbone, "flops", 0)


class SupernetModel(CTRModel):
    """Every allocation in one: max-tables and the T candidate transforms."""

    tables: MaxTables

    def __init__(
        self,
        config: Config,
        schema: Schema,
        candidates: Sequence[int],
        scheme: str,
        context: Context,
        same_subnet: bool,
    ) -> None:
        super().__init__()
        m, seed = config.model, config.run.seed
        tables = MaxTables(schema, candidates, scheme, context, config.dist, config.optim, seed, m.init_std, m.extra)
        self.tables = tables
        with seeded(seed):
            # Ranks that draw their own subnets share no batch statistics.
            synchronise = context.world_size > 1 and same_subnet
            fields, n_dense = len(schema.fields), len(schema.dense)
            width = max(candidates) if m.transform == "identity" else m.unified_width
            check_room("model.unified_width", max(candidates), [width] * (m.transform != "identity"))
            unify = SupernetUnify(fields, tables.mask.cpu(), width, m.norm, m.gain, synchronise, m.transform)
            backbone = backbone_of(m, fields, width, n_dense, bool(m.extra))
        self.head = self._wrap(Head(unify, backbone), context)

    def forward(self, batch: Batch, choice: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, Pooled]:
        """Logits ``[B]`` of the subnet ``choice [F]``, ``keep [F]``, and the pooled rows of the max-tables."""
        pooled = self.tables(batch.sparse)
        return self.head(batch.dense, pooled, choice, keep), pooled


def bare(module: nn.Module) -> nn.Module:
    """A module without DDP around it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


class seeded:
    """Build modules under a seed of their own without disturbing the global generator."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.random.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.random.set_rng_state(self.state)
