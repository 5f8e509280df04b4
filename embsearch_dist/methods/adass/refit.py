"""Fit the head of each candidate before it is scored: the supernet's own serves all subnets, hence none best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embsearch_dist.ranks.context import Context

RIDGE = 1e-2  # of the mean curvature of a weight: how strongly it is held at the inherited one
REFITS = ("none", "linear")


@dataclass(frozen=True)
class Inherited:
    """The last layer of the supernet's MLP: weight ``[h]`` (h = 0: no MLP) and bias."""

    weight: torch.Tensor
    bias: float


class HeadFit:
    """One Newton step of a logistic regression per candidate, from the inherited weights, with a ridge towards them.

    A row's inputs are the h last activations, the linear and FM parts together, and a constant. The step needs one
    pass over the rows, which need not be kept: gradient and curvature are added up over the chunks and the ranks.
    Of each candidate it costs 2 (h + 2)^2 operations a row that fits, about as much as one hidden layer, and a
    system of h + 2 equations.
    """

    def __init__(self, count: int, own: Inherited, context: Context) -> None:
        self.context = context
        start = torch.cat([own.weight, own.weight.new_tensor([1.0, own.bias])])
        size = len(start)
        self.start = start
        self.gradient = start.new_zeros(count, size)
        self.curvature = start.new_zeros(count, size, size)
        self.weights: torch.Tensor | None = None

    def _inputs(self, hidden: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden.float(), plain[..., None], torch.ones_like(plain)[..., None]], 2)

    def add(self, candidates: slice, hidden: torch.Tensor, plain: torch.Tensor, labels: torch.Tensor) -> None:
        """Rows that fit: ``hidden [K, n, h]``, ``plain [K, n]`` (linear and FM parts), ``labels [n]``."""
        x = self._inputs(hidden, plain)
        p = (x @ self.start).sigmoid()
        self.gradient[candidates] += ((p - labels)[:, None] @ x).squeeze(1)
        self.curvature[candidates] += x.transpose(1, 2) @ (x * (p * (1 - p))[..., None])

    def solve(self) -> torch.Tensor:
        """The fitted weights ``[K, h + 2]``."""
        gradient = self.context.sum(self.gradient).double()
        curvature = self.context.sum(self.curvature).double()
        own = curvature.diagonal(dim1=1, dim2=2)
        # An input that never moves (a dead unit) has no curvature of its own: the mean keeps the system solvable.
        ridge = RIDGE * (own + own.mean(1, keepdim=True)) + 1e-12
        step = torch.linalg.solve(curvature + torch.diag_embed(ridge), gradient)
        return self.start - step.float()

    def predict(self, candidates: slice, hidden: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Logits ``[K, n]`` of other rows under the fitted heads."""
        if self.weights is None:
            self.weights = self.solve()
        w = self.weights[candidates]
        return (self._inputs(hidden, plain) @ w[..., None]).squeeze(2)
