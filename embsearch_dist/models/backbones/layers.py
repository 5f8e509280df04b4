"""Hidden layers as every backbone stacks them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from embsearch_dist.kernels.linear import Linear


def hidden_layers(widths: Sequence[int], dropout: float) -> list[nn.Module]:
    """A linear layer, a ReLU and dropout between each two neighbours of ``widths``; one width gives no layer."""
    found: list[nn.Module] = []
    for a, b in pairwise(widths):
        found += [Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
    return found


def joined(u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Embeddings ``[B, F, d]`` field by field, and dense columns ``[B, n]`` behind them: ``[B, F d + n]``."""
    return torch.cat([u.flatten(1), dense], 1) if dense.shape[1] else u.flatten(1)
