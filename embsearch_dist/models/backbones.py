"""Backbones behind the unified embeddings ``[B, F, d]``: FM, Wide & Deep, DeepFM, MLP.

All of them are sums over fields and pairs of fields, up to the MLP's first non-linearity:

    logit = sum_f linear_f(u_f) + sum_{f<g} <u_f, u_g> + MLP(relu(sum_f first_f(u_f) + first(dense)))

A search that scores many subnets on the same rows caches the terms of each field and pair once and only adds
them up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.errors import UserError
from embsearch_dist.models.dense import Linear, fm, linear


class Backbone(nn.Module):
    """Linear part + (FM) + (MLP), each on the unified embeddings.

    Args:
        fields: number of fields F.
        width: common embedding width d.
        dense: number of dense columns; they join the linear part and the MLP.
        fm: add the second-order term ``sum_{f<g} <u_f, u_g>`` (DeepFM, FM).
        hidden: hidden layers of the MLP; empty = no MLP (FM).
        precision: ``float32``, or ``bfloat16`` for the products of the MLP's hidden layers. What is added up to
            the logit is float32 in either case, and so are all weights.
    """

    def __init__(
        self,
        fields: int,
        width: int,
        dense: int,
        fm: bool,
        hidden: Sequence[int],
        dropout: float = 0.0,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.precision = getattr(torch, precision)
        self.fields, self.width, self.fm, self.deep = fields, width, fm, bool(hidden)
        inputs = fields * width + dense
        self.linear = nn.Linear(inputs, 1)
        if hidden:
            self.first = Linear(inputs, hidden[0])
            layers: list[nn.Module] = [nn.ReLU(), nn.Dropout(dropout)]
            for a, b in zip(hidden, hidden[1:], strict=False):
                layers += [Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
            self.rest = nn.Sequential(*layers, Linear(hidden[-1], 1))

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n_dense]`` -> logits ``[B]``."""
        x = u.reshape(len(u), -1)
        if dense.shape[1]:
            x = torch.cat([x, dense], 1)
        if self.deep and self.precision is torch.bfloat16:
            with torch.autocast(u.device.type, self.precision):
                hidden = self.rest[:-1](self.first(x))
            logit = self.linear(x) + self.rest[-1](hidden.float())
        elif self.deep:
            # One product for both: the inputs are wide, and each more would read and, in backward, write them again.
            # Rows of zeros fill it up to whole vectors: 257 outputs take up to three times as long as 272.
            fill = -(self.first_width + 1) % 16
            weight = functional.pad(torch.cat([self.first.weight, self.linear.weight]), (0, 0, 0, fill))
            bias = functional.pad(torch.cat([self.first.bias, self.linear.bias]), (0, fill))
            hidden, logit, _ = linear(x, weight, bias).split([self.first_width, 1, fill], 1)
            logit = logit + self.rest(hidden)
        else:
            logit = self.linear(x)
        logit = logit.squeeze(1)
        return logit + fm(u) if self.fm else logit

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

    def field_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`field_terms` multiplies with, of all fields: ``[F, d]`` and ``[F, d, first_width]``."""
        inputs = self.fields * self.width
        linear = self.linear.weight[0, :inputs].view(self.fields, self.width)
        if not self.deep:
            return linear, linear.new_zeros(self.fields, self.width, 0)
        return linear, self.first.weight[:, :inputs].T.reshape(self.fields, self.width, self.first_width)

    def pair_terms(self, u: torch.Tensor) -> torch.Tensor:
        """Share of pairs in the FM part: ``u [N, P, d]`` -> ``[N, P, P]``, of which a caller takes what it needs."""
        return u @ u.transpose(1, 2)

    def dense_terms(self, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the dense columns and of all biases, shaped as :meth:`field_terms`."""
        start = self.fields * self.width
        linear = dense @ self.linear.weight[0, start:] + self.linear.bias
        return linear, dense @ self.first.weight[:, start:].T + self.first.bias if self.deep else dense[:, :0]


def make_backbone(
    kind: str,
    fields: int,
    width: int,
    dense: int,
    hidden: Sequence[int],
    dropout: float = 0.0,
    precision: str = "float32",
) -> Backbone:
    """Build ``wide_deep`` (Cheng et al. 2016), ``deepfm`` (Guo et al. 2017), ``fm`` (Rendle 2010) or ``mlp``.

    The wide part is linear in the unified embeddings: a linear part over raw ids would keep a
    full-width path for a field that the search has dropped.
    """
    if kind in ("dlrm", "nasrec"):
        raise UserError(f"config key model.backbone: {kind} is for the model of an allocation (retrain.py) alone")
    fm = kind in ("deepfm", "fm")
    found = Backbone(fields, width, dense, fm, [] if kind == "fm" else hidden, dropout, precision)
    if kind == "mlp":
        # The linear part stays, at zero, so that all backbones have the same terms; in the first product it is one
        # output of several hundred.
        for p in found.linear.parameters():
            p.requires_grad_(False).zero_()
    return found
