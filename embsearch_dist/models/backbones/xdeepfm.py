"""xDeepFM (Lian et al. 2018, "xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender
Systems")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embsearch_dist.config.backbone_options import XDeepFMOptions
from embsearch_dist.config.backbones import register_backbone
from embsearch_dist.kernels.linear import Linear, linear
from embsearch_dist.models.backbones.layers import hidden_layers, joined
from embsearch_dist.models.rows import BLOCK

PAIR_BYTES = 64 << 20  # products of a map and a field that are in hand at a time, where nothing is learned


@register_backbone("xdeepfm")
class XDeepFM(nn.Module):
    """Compressed interaction network, MLP and a linear part.

    With X^0 the embeddings [F, d] of a row, map h of layer k is, column by column,

        X^k_h = sum_i sum_j W^k_{h,i,j} (X^{k-1}_i * X^0_j)                                   (Eq. 6)

    and p^k_h is the sum of its d numbers (Eq. 7). The logit is w_cin [p^1, ..., p^T] + MLP(x) + w_linear x + b, x the
    embeddings and dense columns side by side. The linear part is linear in the embeddings, not a weight per value, so
    that a dropped field leaves no path. The CIN has no activation function, as Eq. 6 is printed, and no halves of maps
    are passed on directly. Without ``hidden`` there is no MLP.

    Attributes:
        flops: of the CIN's products with W for one row.
    """

    Options = XDeepFMOptions

    def __init__(
        self, *, fields: int, width: int, dense: int, hidden: Sequence[int], dropout: float, options: XDeepFMOptions
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList()  # W^k as [F (j), H_{k-1} (i), H_k (h)]
        self.flops, before = 0, fields
        for maps in options.maps:
            weight = torch.empty(fields, before, maps)
            # As a linear layer of all pairs of a field and a map would begin.
            nn.init.uniform_(weight, -((fields * before) ** -0.5), (fields * before) ** -0.5)
            self.weights.append(nn.Parameter(weight))
            self.flops += 2 * width * fields * before * maps
            before = maps
        inputs = fields * width + dense
        self.last = Linear(sum(options.maps), 1)
        self.linear = nn.Linear(inputs, 1, bias=False)  # the bias is that of ``last``
        self.deep = None
        if hidden:
            self.deep = nn.Sequential(*hidden_layers([inputs, *hidden], dropout), Linear(hidden[-1], 1))

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n]`` -> logits ``[B]``."""
        x = joined(u, dense)
        logit: torch.Tensor = self.linear(x) + self.last(self.interactions(u))
        return (logit if self.deep is None else logit + self.deep(x)).squeeze(1)

    def interactions(self, u: torch.Tensor) -> torch.Tensor:
        """p^k_h of all layers: ``u [B, F, d]`` -> ``[B, sum of maps]``."""
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self._interactions(u)
        of_row = max(w.shape[0] * w.shape[1] for w in self.weights) * u.shape[2] * 4
        rows = max(BLOCK, PAIR_BYTES // of_row // BLOCK * BLOCK)
        return torch.cat([self._interactions(part) for part in u.split(rows)])

    def _interactions(self, u: torch.Tensor) -> torch.Tensor:
        columns = u.transpose(1, 2).flatten(0, 1)  # [B d, F]
        x, found = columns, []
        for weight in self.weights:
            pairs = (columns[:, :, None] * x[:, None]).flatten(1)  # [B d, F H_{k-1}]
            x = linear(pairs, weight.flatten(0, 1).T, weight.new_zeros(weight.shape[2]))
            found.append(x.unflatten(0, (-1, u.shape[2])).sum(1))
        return torch.cat(found, 1)
