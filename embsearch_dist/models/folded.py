"""Inference without the transform: its maps are linear, and so is the first layer behind them."""

from __future__ import annotations

import torch
from torch import nn

from embsearch_dist.kernels.linear import linear
from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.unify import MixedIdentity, MixedUnify


def can_fold(unify: nn.Module, backbone: nn.Module) -> bool:
    """Whether maps and first layer make one product: linear maps without statistics between them, and no FM."""
    if not isinstance(unify, MixedUnify | MixedIdentity) or unify.norm.kind != "none":
        return False
    linear_maps = isinstance(unify, MixedIdentity) or unify.after is None
    deep = isinstance(backbone, Backbone) and backbone.deep and not backbone.fm
    return linear_maps and deep and backbone.precision is torch.float32


class FoldedMLP(nn.Module):
    """Transform, first layer and linear part of a trained model as one matrix on the embeddings where they lie.

    With ``u_f = M^T e_f + b`` (AdaS&S Eq. 7) and the first layer's columns ``W_f`` it is
    ``W_f u_f = (W_f M^T) e_f + W_f b``: a field of width w costs w columns instead of a map and d_f columns. Without a
    map nothing is multiplied, but the embeddings need not be put in order. A weight per value joins the linear part.

    Args:
        unify, backbone: of a trained model; later changes of their weights are not seen.
        example: any batch's embeddings: they tell where the fields lie.
    """

    def __init__(self, unify: MixedUnify | MixedIdentity, backbone: Backbone, example: Pooled) -> None:
        super().__init__()
        self.first_width = backbone.first_width
        inputs, last = backbone.starts[-1], backbone.linear.weight
        if backbone.values:
            last = nn.functional.pad(last, (inputs, 0))
        whole = torch.cat([backbone.first.weight, last]).detach()
        bias = torch.cat([backbone.first.bias, backbone.linear.bias]).detach().clone()
        fill = -len(whole) % 16  # whole vectors, as in the backbone
        weight = whole.new_zeros(len(whole) + fill, example.values.shape[1])
        for f, (start, width) in enumerate(zip(example.starts, example.widths, strict=True)):
            own = whole[:, backbone.columns(f)]
            if isinstance(unify, MixedUnify):
                map_, shift = unify.map_of(f)
                bias += own @ shift.detach()
                own = own @ map_.detach().T
            weight[: len(whole), start : start + width] = own
        weight[self.first_width, list(example.weights)] = 1.0
        dense = nn.functional.pad(whole[:, inputs:], (0, 0, 0, fill))
        self.register_buffer("weight", torch.cat([weight, dense], 1), persistent=False)
        self.register_buffer("bias", nn.functional.pad(bias, (0, fill)), persistent=False)
        self.weight: torch.Tensor
        self.bias: torch.Tensor
        self.rest = backbone.rest

    def forward(self, dense: torch.Tensor, pooled: Pooled) -> torch.Tensor:
        """Logits ``[B]``."""
        x = torch.cat([pooled.values, dense], 1) if dense.shape[1] else pooled.values
        out = linear(x, self.weight, self.bias)
        return out[:, self.first_width] + self.rest(out[:, : self.first_width]).squeeze(1)
