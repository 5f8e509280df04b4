"""Backbones behind the unified embeddings ``[B, F, d]``: FM, Wide & Deep, DeepFM, MLP.

All of them are sums over fields and pairs of fields, up to the MLP's first non-linearity:

    logit = sum_f linear_f(u_f) + sum_{f<g} <u_f, u_g> + MLP(relu(sum_f first_f(u_f) + first(dense)))

As FM, DeepFM and Wide & Deep were published, ``linear_f`` is a weight of the value itself, not linear in its
embedding: with ``values`` it comes from the tables, summed over the fields, and the embeddings have no linear part.

A search that scores many subnets on the same rows caches the terms of each field and pair once and only adds
them up.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.kernels.linear import Linear, fm, linear
from embsearch_dist.models.pooled import Move, moved
from embsearch_dist.models.room import check_room


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
        values: the linear part of the fields are weights of the values, given to :meth:`forward`.
        widths: of each field, where they are not ``width`` alike: fields then come side by side, and no weight is spent
            on columns that would be zero. The FM fills them up to ``width``.
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
        values: bool = False,
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.precision, self.values = getattr(torch, precision), values
        self.fields, self.width, self.fm, self.deep = fields, width, fm, bool(hidden)
        self.widths = list(widths) or [width] * fields
        self.starts = list(accumulate(self.widths, initial=0))
        inputs = self.starts[-1] + dense
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # no dense columns: a bias alone
            self.linear = nn.Linear(dense if values else inputs, 1)
        if hidden:
            self.first = Linear(inputs, hidden[0])
            layers: list[nn.Module] = [nn.ReLU(), nn.Dropout(dropout)]
            for a, b in zip(hidden, hidden[1:], strict=False):
                layers += [Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
            self.rest = nn.Sequential(*layers, Linear(hidden[-1], 1))

    def forward(self, u: torch.Tensor, dense: torch.Tensor, first_order: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B]``.

        Args:
            u: ``[B, F, d]``, or with ``widths`` ``[B, sum of widths]``.
            dense: ``[B, n_dense]``.
            first_order: with ``values``, the sum over the fields of the values' weights, ``[B]``.
        """
        x = u.flatten(1)
        if dense.shape[1]:
            x = torch.cat([x, dense], 1)
        part = dense if self.values else x
        if self.deep and self.precision is torch.bfloat16:
            with torch.autocast(u.device.type, self.precision):
                hidden = self.rest[:-1](self.first(x))
            logit = self.linear(part) + self.rest[-1](hidden.float())
        elif self.deep and self.values:
            logit = self.linear(part) + self.rest(self.first(x))
        elif self.deep:
            # One product for both: the inputs are wide, and each more would read and, in backward, write them again.
            # Rows of zeros fill it up to whole vectors: 257 outputs take up to three times as long as 272.
            fill = -(self.first_width + 1) % 16
            weight = functional.pad(torch.cat([self.first.weight, self.linear.weight]), (0, 0, 0, fill))
            bias = functional.pad(torch.cat([self.first.bias, self.linear.bias]), (0, fill))
            hidden, logit, _ = linear(x, weight, bias).split([self.first_width, 1, fill], 1)
            logit = logit + self.rest(hidden)
        else:
            logit = self.linear(part)
        logit = logit.squeeze(1)
        if self.values:
            assert first_order is not None
            logit = logit + first_order
        return logit + fm(self._alike(u)) if self.fm else logit

    def _alike(self, u: torch.Tensor) -> torch.Tensor:
        """The fields at one width ``[B, F, d]``."""
        if u.dim() == 3:
            return u
        places = zip(self.starts, range(0, self.fields * self.width, self.width), self.widths, strict=False)
        filled = moved(u, [Move(*place) for place in places], self.fields * self.width)
        return filled.unflatten(1, (self.fields, self.width))

    def columns(self, field: int) -> slice:
        """Inputs of the first layer that are one field's."""
        return slice(self.starts[field], self.starts[field + 1])

    @property
    def first_width(self) -> int:
        """Outputs of the MLP's first layer (0: no MLP)."""
        return self.first.out_features if self.deep else 0

    @property
    def later_layers(self) -> list[nn.Linear]:
        """The MLP's layers behind the first; a ReLU stands in front of each."""
        return [m for m in self.rest if isinstance(m, nn.Linear)] if self.deep else []

    def field_terms(self, field: int, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of one field ``u [N, d]`` in the linear part ``[N]`` and in the first layer ``[N, first_width]``.

        With ``values`` the first is zero: its share is the weight of its value."""
        columns = self.columns(field)
        linear = u.new_zeros(len(u)) if self.values else u @ self.linear.weight[0, columns]
        return linear, u @ self.first.weight[:, columns].T if self.deep else u[:, :0]

    def field_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`field_terms` multiplies with, of all fields: ``[F, d]`` and ``[F, d, first_width]``."""
        inputs = self.fields * self.width
        shape = (self.fields, self.width)
        linear = self.linear.weight.new_zeros(shape) if self.values else self.linear.weight[0, :inputs].view(shape)
        if not self.deep:
            return linear, linear.new_zeros(self.fields, self.width, 0)
        return linear, self.first.weight[:, :inputs].T.reshape(self.fields, self.width, self.first_width)

    def dense_terms(self, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the dense columns and of all biases, shaped as :meth:`field_terms`."""
        start = self.starts[-1]
        own = self.linear.weight[0, 0 if self.values else start :]
        linear = dense @ own + self.linear.bias
        return linear, dense @ self.first.weight[:, start:].T + self.first.bias if self.deep else dense[:, :0]


def make_backbone(
    kind: str,
    fields: int,
    width: int,
    dense: int,
    hidden: Sequence[int],
    dropout: float = 0.0,
    precision: str = "float32",
    values: bool = False,
    widths: Sequence[int] = (),
) -> Backbone:
    """Build ``wide_deep`` (Cheng et al. 2016), ``deepfm`` (Guo et al. 2017), ``fm`` (Rendle 2010) or ``mlp``.

    The wide part is linear in the unified embeddings, or with ``values`` the sum of a weight per value as published.
    That weight is a column of the field's table, so that a dropped field leaves no path either way. An mlp has none.
    """
    check_room("model.hidden", sum(widths) or fields * width, [] if kind == "fm" else hidden)
    fm = kind in ("deepfm", "fm")
    values = values and kind != "mlp"
    found = Backbone(fields, width, dense, fm, [] if kind == "fm" else hidden, dropout, precision, values, widths)
    if kind == "mlp":
        # The linear part stays, at zero, so that all backbones have the same terms; in the first product it is one
        # output of several hundred.
        for p in found.linear.parameters():
            p.requires_grad_(False).zero_()
    return found
