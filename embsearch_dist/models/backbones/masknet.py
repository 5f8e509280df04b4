"""MaskNet (Wang et al. 2021, "MaskNet: Introducing Feature-Wise Multiplication to CTR Ranking Models by Instance-Guided
Mask")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.config.backbone_options import MaskNetOptions
from embsearch_dist.config.backbones import register_backbone
from embsearch_dist.kernels.linear import Linear
from embsearch_dist.models.backbones.layers import hidden_layers, joined


class MaskBlock(nn.Module):
    """relu(LN(W (mask(x) * v))), with the instance-guided mask mask(x) = P relu(A x + a) + p.

    Args:
        inputs: width of x, from which every mask is made.
        masked: z, width of v.
        outputs: width of the block.
        ratio: r; the aggregation layer A has t = r z outputs.
    """

    def __init__(self, inputs: int, masked: int, outputs: int, ratio: float) -> None:
        super().__init__()
        aggregation = max(1, round(ratio * masked))
        self.mask = nn.Sequential(Linear(inputs, aggregation), nn.ReLU(), Linear(aggregation, masked))
        self.project = nn.Linear(masked, outputs, bias=False)  # the shift is that of the norm
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``x [B, inputs]``, ``v [B, masked]`` -> ``[B, outputs]``."""
        return torch.relu(self.norm(self.project(self.mask(x) * v)))


@register_backbone("masknet")
class MaskNet(nn.Module):
    """Mask blocks on the embeddings, parallel or serial.

    x: embeddings and dense columns side by side. v_0: the same with a LayerNorm of each field's embedding, scale and
    shift of its own; dense columns have no norm.

        parallel: block k masks v_0, all with masks from x; logit = w MLP([block 1, ..., block K]) + b
        serial: block 1 masks v_0, block k masks block k-1, all with masks from x; logit = w MLP(block K) + b

    The MLP has the layers of ``hidden``; the paper's serial model has none.
    """

    Options = MaskNetOptions

    def __init__(
        self, *, fields: int, width: int, dense: int, hidden: Sequence[int], dropout: float, options: MaskNetOptions
    ) -> None:
        super().__init__()
        self.serial, inputs, out = options.structure == "serial", fields * width + dense, options.block_width
        self.scale, self.shift = nn.Parameter(torch.ones(fields, width)), nn.Parameter(torch.zeros(fields, width))
        masked = [inputs] + [out if self.serial else inputs] * (options.blocks - 1)
        self.blocks = nn.ModuleList(MaskBlock(inputs, z, out, options.ratio) for z in masked)
        widths = [out if self.serial else out * options.blocks, *hidden]
        self.deep = nn.Sequential(*hidden_layers(widths, dropout), Linear(widths[-1], 1))

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]``, ``dense [B, n]`` -> logits ``[B]``."""
        x = joined(u, dense)
        v = joined(functional.layer_norm(u, u.shape[2:]) * self.scale + self.shift, dense)
        if self.serial:
            for block in self.blocks:
                v = block(x, v)
        else:
            v = torch.cat([block(x, v) for block in self.blocks], 1)
        logit: torch.Tensor = self.deep(v)
        return logit.squeeze(1)
