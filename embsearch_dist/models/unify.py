"""The transform of mixed widths to one common width d_f (AdaS&S Eq. 7), shared over fields.

Every candidate width has one linear map and one BatchNorm; all fields of that width use them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from embsearch_dist.models.norm import UnifyNorm


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

    The weight of candidate j is stored at the full table width with zero rows outside its columns.
    Multiplying by it reads just those columns, and the gradient of all others is exactly zero: no mask
    is ever multiplied into ``[F, B, width]`` activations and no column is sliced (slicing per field is
    10 to 27 times slower in backward).
    """

    def __init__(self, fields: int, mask: torch.Tensor, width: int, norm: str, gain: float, synchronise: bool) -> None:
        """``mask [T, table width]``: 1 where a column belongs to the candidate."""
        super().__init__()
        self.register_buffer("mask", mask.clone(), persistent=False)
        self.mask: torch.Tensor
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

    def forward(self, x: torch.Tensor, choice: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """One subnet: ``choice [F]`` int64 and ``keep [F]`` bool -> ``[B, F, d_f]``; dropped fields are zero."""
        keep = keep & self.present[choice]
        u = self.norm(self.linear(x, choice), choice, keep)
        return u * keep.to(u.dtype)[:, None]


class MixedUnify(nn.Module):
    """One map per width of an allocation; each field keeps its own for good."""

    def __init__(
        self,
        groups: Sequence[tuple[int, int]],
        order: Sequence[int],
        width: int,
        norm: str,
        gain: float,
        synchronise: bool,
    ) -> None:
        """``groups``: (nominal width, number of fields); ``order[k]``: place of schema field k among the groups."""
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(initial_map(w, width)) for w, _ in groups)
        self.bias = initial_bias(len(groups), width, norm)
        choice = [g for g, (_, n) in enumerate(groups) for _ in range(n)]
        self.register_buffer("choice", torch.tensor(choice)[list(order)], persistent=False)
        self.choice: torch.Tensor
        self.register_buffer("order", torch.tensor(list(order)), persistent=False)
        self.order: torch.Tensor
        self.sorted = list(order) == sorted(order)
        self.norm = UnifyNorm(len(choice), len(groups), width, norm, gain, synchronise)

    def forward(self, groups: Sequence[torch.Tensor]) -> torch.Tensor:
        """Per width ``[fields, B, w]`` -> ``[B, F, d_f]``, kept fields in schema order."""
        parts = [x @ w + b for x, w, b in zip(groups, self.weights, self.bias, strict=True)]
        u = torch.cat(parts)
        return self.norm(u if self.sorted else u[self.order], self.choice)


class NoUnify(nn.Module):
    """All widths equal: the embeddings go to the backbone as they are."""

    def forward(self, groups: Sequence[torch.Tensor]) -> torch.Tensor:
        (only,) = groups
        return only.transpose(0, 1)
