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
    def term_widths(self) -> tuple[int, int]:
        """Cached values per field and row: of the linear and FM sums, and of the MLP's first layer (0: no MLP)."""
        return 1 + self.width * self.fm, self.first.out_features if self.deep else 0

    def field_terms(self, field: int, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of one field ``u [N, d]`` in the sums: ``[N, term_widths[0]]`` and ``[N, term_widths[1]]``."""
        columns = slice(field * self.width, (field + 1) * self.width)
        one = u @ self.linear.weight[0, columns]
        if self.fm:
            one = one - 0.5 * u.square().sum(1)
        shallow = torch.cat([one[:, None], u], 1) if self.fm else one[:, None]
        return shallow, u @ self.first.weight[:, columns].T if self.deep else u[:, :0]

    def dense_terms(self, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the dense columns and of all biases, shaped as :meth:`field_terms`."""
        start = self.fields * self.width
        shallow = dense.new_zeros(len(dense), self.term_widths[0])
        shallow[:, 0] = dense @ self.linear.weight[0, start:] + self.linear.bias
        deep = dense @ self.first.weight[:, start:].T + self.first.bias if self.deep else dense[:, :0]
        return shallow, deep

    def finish(self, shallow: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
        """Summed terms -> logits ``[N]``. Overwrites ``deep``."""
        logit = shallow[:, 0]
        if self.fm:
            logit = logit + 0.5 * shallow[:, 1:].square().sum(1)
        if self.deep:
            logit = logit + self.rest(deep).squeeze(1)
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
