"""The transform of mixed widths to one common width d_f (AdaS&S Eq. 7), shared over fields.

Every candidate width has one linear map and one BatchNorm; all fields of that width use them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embsearch_dist.models.norm import UnifyNorm
from embsearch_dist.models.pooled import Pooled, Span, field_linear


def initial_map(width: int, common: int) -> torch.Tensor:
    """Start of a linear map ``[width, common]``: column k of the embedding goes to place k of the common space.

    The transform then begins as no transform, and fields of different widths meet in their leading columns;
    a random start cost 0.001 AUC on MovieLens-1M (docs/results.md). Columns past d_f wrap around.
    """
    weight = torch.zeros(width, common)
    rows = torch.arange(width)
    weight[rows, rows % common] = min(1.0, (common / max(width, 1)) ** 0.5)
    return weight


def initial_bias(candidates: int, width: int, norm: str) -> nn.Parameter:
    """Zeros ``[candidates, width]``, fixed under BatchNorm: it takes a bias out again, so its gradient is rounding
    noise, which Adam would scale up to full steps and the running mean would follow late."""
    return nn.Parameter(torch.zeros(candidates, width), requires_grad=norm == "none")


class SupernetUnify(nn.Module):
    """T candidate maps over the columns of a max-table, chosen per field at every step.

    The weight of candidate j is stored at the full table width with zero rows outside its columns, and the
    gradient of all other columns is exactly zero. On CPU only the candidate's columns are read (what a step
    costs follows the widths it drew). On a GPU one batched product over the full width needs fewer launches.
    """

    def __init__(self, fields: int, mask: torch.Tensor, width: int, norm: str, gain: float, synchronise: bool) -> None:
        """``mask [T, table width]``: 1 where a column belongs to the candidate."""
        super().__init__()
        self.register_buffer("mask", mask.clone(), persistent=False)
        self.mask: torch.Tensor
        # First column and number of columns of each candidate: they are neighbours.
        self.columns = [(int(m.argmax()), int(m.sum())) for m in mask]
        candidates, columns = mask.shape
        weight = torch.zeros(candidates, columns, width)
        for j in range(candidates):
            own = mask[j] > 0
            weight[j, own] = initial_map(int(own.sum()), width)
        self.weight = nn.Parameter(weight)
        self.bias = initial_bias(candidates, width, norm)
        self.register_buffer("present", (mask.sum(1) > 0), persistent=False)
        self.present: torch.Tensor
        self.norm = UnifyNorm(fields, candidates, width, norm, gain, synchronise)

    def linear(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """``x [F, B, table width]``, ``choice [F]`` -> ``[F, B, d_f]`` before normalisation."""
        weight = (self.weight * self.mask[..., None])[choice]
        return torch.baddbmm(self.bias[choice][:, None], x, weight)

    def in_place(self, x: Pooled, choice: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """As :meth:`linear`, from columns where they lie -> ``[B, F, d_f]``; zero for fields that are not kept.

        A field of a candidate without columns must not be kept."""
        spans: list[Span | None] = []
        for start, j, kept in zip(x.starts, choice.tolist(), keep.tolist(), strict=True):
            first, count = self.columns[j]
            spans.append(Span(start + first, j, first, count) if kept else None)
        return field_linear(x.values, spans, self.weight.unbind(0), self.bias)

    def forward(self, x: Pooled | torch.Tensor, choice: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """One subnet: ``choice [F]`` int64 and ``keep [F]`` bool -> ``[B, F, d_f]``; dropped fields are zero.

        ``x``: the pooled max-tables, or ``[F, B, table width]``.
        """
        keep = keep & self.present[choice]
        if isinstance(x, Pooled) and x.values.device.type == "cpu":
            u = self.in_place(x, choice, keep)
            if self.norm.kind == "none":
                return u
            u = self.norm(u.transpose(0, 1), choice, keep)
        else:
            u = self.norm(self.linear(x.stack() if isinstance(x, Pooled) else x, choice), choice, keep)
        return u * keep.to(u.dtype)[:, None]


class MixedUnify(nn.Module):
    """One map per width of an allocation; each field keeps its own for good."""

    def __init__(self, widths: Sequence[int], width: int, norm: str, gain: float, synchronise: bool) -> None:
        """``widths``: nominal width of each kept field, in schema order."""
        super().__init__()
        self.groups = sorted(set(widths))
        self.weights = nn.ParameterList(nn.Parameter(initial_map(w, width)) for w in self.groups)
        self.bias = initial_bias(len(self.groups), width, norm)
        self.register_buffer("choice", torch.tensor([self.groups.index(w) for w in widths]), persistent=False)
        self.choice: torch.Tensor
        self.fields = [[f for f, w in enumerate(widths) if w == group] for group in self.groups]
        order = torch.tensor([f for group in self.fields for f in group]).argsort()
        self.register_buffer("order", order, persistent=False)
        self.order: torch.Tensor
        self.norm = UnifyNorm(len(widths), len(self.groups), width, norm, gain, synchronise)

    def in_place(self, x: Pooled) -> torch.Tensor:
        """The maps, from columns where they lie -> ``[B, F, d_f]``."""
        spans = [Span(s, self.groups.index(w), 0, w) for s, w in zip(x.starts, x.widths, strict=True)]
        return field_linear(x.values, spans, list(self.weights), self.bias)

    def batched(self, x: Pooled) -> torch.Tensor:
        """The same with a product per width, not per field: fewer launches on a GPU."""
        parts = [x.stack(f) @ w + b for f, w, b in zip(self.fields, self.weights, self.bias, strict=True)]
        return torch.cat(parts)[self.order].transpose(0, 1)

    def forward(self, x: Pooled) -> torch.Tensor:
        """Pooled embeddings -> ``[B, F, d_f]``, kept fields in schema order."""
        u = self.in_place(x) if x.values.device.type == "cpu" else self.batched(x)
        return self.norm(u.transpose(0, 1), self.choice)


class NoUnify(nn.Module):
    """All widths equal: the embeddings go to the backbone as they are."""

    def forward(self, x: Pooled) -> torch.Tensor:
        return x.stack().transpose(0, 1)
