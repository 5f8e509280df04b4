"""Zero-cost proxies: what a network at its first values says, in one batch, of what it may reach when it is trained.

Larger is better in all of them. They put networks in order, no more, and know nothing of the data but a batch; zico
mostly likes large networks. ``synflow`` and NASWOT are left out: in chains of inner products the path sums of the
one square at every operator and overflow, and the other counts patterns of ReLUs, which half of the operators lack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.networks.network import ArchitectureNetwork

PARTS = 4  # of the batch, whose gradients zico compares; published: two batches
SMALL = 1e-5  # added to eigenvalues, as published
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def snip(network: ArchitectureNetwork, batch: Inputs) -> float:
    """Sum of |gradient x weight| of all weights (Lee et al. 2019; as a score of networks Abdelfattah et al. 2021): how
    much the loss feels them."""
    gradients = _gradients(network, batch)
    return sum(float((g * p).abs().sum()) for g, p in zip(gradients, network.parameters(), strict=True))


def zico(network: ArchitectureNetwork, batch: Inputs) -> float:
    """Sum over matrices of log(sum of mean |gradient| / its standard deviation over parts of the batch): gradients that
    are large and steady (ZiCo, Li et al. 2023; SiGeo, Xu et al. 2024, extends it and searches NASRec's space)."""
    dense, u, label = batch
    size = len(label) // PARTS
    parts = [slice(k * size, (k + 1) * size) for k in range(PARTS)]
    found = [[g.abs() for g in _gradients(network, (dense[p], u[p], label[p]))] for p in parts]
    total = 0.0
    for weight, gradients in zip(network.parameters(), zip(*found, strict=True), strict=True):
        if weight.ndim < 2:
            continue
        spread, mean = torch.std_mean(torch.stack(gradients), 0)
        steady = float((mean / spread)[spread > 0].sum())
        total += math.log(steady) if steady > 0 else 0.0
    return total


def jacob_cov(network: ArchitectureNetwork, batch: Inputs) -> float:
    """How different the rows' gradients by their inputs are (Mellor et al. 2020, as in Abdelfattah et al. 2021): minus
    the sum of log(v) + 1 / v over the eigenvalues v of their correlations."""
    dense, u, _ = batch
    dense, u = dense.clone().requires_grad_(), u.clone().requires_grad_()
    inputs = [u, dense] if dense.shape[1] else [u]
    found = torch.autograd.grad(network(u, dense).sum(), inputs, allow_unused=True)
    rows = torch.cat([g.flatten(1) for g in found if g is not None], 1).double()
    rows = rows - rows.mean(1, keepdim=True)
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, 1.0)
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0) + SMALL
    return -float((values.log() + 1 / values).sum())


PROXIES: dict[str, Callable[[ArchitectureNetwork, Inputs], float]] = {
    "snip": snip,
    "zico": zico,
    "jacob_cov": jacob_cov,
}


def _gradients(network: ArchitectureNetwork, batch: Inputs) -> tuple[torch.Tensor, ...]:
    dense, u, label = batch
    loss = binary_cross_entropy_with_logits(network(u, dense), label)
    return torch.autograd.grad(loss, list(network.parameters()))
