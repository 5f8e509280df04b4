"""DLRM (Naumov et al. 2019, section 2): inner products of all pairs of vectors, behind and before an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embsearch_dist.errors import UserError
from embsearch_dist.kernels.linear import Linear
from embsearch_dist.models.backbones.layers import hidden_layers


class DLRM(nn.Module):
    """Bottom MLP on the dense columns, inner products of all pairs, top MLP on both.

    The bottom MLP ends in a vector as wide as an embedding, which takes part in the products and joins them in the top
    MLP. Data without dense columns have neither.

    Attributes:
        flops: of the products of pairs for one row; those of the layers are counted with the layers.

    Args:
        fields: number of fields F.
        width: common embedding width d.
        dense: number of dense columns.
        bottom: hidden layers of the bottom MLP; the layer of width d behind them is added.
        hidden: hidden layers of the top MLP; the output unit is added.
        dropout: after each hidden layer of the top MLP.

    Raises:
        UserError: one field and no dense column: there is no pair.
    """

    def __init__(
        self, fields: int, width: int, dense: int, bottom: Sequence[int], hidden: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fields, self.width = fields, width
        self.bottom = nn.Sequential(*hidden_layers([dense, *bottom, width], 0.0)) if dense else None
        vectors = fields + (1 if dense else 0)
        if vectors < 2:
            raise UserError(
                "config key model.backbone: dlrm needs two vectors for a pair, and there is one field whose width is "
                "above 0, and no dense column. Keep more fields (a larger search.budget, no candidate 0), or take "
                "another backbone"
            )
        self.flops = 2 * vectors * vectors * width
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)
        self.pairs: torch.Tensor
        inputs = self.pairs.shape[1] + (width if dense else 0)
        self.top = nn.Sequential(*hidden_layers([inputs, *hidden], dropout), Linear([inputs, *hidden][-1], 1))

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n_dense]`` -> logits ``[B]``."""
        x = self.bottom(dense) if self.bottom is not None else None
        z = u if x is None else torch.cat([x[:, None], u], 1)
        products = torch.bmm(z, z.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        logit: torch.Tensor = self.top(products if x is None else torch.cat([x, products], 1))
        return logit.squeeze(1)
