"""The transform of mixed widths to one common width (AdaS&S Eq. 7); ``model.transform`` says which.

* ``width``: a linear map per width, shared by the fields, to ``model.unified_width`` (Eq. 7 as printed).
* ``field``: a linear map per field and width.
* ``mlp``: a linear map per width and a layer behind a ReLU ("MLP layers", section 3.1): :class:`Residual`.
* ``identity``: nothing is learned; zeros fill every embedding up to the widest width.

A BatchNorm may follow (``model.norm``), whose scale and shift belong to the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from embsearch_dist.models.norm import UnifyNorm
from embsearch_dist.models.pooled import Move, Pooled, Span, field_linear, moved


def initial_map(width: int, common: int) -> torch.Tensor:
    """Start of a linear map ``[width, common]``: column k of the embedding goes to place k of the common space.

    The transform then begins as no transform, and fields of different widths meet in their leading columns;
    a random start cost 0.001 AUC on MovieLens-1M (docs/results/search.md). Columns past d_f wrap around.
    """
    weight = torch.zeros(width, common)
    rows = torch.arange(width)
    weight[rows, rows % common] = min(1.0, (common / max(width, 1)) ** 0.5)
    return weight


def initial_bias(maps: int, width: int, norm: str) -> nn.Parameter:
    """Zeros ``[maps, width]``, fixed under BatchNorm: it takes a bias out again, so its gradient is rounding
    noise, which Adam would scale up to full steps and the running mean would follow late."""
    return nn.Parameter(torch.zeros(maps, width), requires_grad=norm == "none")


class Residual(nn.Module):
    """``u + relu(u + a_j) B_j`` of candidate j: the MLP behind a linear map.

    B starts at zero, so that the whole transform begins as the linear map does, as no transform. It has a gradient
    from the first step on, as half of the ReLUs are open; a has one as soon as B is not zero.
    """

    def __init__(self, candidates: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(candidates, width, width))
        self.bias = nn.Parameter(torch.zeros(candidates, width))

    def forward(self, u: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """``u [F, B, d]``, ``choice [F]`` -> ``[F, B, d]``."""
        return torch.baddbmm(u, torch.relu(u + self.bias[choice][:, None]), self.weight[choice])


def leading(counts: Sequence[int], width: int) -> torch.Tensor:
    """``[len(counts), width]``: ones in the first ``counts[j]`` places of row j."""
    return (torch.arange(width) < torch.tensor(counts)[:, None]).float()


class SupernetUnify(nn.Module):
    """The transforms of T candidates over the columns of a max-table, chosen per field at every step.

    The weight of candidate j is stored at the full table width with zero rows outside its columns, and the
    gradient of all other columns is exactly zero. On CPU only the candidate's columns are read (what a step
    costs follows the widths it drew). On a GPU one batched product over the full width needs fewer launches.
    """

    def __init__(
        self,
        fields: int,
        mask: torch.Tensor,
        width: int,
        norm: str,
        gain: float,
        synchronise: bool,
        transform: str = "width",
    ) -> None:
        """``mask [T, table width]``: 1 where a column belongs to the candidate. ``width``: the common one; under
        ``identity`` no candidate may be wider."""
        super().__init__()
        self.transform, self.width = transform, width
        self.register_buffer("mask", mask.clone(), persistent=False)
        self.mask: torch.Tensor
        # First column and number of columns of each candidate: they are neighbours.
        self.columns = [(int(m.argmax()), int(m.sum())) for m in mask]
        candidates, columns = mask.shape
        if transform == "identity":
            lead = leading([count for _, count in self.columns], width)
            self.register_buffer("lead", lead, persistent=False)
            self.lead: torch.Tensor
            firsts = torch.tensor([first for first, _ in self.columns])[:, None]
            # Where places past the candidate's columns read is of no matter: they are multiplied by zero.
            source = (firsts + torch.arange(width)).clamp(max=columns - 1)
            self.register_buffer("source", source, persistent=False)
            self.source: torch.Tensor
        else:
            weight = torch.zeros(candidates, columns, width)
            for j in range(candidates):
                own = mask[j] > 0
                weight[j, own] = initial_map(int(own.sum()), width)
            copies = fields if transform == "field" else 1
            self.weight = nn.Parameter(weight.repeat(copies, 1, 1))
            self.bias = initial_bias(copies * candidates, width, norm)
        self.after = Residual(candidates, width) if transform == "mlp" else None
        # Number of the first map of each field.
        of_field = torch.arange(fields) * (candidates if transform == "field" else 0)
        self.register_buffer("first_map", of_field, persistent=False)
        self.first_map: torch.Tensor
        self.register_buffer("present", (mask.sum(1) > 0), persistent=False)
        self.present: torch.Tensor
        self.norm = UnifyNorm(fields, candidates, width, norm, gain, synchronise)

    def mapped(self, x: torch.Tensor, choice: torch.Tensor, fields: Sequence[int] | None = None) -> torch.Tensor:
        """``x [F, B, table width]``, ``choice [F]`` -> ``[F, B, d]`` before normalisation.

        ``fields``: which ones ``x`` and ``choice`` are of; all by default."""
        if self.transform == "identity":
            if all(first == 0 for first, _ in self.columns):
                u = x[..., : self.width]
            else:
                u = x.gather(2, self.source[choice][:, None].expand(-1, x.shape[1], -1))
            return u * self.lead[choice][:, None]
        own = (self.first_map if fields is None else self.first_map[list(fields)]) + choice
        weight = self.weight[own] * self.mask[choice][..., None]
        u = torch.baddbmm(self.bias[own][:, None], x, weight)
        return u if self.after is None else self.after(u, choice)

    def in_place(self, x: Pooled, choice: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """As :meth:`mapped`, from columns where they lie -> ``[B, F, d]``; only fields that are kept count.

        A field of a candidate without columns must not be kept."""
        chosen = list(zip(x.starts, choice.tolist(), keep.tolist(), strict=True))
        if self.transform == "identity":
            d = self.width
            moves = [
                Move(s + self.columns[j][0], f * d, self.columns[j][1]) for f, (s, j, kept) in enumerate(chosen) if kept
            ]
            return moved(x.values, moves, len(chosen) * d).unflatten(1, (len(chosen), d))
        spans: list[Span | None] = []
        for (start, j, kept), base in zip(chosen, self.first_map.tolist(), strict=True):
            first, count = self.columns[j]
            spans.append(Span(start + first, base + j, first, count) if kept else None)
        u = field_linear(x.values, spans, self.weight.unbind(0), self.bias)
        return u if self.after is None else self.after(u.transpose(0, 1), choice).transpose(0, 1)

    def forward(self, x: Pooled | torch.Tensor, choice: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """One subnet: ``choice [F]`` int64 and ``keep [F]`` bool -> ``[B, F, d]``; dropped fields are zero.

        ``x``: the pooled max-tables, or ``[F, B, table width]``.
        """
        keep = keep & self.present[choice]
        if isinstance(x, Pooled) and x.values.device.type == "cpu":
            u = self.in_place(x, choice, keep)
            if self.norm.kind == "none" and self.after is None:
                return u
            u = u.transpose(0, 1)
        else:
            u = self.mapped(x.stack() if isinstance(x, Pooled) else x, choice)
        return self.filled(self.norm(u, choice, keep), choice) * keep.to(u.dtype)[:, None]

    def filled(self, u: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]`` behind the norm, whose shift would make columns of what only fills up: they stay zero."""
        return u * self.lead[choice] if self.transform == "identity" and self.norm.kind != "none" else u


