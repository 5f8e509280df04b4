"""No weight is written before every rank has found its loss and its gradients finite.

TorchRec's fused optimizers write the tables inside backward, so a look at the gradients after backward
comes too late: one NaN in a pooled embedding is in the tables by then. The gate therefore cuts the graph
between tables and head. Backward runs through the head and ends at the pooled embeddings; the ranks agree,
in the one collective that also makes the mean loss; only then do the gradients go on into the tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torchrec import KeyedTensor

from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding.sharded_tables import ShardedTables

LOSS, EMBEDDINGS, HEAD = 1, 2, 4
WHAT = {
    LOSS: "loss",
    EMBEDDINGS: "gradient of the embeddings",
    HEAD: "gradient of the dense part",
}


class _Keep(torch.autograd.Function):
    """Identity whose backward keeps the gradient and passes none on: unlike a leaf's ``grad``, without a copy."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        ctx.kept = kept
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.kept.append(gradient)
        return None, None


class Gate:
    """Holds the gradients of the pooled embeddings back; use it in ``with``, around training."""

    def __init__(self, tables: ShardedTables) -> None:
        self._tables = tables
        self._held: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def __enter__(self) -> Self:
        self._hook = self._tables.register_forward_hook(self._cut)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hook.remove()
        self._held.clear()

    def _cut(self, module: Any, inputs: Any, pooled: KeyedTensor) -> KeyedTensor | None:
        if not torch.is_grad_enabled():
            return None
        values = pooled.values()
        if not values.requires_grad:
            return None
        kept: list[torch.Tensor] = []
        self._held.append((values, kept))
        cut = _Keep.apply(values.detach().requires_grad_(), kept)
        return KeyedTensor(pooled.keys(), pooled.length_per_key(), cut, pooled.key_dim())

    def clear(self) -> None:
        """Forget what was held back in a step that is not to count."""
        self._held.clear()

    def gradients(self) -> list[torch.Tensor]:
        """What has come back to the pooled embeddings."""
        return [gradient for _, kept in self._held for gradient in kept]

    def pass_on(self) -> None:
        """Let the gradients into the tables; on all ranks or on none, since ranks exchange them here."""
        held = [(values, kept[0]) for values, kept in self._held if kept]
        self._held.clear()
        if held:
            torch.autograd.backward([v for v, _ in held], [g for _, g in held])


@dataclass(frozen=True)
class Verdict:
    """What the ranks agreed on for one step."""

    loss: float
    """Mean over the ranks; only of use when nothing is bad."""
    rank: int
    """The rank whose numbers are bad; -1 when all are fine."""
    what: str
    """Which of its numbers."""
    stop: bool
    """Some rank was asked to stop after this step."""


def agree(
    context: Context,
    loss: torch.Tensor,
    pooled: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    stop: bool,
) -> Verdict:
    """One exchange between the ranks: mean loss, whether all is finite, whether to stop. The same on every rank.

    A sum stands for its addends: NaN and infinity stay in it.

    Args:
        loss: of this rank's batch.
        pooled: gradients that wait at the gate.
        parameters: of the head, after backward (averaged over ranks already).
        stop: this rank was asked to stop.
    """
    value = loss.detach()
    gradients = [p.grad for p in parameters if p.grad is not None]
    sums = torch.stack([value, _sum(pooled, value), _sum(gradients, value)]).double()
    if context.world_size == 1:
        mean, *others = sums.tolist()  # the one look at the device
        fine = [math.isfinite(v) for v in (mean, *others)]
        bad = [] if all(fine) else [(0, _name(fine))]
    else:
        finite = torch.isfinite(sums)
        report = torch.zeros(2 + context.world_size, dtype=torch.float64, device=value.device)
        report[0] = torch.where(finite[0], sums[0], 0.0)
        report[1] = float(stop)
        report[2 + context.rank] = (_weights(value.device) * ~finite).sum()
        dist.all_reduce(report)
        mean, asked, *flags = report.tolist()
        mean, stop = mean / context.world_size, asked > 0
        found = [(r, [not int(flag) & w for w in WHAT]) for r, flag in enumerate(flags) if flag]
        # The head's gradient is a mean over ranks: all of them see a NaN that one has made.
        found.sort(key=lambda entry: (entry[1][0], entry[1][1], entry[0]))
        bad = [(r, _name(fine)) for r, fine in found]
    rank, what = bad[0] if bad else (-1, "")
    return Verdict(mean, rank, what, stop)


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    return torch.tensor(list(WHAT), dtype=torch.float64, device=device)


def _sum(gradients: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if like.device.type == "cuda" and len(gradients) > 1:
        # A launch for all of them; magnitudes add up to what is not finite just when one of them is not.
        return torch.stack(torch._foreach_norm(list(gradients), 1)).sum()
    # Several times cheaper than a norm, and these run in every step.
    sums = [g.sum() for g in gradients]
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0] if sums else like.new_zeros(())


def _name(fine: list[bool]) -> str:
    return next(what for what, good in zip(WHAT.values(), fine, strict=True) if not good)
