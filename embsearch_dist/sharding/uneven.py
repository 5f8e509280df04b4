"""Gradients of tables that are split by rows, where the ranks of gloo have different numbers of rows in a batch.

TorchRec sends the pooled rows of such tables home by a scatter, and their gradients back by a gather of parts that need
not have one size. NCCL takes those; gloo refuses them, so a training with a global batch that its ranks cannot share
evenly would end in the first backward pass. Here the parts are filled up to one size for the way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torchrec.distributed import comm_ops, dist_data
from torchrec.distributed.types import NoWait

_usual = comm_ops.reduce_scatter_v_pooled


def allow_uneven_batches() -> None:
    """From now on TorchRec's look-ups in this process take batches of any sizes over gloo too."""
    dist_data.reduce_scatter_v_pooled = _scatter


def _scatter(input: torch.Tensor, input_splits: list[int], group: Any = None, codecs: Any = None) -> Any:
    """As TorchRec's function of this name. What needs no gradient goes TorchRec's way."""
    group = group or dist.distributed_c10d._get_default_group()
    if not torch.is_grad_enabled() or dist.get_backend(group) != "gloo" or codecs is not None:
        return _usual(input, input_splits, group, codecs)
    return NoWait(_ScatterSums.apply(input, input_splits, group))


class _ScatterSums(torch.autograd.Function):
    """``[sum of splits, columns]`` of every rank -> the sum of this rank's part over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, splits: list[int], group: Any) -> torch.Tensor:
        ctx.splits, ctx.group = splits, group
        out = x.new_empty(splits[dist.get_rank(group)], x.shape[1])
        dist.reduce_scatter(out, list(x.split(splits)), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (own,), most = gradients, max(ctx.splits)
        filled = functional.pad(own, (0, 0, 0, most - len(own))).contiguous()
        parts = [torch.empty_like(filled) for _ in ctx.splits]
        dist.all_gather(parts, filled, group=ctx.group)
        whole = torch.cat([part[:rows] for part, rows in zip(parts, ctx.splits, strict=True)])
        if comm_ops.get_gradient_division():
            whole.div_(len(ctx.splits))  # TorchRec's mean over ranks
        return whole, None, None
