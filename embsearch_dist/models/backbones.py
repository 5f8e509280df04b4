"""Backbones behind the unified embeddings ``[B, F, d]``: FM, Wide & Deep, DeepFM.

All three are sums over fields and pairs of fields, up to the MLP's first non-linearity:

    logit = sum_f linear_f(u_f) + sum_{f<g} <u_f, u_g> + MLP(relu(sum_f first_f(u_f) + first(dense)))

A search that scores many subnets on the same rows caches the terms of each field and pair once and only adds
them up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Backbone(nn.Module):
    """Linear part + (FM) + (MLP), each on the unified embeddings.

    Args:
        fields: number of fields F.
        width: common embedding width d.
        dense: number of dense columns; they join the linear part and the MLP.
        fm: add the second-order term ``sum_{f<g} <u_f, u_g>`` (DeepFM, FM).
        hidden: hidden layers of the MLP; empty = no MLP (FM).
    """

    def __init__(
        self, fields: int, width: int, dense: int, fm: bool, hidden: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fields, self.width, self.fm, self.deep = fields, width, fm, bool(hidden)
        inputs = fields * width + dense
        self.linear = nn.Linear(inputs, 1)
        if hidden:
            self.first = nn.Linear(inputs, hidden[0])
            layers: list[nn.Module] = [nn.ReLU(inplace=True), nn.Dropout(dropout)]
            for a, b in zip(hidden, hidden[1:], strict=False):
                layers += [nn.Linear(a, b), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            self.rest = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n_dense]`` -> logits ``[B]``."""
        x = u.reshape(len(u), -1)
        if dense.shape[1]:
            x = torch.cat([x, dense], 1)
        logit = self.linear(x).squeeze(1)
        if self.fm:
            logit = logit + 0.5 * (u.sum(1).square().sum(1) - u.square().sum((1, 2)))
        if self.deep:
            logit = logit + self.rest(self.first(x)).squeeze(1)
        return logit

    @property
    def first_width(self) -> int:
        """Outputs of the MLP's first layer (0: no MLP)."""
        return self.first.out_features if self.deep else 0

    @property
    def later_layers(self) -> list[nn.Linear]:
        """The MLP's layers behind the first; a ReLU stands in front of each."""
        return [m for m in self.rest if isinstance(m, nn.Linear)] if self.deep else []

    def field_terms(self, field: int, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of one field ``u [N, d]`` in the linear part ``[N]`` and in the first layer ``[N, first_width]``."""
        columns = slice(field * self.width, (field + 1) * self.width)
        return u @ self.linear.weight[0, columns], u @ self.first.weight[:, columns].T if self.deep else u[:, :0]

    def pair_terms(self, u: torch.Tensor) -> torch.Tensor:
        """Share of pairs in the FM part: ``u [N, P, d]`` -> ``[N, P, P]``, of which a caller takes what it needs."""
        return u @ u.transpose(1, 2)

    def dense_terms(self, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the dense columns and of all biases, shaped as :meth:`field_terms`."""
        start = self.fields * self.width
        linear = dense @ self.linear.weight[0, start:] + self.linear.bias
        return linear, dense @ self.first.weight[:, start:].T + self.first.bias if self.deep else dense[:, :0]


def make_backbone(
    kind: str, fields: int, width: int, dense: int, hidden: Sequence[int], dropout: float = 0.0
) -> Backbone:
    """Build ``wide_deep`` (Cheng et al. 2016), ``deepfm`` (Guo et al. 2017) or ``fm`` (Rendle 2010).

    The wide part is linear in the unified embeddings: a linear part over raw ids would keep a
    full-width path for a field that the search has dropped.
    """
    return Backbone(
        fields, width, dense, fm=kind in ("deepfm", "fm"), hidden=[] if kind == "fm" else hidden, dropout=dropout
    )
