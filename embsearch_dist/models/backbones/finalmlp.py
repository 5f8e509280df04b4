"""FinalMLP (Mao et al. 2023, "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embsearch_dist.config.backbone_options import FinalMLPOptions
from embsearch_dist.config.backbones import register_backbone
from embsearch_dist.config.options import require
from embsearch_dist.kernels.linear import Linear
from embsearch_dist.models.backbones.layers import hidden_layers, joined


@register_backbone("finalmlp")
class FinalMLP(nn.Module):
    """Two MLPs side by side on x, the embeddings and dense columns, and a bilinear fusion of what they give.

        h_s = 2 sigmoid(G_s(x)) * x,   o_s = MLP_s(h_s)    for the streams s = 1, 2     (feature selection)
        logit = b + w_1 o_1 + w_2 o_2 + sum_{j=1..k} o_1^j W^j o_2^j                     (multi-head bilinear fusion)

    where o^j is the j-th of k equal parts of o. G_s is an MLP that begins at zero, so that nothing is weighed at first.
    The paper feeds a gate some chosen fields, or none; here all of x. Without gates h_s is x.

    Attributes:
        flops: of the products with W^j for one row.

    Raises:
        UserError: ``hidden`` is empty, or the heads do not divide a stream's last layer.
    """

    Options = FinalMLPOptions

    def __init__(
        self, *, fields: int, width: int, dense: int, hidden: Sequence[int], dropout: float, options: FinalMLPOptions
    ) -> None:
        super().__init__()
        require(bool(hidden), "model.hidden", "finalmlp needs at least one hidden layer")
        inputs, heads = fields * width + dense, options.heads
        streams = [list(hidden), list(options.second or hidden)]
        for key, widths in zip(("model.hidden", "model.options.second"), streams):
            good = widths[-1] % heads == 0
            require(good, key, f"model.options.heads {heads} must divide the last layer, got {widths[-1]}")
        self.streams = nn.ModuleList(nn.Sequential(*hidden_layers([inputs, *w], dropout)) for w in streams)
        self.gates = nn.ModuleList()
        for _ in streams if options.gate else ():
            last = Linear(options.gate[-1], inputs)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.gates.append(nn.Sequential(*hidden_layers([inputs, *options.gate], dropout), last))
        one, two = (w[-1] // heads for w in streams)
        self.linear = Linear(heads * (one + two), 1)
        self.weight = nn.Parameter(torch.empty(heads, one, two))
        nn.init.uniform_(self.weight, -((heads * one * two) ** -0.5), (heads * one * two) ** -0.5)
        self.flops = 2 * heads * one * two

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n]`` -> logits ``[B]``."""
        x = joined(u, dense)
        gated = [2 * torch.sigmoid(gate(x)) * x for gate in self.gates] or [x, x]
        one, two = (stream(h) for stream, h in zip(self.streams, gated, strict=True))
        heads = len(self.weight)
        left = torch.bmm(one.unflatten(1, (heads, -1)).transpose(0, 1), self.weight)  # [k, B, width of two]
        fused = (left.transpose(0, 1).flatten(1) * two).sum(1)
        logit: torch.Tensor = self.linear(torch.cat([one, two], 1))
        return logit.squeeze(1) + fused