class MixedUnify(nn.Module):
    """The learned transforms of one allocation: a map per width, or per field; each field keeps its own for good."""

    def __init__(
        self, widths: Sequence[int], width: int, norm: str, gain: float, synchronise: bool, transform: str = "width"
    ) -> None:
        """``widths``: nominal width of each kept field, in schema order."""
        super().__init__()
        self.transform, self.widths = transform, list(widths)
        self.groups = sorted(set(widths))
        choice = [self.groups.index(w) for w in widths]
        maps = self.widths if transform == "field" else self.groups
        self.maps = list(range(len(widths))) if transform == "field" else choice
        self.weights = nn.ParameterList(nn.Parameter(initial_map(w, width)) for w in maps)
        self.bias = initial_bias(len(maps), width, norm)
        self.after = Residual(len(self.groups), width) if transform == "mlp" else None
        self.register_buffer("choice", torch.tensor(choice), persistent=False)
        self.choice: torch.Tensor
        self.fields = [[f for f, w in enumerate(widths) if w == group] for group in self.groups]
        order = torch.tensor([f for group in self.fields for f in group]).argsort()
        self.register_buffer("order", order, persistent=False)
        self.order: torch.Tensor
        self.norm = UnifyNorm(len(widths), len(self.groups), width, norm, gain, synchronise)

    def map_of(self, field: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Linear map ``[w, d]`` and bias ``[d]`` of the ``field``-th kept field."""
        return self.weights[self.maps[field]], self.bias[self.maps[field]]

    @property
    def products(self) -> int:
        """Multiply-adds of a row."""
        d = self.bias.shape[1]
        return sum(self.widths) * d + (len(self.widths) * d * d if self.after is not None else 0)

    def in_place(self, x: Pooled) -> torch.Tensor:
        """The maps, from columns where they lie -> ``[B, F, d]``."""
        spans = [Span(s, m, 0, w) for s, m, w in zip(x.starts, self.maps, x.widths, strict=True)]
        return field_linear(x.values, spans, list(self.weights), self.bias)

    def batched(self, x: Pooled) -> torch.Tensor:
        """The same with a product per width, not per field: fewer launches on a GPU."""
        parts = []
        for fields in self.fields:
            own = [self.maps[f] for f in fields]
            if self.transform == "field":
                weight, bias = torch.stack([self.weights[m] for m in own]), self.bias[own][:, None]
            else:
                weight, bias = self.weights[own[0]], self.bias[own[0]]
            parts.append(x.stack(fields) @ weight + bias)
        return torch.cat(parts)[self.order].transpose(0, 1)

    def forward(self, x: Pooled) -> torch.Tensor:
        """Pooled embeddings -> ``[B, F, d_f]``, kept fields in schema order."""
        u = self.in_place(x) if x.values.device.type == "cpu" else self.batched(x)
        u = u.transpose(0, 1)
        return self.norm(u if self.after is None else self.after(u, self.choice), self.choice)


class MixedIdentity(nn.Module):
    """The embeddings of one allocation as they are, filled up with zeros where a backbone wants one width.

    Attributes:
        width: the widest width.
    """

    def __init__(
        self, widths: Sequence[int], norm: str, gain: float, synchronise: bool, side_by_side: bool = False
    ) -> None:
        """``widths``: nominal width of each kept field, in schema order. ``side_by_side``: fill nothing up."""
        super().__init__()
        self.widths, self.width, self.side_by_side = list(widths), max(widths), side_by_side
        groups = sorted(set(widths))
        self.register_buffer("choice", torch.tensor([groups.index(w) for w in widths]), persistent=False)
        self.choice: torch.Tensor
        self.register_buffer("lead", leading(self.widths, self.width), persistent=False)
        self.lead: torch.Tensor
        self.norm = UnifyNorm(len(widths), len(groups), self.width, norm, gain, synchronise)

    def forward(self, x: Pooled) -> torch.Tensor:
        """Pooled embeddings -> ``[B, F, widest]``, or ``[B, sum of widths]``; kept fields in schema order."""
        count, d = len(self.widths), self.width
        flat, padded = list(accumulate(self.widths, initial=0)), [f * d for f in range(count)]
        plain = self.norm.kind == "none"
        target = flat if plain and self.side_by_side else padded
        moves = [Move(*place) for place in zip(x.starts, target, x.widths, strict=False)]
        u = moved(x.values, moves, flat[-1] if target is flat else count * d)
        if not plain:
            u = (self.norm(u.unflatten(1, (count, d)).transpose(0, 1), self.choice) * self.lead).flatten(1)
            if self.side_by_side:
                u = moved(u, [Move(*place) for place in zip(padded, flat, self.widths, strict=False)], flat[-1])
        return u if self.side_by_side else u.unflatten(1, (count, d))


class NoUnify(nn.Module):
    """All widths equal: the embeddings go to the backbone as they are."""

    def forward(self, x: Pooled) -> torch.Tensor:
        return x.stack().transpose(0, 1)
