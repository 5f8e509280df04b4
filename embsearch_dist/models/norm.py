"""BatchNorm of transformed embeddings (AdaS&S section 3.1, after Eq. 7), alike on any number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional


class UnifyNorm(nn.Module):
    """Normalise ``u[F, B, d]`` into ``[B, F, d]``, where field f uses candidate ``choice[f]`` of T.

    Scale and shift belong to the candidate. Statistics belong to

    * ``field``: each (field, candidate) pair. They do not depend on what the other fields chose, so a
      subnet is normalised in the search as it was in training, and the result can be cached.
    * ``width``: the candidate, over all fields that chose it (the literal reading of the paper).

    In training they are those of the global batch: with ``synchronise`` the ranks' sums are reduced
    inside autograd, which makes 1 and 2 ranks agree. (torch's SyncBatchNorm runs on GPUs only.)
    """

    def __init__(self, fields: int, candidates: int, width: int, kind: str, gain: float, synchronise: bool) -> None:
        super().__init__()
        self.kind, self.synchronise = kind, synchronise
        self.momentum, self.eps = 0.1, 1e-5
        if kind == "none":
            return  # DDP stops at parameters that take no part in the loss
        self.scale = nn.Parameter(torch.full((candidates, width), gain))
        self.shift = nn.Parameter(torch.zeros(candidates, width))
        shape = (fields, candidates, width) if kind == "field" else (1, candidates, width)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.mean: torch.Tensor
        self.variance: torch.Tensor

    def forward(self, u: torch.Tensor, choice: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """``u [F, B, d]``, ``choice [F]`` int64, ``keep [F]`` bool (fields that take part in statistics)."""
        if self.kind == "none":
            return u.transpose(0, 1)
        row = torch.arange(len(choice), device=u.device) if self.kind == "field" else torch.zeros_like(choice)
        if not self.training:
            return self.apply_statistics(u, choice, self.mean[row, choice], self.variance[row, choice])
        if self.kind == "field" and not self.synchronise:
            return self._native(u, choice, row, keep)
        mean, variance, count = self._batch_moments(u, choice, keep)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))  # as torch's BatchNorm keeps it
            counted = self._counted(choice, keep)
            for buffer, value in ((self.mean, mean), (self.variance, unbiased)):
                old = buffer[row, choice]
                new = old + self.momentum * (value - old)
                buffer[row, choice] = new if counted is None else torch.where(counted[:, None], new, old)
        return self.apply_statistics(u, choice, mean, variance)

    def apply_statistics(
        self, u: torch.Tensor, choice: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
    ) -> torch.Tensor:
        """Normalise ``u [F, B, d]`` with given ``mean, variance [F, d]``; returns ``[B, F, d]``."""
        factor = self.scale[choice] * torch.rsqrt(variance + self.eps)
        return u.transpose(0, 1) * factor + (self.shift[choice] - mean * factor)

    def _native(
        self, u: torch.Tensor, choice: torch.Tensor, row: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        # Per-field statistics are an ordinary BatchNorm over F * d channels, and torch's kernel is fused.
        fields, batch, width = u.shape
        mean, variance = self.mean[row, choice], self.variance[row, choice]
        running_mean, running_variance = mean.flatten(), variance.flatten()
        flat = u.transpose(0, 1).reshape(batch, fields * width)
        scale, shift = self.scale[choice].flatten(), self.shift[choice].flatten()
        out = functional.batch_norm(
            flat, running_mean, running_variance, scale, shift, training=True, momentum=self.momentum, eps=self.eps
        )
        with torch.no_grad():
            for buffer, running in ((self.mean, running_mean), (self.variance, running_variance)):
                new = running.view(fields, width)
                # The gathered copy was written in place: what a dropped field had is still in the buffer.
                buffer[row, choice] = new if keep is None else torch.where(keep[:, None], new, buffer[row, choice])
        return out.view(batch, fields, width)

    def _counted(self, choice: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor | None:
        """``[F]`` bool: whose entry of the running statistics moves (a mask of rows would make a GPU wait); None = all.

        A dropped field of a candidate that another field uses writes the same entry as that one, so it writes the
        same value: that entry's new one.
        """
        if keep is None or self.kind == "field":
            return keep
        users = torch.zeros(len(self.scale), device=choice.device).index_add(0, choice, keep.float())
        return users[choice] > 0

    def _batch_moments(
        self, u: torch.Tensor, choice: torch.Tensor, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and biased variance ``[F, d]`` and row count of the global batch; two passes, as one loses digits."""
        batch = torch.full((), float(u.shape[1]), device=u.device)  # made there, not copied to it
        if self.synchronise:
            dist.all_reduce(batch)
        mean = self._pool(self._reduce(u.sum(1)) / batch, choice, keep)
        variance = self._pool(self._reduce((u - mean[:, None]).square().sum(1)) / batch, choice, keep)
        return mean, variance, batch

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x) if self.synchronise else x

    def _pool(self, x: torch.Tensor, choice: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """For ``width`` statistics: average over the fields that share a candidate."""
        if self.kind == "field":
            return x
        weight = torch.ones_like(choice, dtype=x.dtype) if keep is None else keep.to(x.dtype)
        total = torch.zeros_like(self.scale).index_add(0, choice, x * weight[:, None])
        count = torch.zeros(len(self.scale), dtype=x.dtype, device=x.device).index_add(0, choice, weight)
        return (total / count.clamp(min=1)[:, None])[choice]
