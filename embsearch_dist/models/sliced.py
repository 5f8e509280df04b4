"""The NASRec supernet: tables of one width, and the weights of every architecture behind them, trained slice by slice.

DDP would exchange the gradient of all weights in every step, some 80 million numbers of which a drawn network uses one
or two. So the network hands out copies of the slices in use, backward fills their gradients, the ranks average those
and nothing else, and the optimizer writes them back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

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
Tensors = list[torch.Tensor]


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


class _OnSlices(ABC):
    """An optimizer's step on the slices in use: what has no gradient is not touched. The state is kept for whole
    weights, under ``keys``, and exists from the start."""

    keys: tuple[str, ...]
    network: SlicedNetwork
    state: Any
    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Update and forget what is live."""
        live = self.network.live
        whole = [self.network.weights[n] for n in live]
        slices, leaves = [s for s, _ in live.values()], [w for _, w in live.values()]
        states = {k: [s.take(self.state[w][k]) for w, s in zip(whole, slices, strict=True)] for k in self.keys}
        gradients = [w.grad for w in leaves if w.grad is not None]
        self.update(whole, leaves, gradients, states)
        for i, (w, s) in enumerate(zip(whole, slices, strict=True)):
            s.put(w, leaves[i])
            for key, values in states.items():
                s.put(self.state[w][key], values[i])
        self.network.live = {}

    @abstractmethod
    def update(self, whole: Tensors, leaves: Tensors, gradients: Tensors, states: dict[str, Tensors]) -> None:
        """Change ``leaves`` and ``states``, copies of the slices of ``whole``, in place."""


class SliceAdagrad(_OnSlices, torch.optim.Adagrad):  # type: ignore[misc]
    """Adagrad (Duchi et al. 2011) on slices: an unused one is as a zero gradient would leave it."""

    keys = ("sum",)

    def __init__(self, network: SlicedNetwork, lr: float, eps: float) -> None:
        super().__init__(network.weights.values(), lr=lr, eps=eps)
        self.network = network

    def update(self, whole: Tensors, leaves: Tensors, gradients: Tensors, states: dict[str, Tensors]) -> None:
        group, sums = self.param_groups[0], states["sum"]
        torch._foreach_addcmul_(sums, gradients, gradients, 1.0)
        roots = torch._foreach_sqrt(sums)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(leaves, gradients, roots, -group["lr"])


class SliceAdam(_OnSlices, torch.optim.Adam):  # type: ignore[misc]
    """Adam (Kingma and Ba 2015) on slices, lazily: moments age only in steps that use them.

    Steps are counted per weight and not per element, so what is used for the first time late gets no correction for
    the zeros its moments began with. With beta2 = 0.999 its steps would be up to seven times too long; 0.99 keeps
    them within about two. Where ranks draw networks of their own, all within the union of their slices counts as used.
    """

    keys = ("exp_avg", "exp_avg_sq")

    def __init__(self, network: SlicedNetwork, lr: float) -> None:
        super().__init__(network.weights.values(), lr=lr, betas=(0.9, 0.99))
        self.network = network
        for w in network.weights.values():
            moments = {key: torch.zeros_like(w).detach() for key in self.keys}
            self.state[w] = {"step": torch.zeros((), dtype=torch.float32), **moments}

    def update(self, whole: Tensors, leaves: Tensors, gradients: Tensors, states: dict[str, Tensors]) -> None:
        group, first, second = self.param_groups[0], states["exp_avg"], states["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        counts = []
        for w in whole:
            self.state[w]["step"] += 1
            counts.append(int(self.state[w]["step"]))
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**n) for n in counts])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(leaves, first, roots, [-group["lr"] / (1 - beta1**n) for n in counts])


class ArchitectureSupernet(CTRModel):
    """Tables of the space's width and a :class:`SlicedNetwork` behind them."""

    tables: MixedTables
    head: SlicedNetwork

    def __init__(self, config: Config, schema: Schema, space: Space, context: Context) -> None:
        super().__init__()
        m, seed = config.model, config.run.seed
        uniform = Allocation.uniform(schema, space.width)
        self.context = context
        self.tables = MixedTables(uniform, context, config.dist, config.optim, seed, m.init_std, partial=True)
        self.layout = Layout(space, max(1, len(schema.dense)), len(schema.fields))
        with seeded(seed):
            self.head = SlicedNetwork(self.layout).to(context.device)
        self.others: Sequence[Blocks] | None = None

    def make_optimizer(self, optim: OptimConfig, outer_lr: float = 0.0) -> torch.optim.Optimizer:
        """:class:`SliceAdagrad` or :class:`SliceAdam`; without weight decay, which would age what is not used."""
        if optim.weight_decay:
            raise ValueError("a supernet of slices needs optim.weight_decay 0")
        if optim.dense == "adagrad":
            return SliceAdagrad(self.head, optim.dense_lr, optim.dense_eps)
        return SliceAdam(self.head, optim.dense_lr)

    def after_backward(self) -> list[torch.Tensor]:
        return self.head.average(self.context, self.others)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Pooled embeddings ``[B, F, width]``, fields in schema order."""
        return self.tables(batch.sparse).stack().transpose(0, 1)

    def forward(self, batch: Batch, blocks: Blocks) -> torch.Tensor:
        """Logits ``[B]`` of a pruned architecture."""
        return self.head(blocks, batch.dense, self.embed(batch))
