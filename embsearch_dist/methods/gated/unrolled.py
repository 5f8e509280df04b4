"""Second-order steps of a selector: the held-out loss after a virtual step of what ordinary batches train.

DARTS (Liu et al. 2019, section 2.3), whose first-order approximation is `train/bilevel.py`. With weights w, outer
parameters a and a rate r, the gradient in a of ``L_held(w', a)`` with ``w' = w - r dL_train(w, a)/dw`` is ::

    dL_held(w', a)/da - r * (dL_train(w+, a)/da - dL_train(w-, a)/da) / (2 e),
    w+ = w + e dL_held(w', a)/dw',    w- = w - e dL_held(w', a)/dw',    e = 0.01 / |dL_held(w', a)/dw'|

The difference quotient stands for the product of the mixed second derivative with a vector (Eq. 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from embsearch_dist.ranks.context import Context
from embsearch_dist.train.bilevel import requiring_gradient

STEP = 0.01  # norm of the change of w in the difference quotient

Loss = Callable[[], torch.Tensor]
Tensors = Sequence[torch.Tensor]


def unrolled_loss(
    train: Loss,
    held_out: Loss,
    inner: Sequence[nn.Parameter],
    outer: Sequence[nn.Parameter],
    rate: float,
    ranks: Context,
) -> torch.Tensor:
    """The held-out loss after the virtual step, with the gradient above, which is the mean over ranks already.

    The value has no other graph than to ``outer``, outside of DDP. ``inner`` is moved and put back, bit for bit.

    Args:
        train, held_out: mean losses of this rank's rows at the present values of the parameters, without chance.
        inner: w; where gradients are switched off, they are on inside.
        outer: a.
        rate: r, of the virtual step.
    """
    start = [p.detach().clone() for p in inner]
    with requiring_gradient(inner):
        try:
            _move(inner, start, _gradients(train(), inner, ranks), -rate)
            loss = held_out()
            both = _gradients(loss, [*outer, *inner], ranks)
            direct, along = both[: len(outer)], both[len(outer) :]
            size = STEP / torch.stack([v.norm() for v in along]).norm().clamp(min=1e-12)
            sides = []
            for sign in (1, -1):
                _move(inner, start, along, sign * size)
                sides.append(_gradients(train(), outer, ranks))
        finally:
            _move(inner, start, start, 0.0)
    value = loss.detach()
    for a, g, above, below in zip(outer, direct, *sides, strict=True):
        value = value + ((a - a.detach()) * (g - rate * (above - below) / (2 * size))).sum()
    return value


@torch.no_grad()
def _move(parameters: Sequence[nn.Parameter], start: Tensors, along: Tensors, size: float | torch.Tensor) -> None:
    for p, value, direction in zip(parameters, start, along, strict=True):
        p.copy_(value + size * direction)


def _gradients(loss: torch.Tensor, parameters: Sequence[nn.Parameter], ranks: Context) -> list[torch.Tensor]:
    """Mean over the ranks; zeros of what has no part in the loss."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    own = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    if ranks.world_size == 1:
        return own
    flat = ranks.sum(torch.cat([g.flatten() for g in own])) / ranks.world_size
    parts = flat.split([g.numel() for g in own])
    return [part.view_as(g) for part, g in zip(parts, own, strict=True)]
