"""The NASRec supernet: tables of one width, and the weights of every architecture behind them, trained slice by slice.

DDP would exchange the gradient of all weights in every step, some 80 million numbers of which a drawn network uses one
or two. So the network hands out copies of the slices in use, backward fills their gradients, the ranks average those
and nothing else, and the optimizer writes them back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from embsearch_dist.allocation import Allocation
from embsearch_dist.architecture.architecture import Block
from embsearch_dist.architecture.space import Space
from embsearch_dist.config import Config, OptimConfig
from embsearch_dist.data.batch import Batch
from embsearch_dist.dist.context import Context
from embsearch_dist.models.ctr import CTRModel, seeded
from embsearch_dist.models.embeddings import MixedTables
from embsearch_dist.models.network import features, head
from embsearch_dist.models.slices import Layout, Slice, initial, merged, slices_of, whole
from embsearch_dist.schema import Schema

Blocks = Sequence[Block | None]


class SlicedNetwork(nn.Module):
    """All weights of a space; a forward pass uses those of one architecture.

    Attributes:
        live: name -> (slice, copy) of the weights that the last forward pass with gradients used. After backward the
            copies hold the gradients; the whole weights never get any.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.weights = nn.ParameterDict({n: nn.Parameter(initial(p)) for n, p in whole(layout).items()})
        self.live: dict[str, tuple[Slice, torch.Tensor]] = {}

    @torch.no_grad()
    def take(self, blocks: Blocks) -> dict[str, tuple[Slice, torch.Tensor]]:
        """Name -> (slice, copy) of the weights that a pruned architecture uses."""
        parts = slices_of(blocks, self.layout)
        return {n: (s, s.take(self.weights[n])) for n, s in parts.items()}

    def copies(self, blocks: Blocks) -> dict[str, torch.Tensor]:
        """Name -> copy of the weights that a pruned architecture uses, without gradients."""
        return {n: w for n, (_, w) in self.take(blocks).items()}

    def features(self, blocks: Blocks, dense: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads: see :func:`embsearch_dist.models.network.features`."""
        return features(blocks, self.copies(blocks), dense, u.transpose(1, 2))

    def forward(self, blocks: Blocks, dense: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """``u [B, F, width]``, ``dense [B, n_dense]`` -> logits ``[B]`` of a pruned architecture."""
        taken = self.take(blocks)
        if torch.is_grad_enabled():
            for _, w in taken.values():
                w.requires_grad_()
            self.live = taken
        weights = {n: w for n, (_, w) in taken.items()}
        return head(weights, *features(blocks, weights, dense, u.transpose(1, 2)))

    def average(self, context: Context, others: Sequence[Blocks] | None = None) -> list[torch.Tensor]:
        """Average the gradients of what is live over the ranks; returns it, ready for the optimizer.

        Args:
            others: what each rank has drawn, in rank order, if they differ: then all that any rank uses becomes live
                on every rank. None: all ranks have drawn the same.
        """
        if context.world_size > 1 and others is not None:
            self._widen(others)
        leaves = [w for _, w in self.live.values()]
        for w in leaves:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        if context.world_size > 1:
            gradients = [w.grad for w in leaves if w.grad is not None]
            flat = context.sum(_flatten_dense_tensors(gradients)).div_(context.world_size)
            for w, g in zip(leaves, _unflatten_dense_tensors(flat, gradients), strict=True):
                w.grad = g
        return leaves

    @torch.no_grad()
    def _widen(self, others: Sequence[Blocks]) -> None:
        """Make live what any rank uses; gradients keep their places, and are zero where this rank has none."""
        parts: dict[str, list[Slice]] = {}
        for blocks in others:
            for n, s in slices_of(blocks, self.layout).items():
                parts.setdefault(n, []).append(s)
        wide = {}
        for n in sorted(parts):
            union = merged(parts[n])
            w = union.take(self.weights[n])
            w.grad = torch.zeros_like(w)
            if n in self.live and self.live[n][1].grad is not None:
                own, leaf = self.live[n]
                own.within(union).put(w.grad, leaf.grad)  # type: ignore[arg-type]
            wide[n] = (union, w)
        self.live = wide


class SliceAdagrad(torch.optim.Adagrad):
    """Adagrad (Duchi et al. 2011) on the slices a step has used: what has no gradient is not touched, as a zero
    gradient would leave it. The state is kept for whole weights."""

    def __init__(self, network: SlicedNetwork, lr: float, eps: float) -> None:
        super().__init__(network.weights.values(), lr=lr, eps=eps)
        self.network = network

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update and forget what is live."""
        group, live = self.param_groups[0], self.network.live
        whole = [self.network.weights[n] for n in live]
        sums = [s.take(self.state[w]["sum"]) for w, (s, _) in zip(whole, live.values(), strict=True)]
        leaves = [w for _, w in live.values()]
        gradients = [w.grad for w in leaves if w.grad is not None]
        torch._foreach_addcmul_(sums, gradients, gradients, 1.0)
        roots = torch._foreach_sqrt(sums)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(leaves, gradients, roots, -group["lr"])
        for w, (s, leaf), total in zip(whole, live.values(), sums, strict=True):
            s.put(w, leaf)
            s.put(self.state[w]["sum"], total)
        self.network.live = {}


class ArchitectureSupernet(CTRModel):
    """Tables of the space's width and a :class:`SlicedNetwork` behind them."""

    tables: MixedTables
    head: SlicedNetwork

    def __init__(self, config: Config, schema: Schema, space: Space, context: Context) -> None:
        super().__init__()
        m, seed = config.model, config.run.seed
        uniform = Allocation.uniform(schema, space.width)
        self.context = context
        self.tables = MixedTables(uniform, context, config.dist, config.optim, seed, m.init_std)
        self.layout = Layout(space, max(1, len(schema.dense)), len(schema.fields))
        with seeded(seed):
            self.head = SlicedNetwork(self.layout).to(context.device)
        self.others: Sequence[Blocks] | None = None

    def make_optimizer(self, optim: OptimConfig, outer_lr: float = 0.0) -> torch.optim.Optimizer:
        """:class:`SliceAdagrad`; the moments of Adam would age in slices that are not used."""
        if optim.dense != "adagrad" or optim.weight_decay:
            raise ValueError("a supernet of slices needs optim.dense adagrad without weight decay")
        return SliceAdagrad(self.head, optim.dense_lr, optim.dense_eps)

    def after_backward(self) -> list[torch.Tensor]:
        return self.head.average(self.context, self.others)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Pooled embeddings ``[B, F, width]``, fields in schema order."""
        return self.tables(batch.sparse).stack().transpose(0, 1)

    def forward(self, batch: Batch, blocks: Blocks) -> torch.Tensor:
        """Logits ``[B]`` of a pruned architecture."""
        return self.head(blocks, batch.dense, self.embed(batch))
