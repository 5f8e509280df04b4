"""Backbones behind the unified embeddings ``[B, F, d]``: FM, Wide & Deep, DeepFM.

All three are *additive in the fields* up to their first non-linearity:

    logit = finish(sum_f terms_f(u_f) + terms(dense))

where ``terms`` holds a field's share of the linear part, of the FM sums and of the MLP's first layer.
A search that scores many subnets on the same rows caches each field's terms once and only adds them up.
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
            layers: list[nn.Module] = [nn.ReLU(), nn.Dropout(dropout)]
            for a, b in zip(hidden, hidden[1:], strict=False):
                layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
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
    def term_width(self) -> int:
        """Number of cached values per field and row."""
        return 1 + self.width * self.fm + (self.first.out_features if self.deep else 0)

    def field_terms(self, field: int, u: torch.Tensor) -> torch.Tensor:
        """Share of one field ``u [N, d]`` in the sums: ``[N, term_width]``."""
        columns = slice(field * self.width, (field + 1) * self.width)
        one = u @ self.linear.weight[0, columns]
        parts = []
        if self.fm:
            one = one - 0.5 * u.square().sum(1)
            parts.append(u)
        if self.deep:
            parts.append(u @ self.first.weight[:, columns].T)
        return torch.cat([one[:, None], *parts], 1)

    def dense_terms(self, dense: torch.Tensor) -> torch.Tensor:
        """Share of the dense columns and of all biases: ``[N, term_width]``."""
        start = self.fields * self.width
        one = dense @ self.linear.weight[0, start:] + self.linear.bias
        parts = [one[:, None]]
        if self.fm:
            parts.append(dense.new_zeros(len(dense), self.width))
        if self.deep:
            parts.append(dense @ self.first.weight[:, start:].T + self.first.bias)
        return torch.cat(parts, 1)

    def finish(self, total: torch.Tensor) -> torch.Tensor:
        """Summed terms ``[N, term_width]`` -> logits ``[N]``."""
        logit = total[:, 0]
        if self.fm:
            logit = logit + 0.5 * total[:, 1 : 1 + self.width].square().sum(1)
        if self.deep:
            logit = logit + self.rest(total[:, 1 + self.width * self.fm :]).squeeze(1)
        return logit


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
