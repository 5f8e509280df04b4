"""Bernoulli gates: which embedding columns a row uses (iHAS section 3.3)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.kernels.linear import Linear


class BernoulliGates(nn.Module):
    """``p = sigmoid(W e + b)``: for each row the probability that each of its C = N*d columns is open (section 3.3.1).

    Args:
        columns: C.
        shared: one vector of probabilities for all rows (the ablation iHAS-4) instead of W.
        bias: initial b; above 0 gates begin open.
    """

    def __init__(self, columns: int, shared: bool, bias: float) -> None:
        super().__init__()
        self.shared = shared
        if shared:
            self.bias = nn.Parameter(torch.full((columns,), bias))
        else:
            self.linear = Linear(columns, columns)
            nn.init.constant_(self.linear.bias, bias)

    def forward(self, e: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[B, C]`` -> logits of the probabilities ``[B, C]``."""
        return self.bias.expand_as(e) if self.shared else self.linear(e)


def straight_through(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sampled masks ``[B, C]`` of zeros and ones whose gradient is that of the relaxed ones (Eq. 1 and 2).

    The softmax over the two classes (log p + G, log(1-p) + G') is a sigmoid of the difference, and the difference of
    two Gumbel variables is logistic: one random number per gate, not two.

    Args:
        uniform: ``[B, C]`` in (0, 1).
    """
    soft = torch.sigmoid((logits + torch.logit(uniform)) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + soft - soft.detach()


def sampled(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The forward value of :func:`straight_through`, without the relaxation; passes no gradient."""
    return torch.neg(logits.detach()).sigmoid_().lt_(uniform)  # in one piece of memory: twice as fast


def regulariser(p: torch.Tensor, sparsity: float, polarization: float) -> torch.Tensor:
    """Mean over rows and columns of ``sparsity * p - polarization * |p - mean_j p|`` (Eq. 5 is the sum, with 1 for the
    second factor; as a mean its weight beside the loss depends neither on the batch nor on N*d)."""
    value = sparsity * p.mean()
    if polarization:
        value = value - polarization * (p - p.mean(1, keepdim=True)).abs().mean()
    return value


def thresholds(p: torch.Tensor, bins: int, fallback: float, smooth: int = 0) -> torch.Tensor:
    """Per row, the lower edge of the first local minimum of the histogram of its probabilities (section 3.3.3).

    The histogram has ``bins`` equal bins over [0, 1]. From the left, the first bin that holds less than the one
    before it and is followed, after bins that hold as much, by one that holds more. A row without such a bin (one
    peak, or all probabilities alike) gets ``fallback``.

    Args:
        p: ``[B, C]`` in [0, 1].
        smooth: average the counts over this many bins to either side first; many local minima are noise.

    Returns:
        ``[B]``.
    """
    rows = p.shape[0]
    place = (p * bins).to(torch.int32).clamp_(0, bins - 1)
    if torch.compiler.is_exporting():  # bincount has no form in ONNX
        counts = torch.stack([(place == k).sum(1) for k in range(bins)], 1).float()
    else:
        place += (torch.arange(rows, device=p.device, dtype=torch.int32) * bins)[:, None]
        counts = torch.bincount(place.reshape(-1), minlength=rows * bins).reshape(rows, bins).float()
    if smooth:
        window = 2 * smooth + 1
        counts = functional.avg_pool1d(counts[:, None], window, 1, smooth, count_include_pad=False)[:, 0]
    change = counts.diff(dim=1).sign()  # [B, bins - 1]: from bin k to bin k + 1
    # The first bin of a valley is where counts fell and the next change that is not zero is a rise.
    rising = torch.zeros(rows, device=p.device)
    minimum = torch.full((rows,), bins, dtype=torch.int64, device=p.device)
    for k in range(bins - 2, -1, -1):
        here = change[:, k]
        minimum = torch.where((here < 0) & (rising > 0), k + 1, minimum)
        rising = torch.where(here != 0, here, rising)
    return torch.where(minimum < bins, minimum.to(p.dtype) / bins, torch.full_like(minimum, fallback, dtype=p.dtype))


def deterministic(logits: torch.Tensor, bins: int, fallback: float, smooth: int = 0) -> torch.Tensor:
    """Masks ``[B, C]`` of zeros and ones without chance: open where p is above the row's threshold (section 3.3.2).

    A row whose probabilities are all below it keeps nothing: its masked embedding is zero, and so is that of the
    head's input. That is an answer, not an error.
    """
    p = torch.sigmoid(logits.detach())
    return p.gt_(thresholds(p, bins, fallback, smooth)[:, None])
