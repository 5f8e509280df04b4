"""DCN-V2 (Wang et al. 2021, "DCN V2: Improved Deep & Cross Network"): cross layers with a matrix, and an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embsearch_dist.config.backbone_options import DCNv2Options
from embsearch_dist.config.backbones import register_backbone
from embsearch_dist.kernels.linear import Linear
from embsearch_dist.models.backbones.layers import hidden_layers, joined
from embsearch_dist.models.room import check_room


@register_backbone("dcnv2")
class DCNv2(nn.Module):
    """Cross layers on x_0, the embeddings of all fields and the dense columns side by side (D numbers):

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l                  (Eq. 1)
        x_{l+1} = x_0 * (U_l (V_l^T x_l) + b_l) + x_l           with ``rank`` (the low-rank form of the same section)

    ``parallel``: logit = w [x_L, MLP(x_0)] + b; ``stacked``: logit = w MLP(x_L) + b (Fig. 1). The MLP has the layers of
    ``hidden``; without any the logit is linear in x_L. The mixture of low-rank experts is not here.
    """

    Options = DCNv2Options

    def __init__(
        self, *, fields: int, width: int, dense: int, hidden: Sequence[int], dropout: float, options: DCNv2Options
    ) -> None:
        super().__init__()
        size, rank = fields * width + dense, options.rank
        check_room("model.options.rank", size, [rank or size] * (options.layers if rank else options.layers + 1))
        self.stacked = options.structure == "stacked"
        self.cross = nn.ModuleList(
            nn.Sequential(nn.Linear(size, rank, bias=False), Linear(rank, size)) if rank else Linear(size, size)
            for _ in range(options.layers)
        )
        self.deep = nn.Sequential(*hidden_layers([size, *hidden], dropout))
        deep = hidden[-1] if hidden else 0
        self.last = Linear((deep or size) if self.stacked else size + deep, 1)

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n]`` -> logits ``[B]``."""
        first = x = joined(u, dense)
        for layer in self.cross:
            x = torch.addcmul(x, first, layer(x))
        if self.stacked:
            x = self.deep(x)
        elif len(self.deep):
            x = torch.cat([x, self.deep(first)], 1)
        logit: torch.Tensor = self.last(x)
        return logit.squeeze(1)
