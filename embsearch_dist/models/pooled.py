"""Pooled embeddings of a batch as TorchRec leaves them, and the linear maps that read them in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # what serves a model goes without TorchRec
    from torchrec import KeyedTensor


@dataclass(frozen=True)
class Pooled:
    """All fields of a batch side by side, in whatever order the sharding plan has put them.

    Attributes:
        values: ``[B, C]``.
        starts: first column of each field, fields in schema order.
        widths: columns of each field that count; a table may be padded to a wider physical width.
        weights: column of each field's first-order weight; empty where values have none of their own.
    """

    values: torch.Tensor
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    weights: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, pooled: KeyedTensor, names: Sequence[str], widths: Sequence[int], weights: Sequence[int] = ()
    ) -> Pooled:
        """The fields ``names``, found by name: the key order of a KeyedTensor depends on the plan.

        ``weights``: where the first-order weight lies in each field's table.
        """
        offsets = dict(zip(pooled.keys(), pooled.offset_per_key(), strict=False))
        starts = tuple(offsets[n] for n in names)
        own = tuple(s + w for s, w in zip(starts, weights, strict=True)) if weights else ()
        return cls(pooled.values(), starts, tuple(widths), own)

    def first_order(self) -> torch.Tensor:
        """Every field's first-order weight ``[B, F]``."""
        return self.values.index_select(1, _places(self.weights, self.values.device))

    def used(self) -> list[torch.Tensor]:
        """Views ``[B, n]`` of all columns that count, as few as possible."""
        runs: list[list[int]] = []
        own = [(start, 1) for start in self.weights]
        for start, width in sorted([*zip(self.starts, self.widths, strict=True), *own]):
            if runs and runs[-1][1] == start:
                runs[-1][1] += width
            else:
                runs.append([start, start + width])
        return [self.values[:, start:stop] for start, stop in runs]

    def stack(self, fields: Sequence[int] | None = None) -> torch.Tensor:
        """Fields of one width (all by default) as ``[n, B, width]``: a view where they lie in order without
        padding, else a copy."""
        chosen = range(len(self.starts)) if fields is None else fields
        starts, width = [self.starts[f] for f in chosen], self.widths[chosen[0]]
        if all(b - a == width for a, b in zip(starts, starts[1:], strict=False)):
            whole = self.values[:, starts[0] : starts[0] + width * len(starts)]
            return whole.unflatten(1, (len(starts), width)).transpose(0, 1)
        made: torch.Tensor = _Arrange.apply(self.values, starts, width)
        return made.transpose(0, 1)


class _Arrange(torch.autograd.Function):
    """Columns ``[starts[k], starts[k] + width)`` of ``[B, C]`` -> ``[B, n, width]``. Slices under autograd would make
    a whole zero matrix each in backward: 60 ms of a step of 160 with 39 fields."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, starts: Sequence[int], width: int) -> torch.Tensor:
        ctx.starts, ctx.width, ctx.columns = starts, width, values.shape[1]
        return torch.cat([values[:, s : s + width] for s in starts], 1).unflatten(1, (len(starts), width))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out = gradients[0].new_zeros(len(gradients[0]), ctx.columns)
        for k, s in enumerate(ctx.starts):
            out[:, s : s + ctx.width] = gradients[0][:, k]
        return out, None, None


@cache
def _places(columns: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Column numbers on a device: made there once, not copied to it in every step."""
    return torch.tensor(columns, device=device)


@dataclass(frozen=True)
class Move:
    """``count`` columns from ``source`` on, which come to lie at ``target``."""

    source: int
    target: int
    count: int


class _Moved(torch.autograd.Function):
    """See :func:`moved`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, moves: Sequence[Move], columns: int) -> torch.Tensor:
        ctx.moves, ctx.columns = moves, values.shape[1]
        return _copy(values, moves, columns)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back = [Move(m.target, m.source, m.count) for m in ctx.moves]
        return _copy(gradients[0], back, ctx.columns), None, None


def _copy(values: torch.Tensor, moves: Sequence[Move], columns: int) -> torch.Tensor:
    """One ``cat``, on a GPU one launch for many fields, of slices and of the zeros between them."""
    parts, at = [], 0
    gaps = values.new_zeros(1, 1).expand(values.shape[0], columns)
    for move in sorted(moves, key=lambda m: m.target):
        if move.target > at:
            parts.append(gaps[:, at : move.target])
        parts.append(values[:, move.source : move.source + move.count])
        at = move.target + move.count
    if at < columns:
        parts.append(gaps[:, at:])
    return torch.cat(parts, 1)


def moved(values: torch.Tensor, moves: Sequence[Move], columns: int) -> torch.Tensor:
    """Columns of ``values [B, C]`` at other places of ``[B, columns]``, zeros everywhere else.

    No two moves share a column, neither where they read nor where they write.
    """
    made: torch.Tensor = _Moved.apply(values, tuple(moves), columns)
    return made


@dataclass(frozen=True)
class Span:
    """Which columns a map reads and which rows of its weight it uses."""

    column: int
    map: int
    row: int
    width: int


class _FieldLinear(torch.autograd.Function):
    """See :func:`field_linear`. Each product reads and writes its columns in place; autograd over slices would
    fill a whole zero matrix for every field in backward, and batched products copy both operands."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, spans: Sequence[Span | None], bias: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.spans = spans
        ctx.save_for_backward(values, *weights)
        ctx.bias_shape = bias.shape
        out = values.new_empty(values.shape[0], len(spans), bias.shape[1])
        for f, s in enumerate(spans):
            if s is None:
                out[:, f].zero_()
            else:
                part, weight = values[:, s.column : s.column + s.width], weights[s.map][s.row : s.row + s.width]
                torch.addmm(bias[s.map], part, weight, out=out[:, f])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, *weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_values = torch.zeros_like(values) if ctx.needs_input_grad[0] else None
        to_weights = [torch.zeros_like(w) for w in weights]
        to_bias = values.new_zeros(ctx.bias_shape)
        sums = gradient.sum(0)
        for f, s in enumerate(ctx.spans):
            if s is None:
                continue
            columns, rows = slice(s.column, s.column + s.width), slice(s.row, s.row + s.width)
            if to_values is not None:
                torch.mm(gradient[:, f], weights[s.map][rows].T, out=to_values[:, columns])
            to_weights[s.map][rows].addmm_(values[:, columns].T, gradient[:, f])
            to_bias[s.map] += sums[f]
        return to_values, None, to_bias if ctx.needs_input_grad[2] else None, *to_weights


def field_linear(
    values: torch.Tensor, spans: Sequence[Span | None], weights: Sequence[torch.Tensor], bias: torch.Tensor
) -> torch.Tensor:
    """A linear map per field over its own columns, maps shared by fields.

    Args:
        values: ``[B, C]``.
        spans: one per field; None gives zeros.
        weights: per map ``[rows, d]``.
        bias: ``[maps, d]``.

    Returns:
        ``[B, fields, d]``, contiguous.
    """
    made: torch.Tensor = _FieldLinear.apply(values, tuple(spans), bias, *weights)
    return made
