"""AutoInt (Song et al. 2019, "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embsearch_dist.config.backbone_options import AutoIntOptions
from embsearch_dist.config.backbones import register_backbone
from embsearch_dist.kernels.linear import Linear
from embsearch_dist.models.backbones.layers import hidden_layers, joined


@register_backbone("autoint")
class AutoInt(nn.Module):
    """Multi-head self-attention among the tokens of a row, with a residual and a ReLU.

    Tokens are the embeddings e_m of the fields, and v_n x_n for each dense column (Eq. 4). A layer is, per head h,

        a_{m,k} = softmax_k <Q_h e_m, K_h e_k>,   t_m = sum_k a_{m,k} V_h e_k                 (Eq. 5, 6)
        e_m <- relu([t_m of head 1, ..., t_m of head H] + R e_m)                              (Eq. 7, 8)

    and the logit is w [e_1, ..., e_M] + b behind the last (Eq. 9). With ``hidden`` an MLP on the embeddings and the
    dense columns is added to the logit (AutoInt+); without, the model is AutoInt alone. Inner products are not divided
    by the root of the width, as printed.

    Attributes:
        flops: of the attention layers for one row.
    """

    Options = AutoIntOptions

    def __init__(
        self, *, fields: int, width: int, dense: int, hidden: Sequence[int], dropout: float, options: AutoIntOptions
    ) -> None:
        super().__init__()
        self.heads, out, tokens = options.heads, options.heads * options.head_width, fields + dense
        if dense:
            self.columns = nn.Parameter(torch.empty(dense, width))
            nn.init.xavier_uniform_(self.columns)
        self.weights = nn.ParameterList()  # of each layer Q, K, V and R side by side: [d_in, 4, H d']
        self.flops = 0
        for layer in range(options.layers):
            inputs = out if layer else width
            weight = torch.empty(4, inputs, out)
            for part in weight:
                nn.init.xavier_uniform_(part)
            self.weights.append(nn.Parameter(weight.transpose(0, 1).contiguous()))
            self.flops += 2 * tokens * inputs * 4 * out + 2 * 2 * tokens * tokens * out
        self.last = Linear(tokens * out, 1)
        self.deep = None
        if hidden:
            inputs = fields * width + dense
            self.deep = nn.Sequential(*hidden_layers([inputs, *hidden], dropout), Linear(hidden[-1], 1))

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n]`` -> logits ``[B]``."""
        e = torch.cat([u, dense[:, :, None] * self.columns], 1) if dense.shape[1] else u
        for weight in self.weights:
            e = self._attended(e, weight)
        logit: torch.Tensor = self.last(e.flatten(1))
        if self.deep is not None:
            logit = logit + self.deep(joined(u, dense))
        return logit.squeeze(1)

    def _attended(self, e: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """One layer: ``e [B, M, d_in]`` -> ``[B, M, H d']``."""
        q, k, v, residual = (e @ weight.flatten(1)).unflatten(2, (4, -1)).unbind(2)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, M, d']
        mixed = (q @ k.transpose(2, 3)).softmax(3) @ v
        return torch.relu(mixed.transpose(1, 2).flatten(2) + residual)
