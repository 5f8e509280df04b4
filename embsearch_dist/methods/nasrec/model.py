"""The NASRec supernet: tables of one width, and the weights of every architecture behind them, trained slice by slice.

DDP would exchange the gradient of all weights in every step, some 80 million numbers of which a drawn network uses one
or two. So the network copies the slices in use into one vector, backward fills its gradient, the ranks average that and
nothing else, and the optimizer writes the vector back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config, OptimConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.models.model import CTRModel, seeded
from embsearch_dist.models.tables import MixedTables
from embsearch_dist.networks.architecture import Block
from embsearch_dist.networks.network import features, head
from embsearch_dist.networks.pieces import Pieces, places
from embsearch_dist.networks.slices import Layout, Slice, initial, merged, slices_of, whole
from embsearch_dist.networks.space import Space
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema

Blocks = Sequence[Block | None]


@dataclass(frozen=True)
class Live:
    """What a forward pass with gradients used: the slices, and a leaf ``values [pieces.size]`` that holds their
    numbers and, after backward, their gradient."""

    pieces: Pieces
    values: torch.Tensor

    def gradient(self) -> torch.Tensor:
        """Of all slices; zeros before any backward."""
        if self.values.grad is None:
            self.values.grad = torch.zeros_like(self.values)
        return self.values.grad


class SlicedNetwork(nn.Module):
    """All weights of a space, side by side in one vector; a forward pass uses those of one architecture.

    Attributes:
        weights: name -> whole weight, a view of the vector.
        live: what the last forward pass with gradients used; the whole weights never get gradients.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.weights = nn.ParameterDict({n: nn.Parameter(initial(p)) for n, p in whole(layout).items()})
        self.places = places({n: tuple(w.shape) for n, w in self.weights.items()})
        self.live: Live | None = None
        self._join()

    def _join(self) -> None:
        weights = dict(self.weights.items())
        self.vector = joined(weights)
        for n, view in views(self.vector, weights).items():
            weights[n].data = view

    def _apply(self, *arguments: Any, **more: Any) -> Self:
        super()._apply(*arguments, **more)
        self._join()  # weights are moved one by one
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()  # and copied one by one

    def pieces(self, blocks: Blocks) -> Pieces:
        """Where the slices of a pruned architecture lie."""
        return Pieces(slices_of(blocks, self.layout), self.places)

    @torch.no_grad()
    def copies(self, blocks: Blocks) -> dict[str, torch.Tensor]:
        """Name -> copy of the weights that a pruned architecture uses, without gradients."""
        pieces = self.pieces(blocks)
        return pieces.named(pieces.take(self.vector))

    def forward(self, blocks: Blocks, dense: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """``u [B, F, width]``, ``dense [B, n_dense]`` -> logits ``[B]`` of a pruned architecture."""
        pieces = self.pieces(blocks)
        values = pieces.take(self.vector)
        if torch.is_grad_enabled():
            self.live = Live(pieces, values.requires_grad_())
        weights = pieces.named(values)
        return head(weights, *features(blocks, weights, dense, u.transpose(1, 2)))

    def average(self, context: Context, others: Sequence[Blocks] | None = None) -> list[torch.Tensor]:
        """Average the gradients of what is live over the ranks; returns the leaf, ready for the optimizer.

        Args:
            others: what each rank has drawn, in rank order, if they differ: then all that any rank uses becomes live
                on every rank. None: all ranks have drawn the same.
        """
        assert self.live is not None, "no forward pass with gradients"
        if context.world_size > 1 and others is not None:
            self.live = self._widened(self.live, others)
        gradient = self.live.gradient()
        if context.world_size > 1:
            self.live.values.grad = context.sum(gradient).div_(context.world_size)
        return [self.live.values]

    @torch.no_grad()
    def _widened(self, live: Live, others: Sequence[Blocks]) -> Live:
        """What any rank uses; gradients keep their places, and are zero where this rank has none."""
        parts: dict[str, list[Slice]] = {}
        for blocks in others:
            for n, s in slices_of(blocks, self.layout).items():
                parts.setdefault(n, []).append(s)
        union = Pieces({n: merged(parts[n]) for n in sorted(parts)}, self.places)
        wide = Live(union, union.take(self.vector))
        own = {n: s.within(union.slices[n]) for n, s in live.pieces.slices.items()}
        Pieces(own, union.places).put(wide.gradient(), live.gradient())
        return wide


def joined(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A copy of all of these, side by side."""
    return torch.cat([v.detach().reshape(-1) for v in values.values()])


def views(vector: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> part of a vector, in the order and the shapes of ``like``."""
    parts = vector.split([v.numel() for v in like.values()])
    return {n: part.view(v.shape) for (n, v), part in zip(like.items(), parts, strict=True)}


class _OnSlices(ABC):
    """An optimizer's step on the slices in use: what has no gradient is not touched. The state is kept for whole
    weights, under ``keys``, and exists from the start: for each key one vector, of which the weights' own are views."""

    keys: tuple[str, ...]
    network: SlicedNetwork
    state: Any
    param_groups: list[dict[str, Any]]

    def _join(self, network: SlicedNetwork) -> None:
        self.network, weights = network, dict(network.weights.items())
        self._vectors = {key: joined({n: self.state[w][key] for n, w in weights.items()}) for key in self.keys}
        for key, vector in self._vectors.items():
            for n, view in views(vector, weights).items():
                self.state[weights[n]][key] = view

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """Update and forget what is live."""
        live, self.network.live = self.network.live, None
        assert live is not None, "no forward pass with gradients"
        states = {k: live.pieces.take(v) for k, v in self._vectors.items()}
        self.update(live, live.values.detach(), live.gradient(), states)
        live.pieces.put(self.network.vector, live.values.detach())
        for key, values in states.items():
            live.pieces.put(self._vectors[key], values)

    @abstractmethod
    def update(self, live: Live, values: torch.Tensor, gradient: torch.Tensor, states: dict[str, torch.Tensor]) -> None:
        """Change ``values`` and ``states``, vectors of the slices that are live, in place."""


class SliceAdagrad(_OnSlices, torch.optim.Adagrad):  # type: ignore[misc]
    """Adagrad (Duchi et al. 2011) on slices: an unused one is as a zero gradient would leave it."""

    keys = ("sum",)

    def __init__(self, network: SlicedNetwork, lr: float, eps: float) -> None:
        super().__init__(network.weights.values(), lr=lr, eps=eps)
        self._join(network)

    def update(self, live: Live, values: torch.Tensor, gradient: torch.Tensor, states: dict[str, torch.Tensor]) -> None:
        group, sums = self.param_groups[0], states["sum"]
        roots = sums.addcmul_(gradient, gradient).sqrt().add_(group["eps"])
        values.addcdiv_(gradient, roots, value=-group["lr"])


class SliceAdam(_OnSlices, torch.optim.Adam):  # type: ignore[misc]
    """Adam (Kingma and Ba 2015) on slices, lazily: moments age only in steps that use them.

    Steps are counted per weight and not per element, so what is used for the first time late gets no correction for
    the zeros its moments began with. With beta2 = 0.999 its steps would be up to seven times too long; 0.99 keeps
    them within about two. Where ranks draw networks of their own, all within the union of their slices counts as used.
    """

    keys = ("exp_avg", "exp_avg_sq")

    def __init__(self, network: SlicedNetwork, lr: float) -> None:
        super().__init__(network.weights.values(), lr=lr, betas=(0.9, 0.99))
        self._steps = torch.zeros(len(network.weights))  # on the CPU: read in every step
        for count, w in zip(self._steps.unbind(), network.weights.values(), strict=True):
            moments = {key: torch.zeros_like(w).detach() for key in self.keys}
            self.state[w] = {"step": count, **moments}
        self._join(network)
        self._numbers = {n: i for i, n in enumerate(network.weights)}

    def update(self, live: Live, values: torch.Tensor, gradient: torch.Tensor, states: dict[str, torch.Tensor]) -> None:
        group, first, second = self.param_groups[0], states["exp_avg"], states["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        used = torch.tensor([self._numbers[n] for n in live.pieces.slices])
        self._steps[used] += 1
        counts = self._steps[used].tolist()
        first.lerp_(gradient, 1 - beta1)
        roots = second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt()
        weights, moments, parts = (live.pieces.split(x) for x in (values, first, roots))
        torch._foreach_div_(parts, [math.sqrt(1 - beta2**n) for n in counts])
        roots.add_(group["eps"])
        torch._foreach_addcdiv_(weights, moments, parts, [-group["lr"] / (1 - beta1**n) for n in counts])


class ArchitectureSupernet(CTRModel):
    """Tables of the space's width and a :class:`SlicedNetwork` behind them."""

    tables: MixedTables
    head: SlicedNetwork

    def __init__(self, config: Config, schema: Schema, space: Space, context: Context) -> None:
        super().__init__()
        m, seed = config.model, config.run.seed
        uniform = Allocation.uniform(schema, space.width)
        self.context = context
        # Not ``partial``: the head reads tokens, so every network reads every column of the tables.
        self.tables = MixedTables(uniform, context, config.dist, config.optim, seed, m.init_std)
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
