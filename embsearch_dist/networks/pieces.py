"""The slices of a network as one vector: cut out of the vector of all weights, and written back to it, in a few steps.

A network uses a hundred weights and more, each a slice with up to a handful of column ranges. Copied one by one they
would take a GPU longer to start than to copy, so their numbers lie side by side in one vector; what an optimizer, a
check or an exchange does to all of them it does once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from embsearch_dist.networks.slices import Slice

LINE = 16  # float32 numbers in a cache line


@dataclass(frozen=True)
class Place:
    """Where a weight lies in a vector: its first number, and the numbers from one of its rows to the next."""

    start: int
    stride: int


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Of whole weights laid side by side in this order."""
    starts = accumulate((math.prod(s) for s in shapes.values()), initial=0)
    return {n: Place(start, shape[-1]) for (n, shape), start in zip(shapes.items(), starts, strict=False)}


@dataclass(frozen=True)
class _Piece:
    """A rectangle of numbers: where it starts in either vector, and how far its rows lie apart there."""

    outer: int
    outer_stride: int
    inner: int
    inner_stride: int
    rows: int
    columns: int


class Pieces:
    """Where the slices of a network lie in a vector of whole weights, and in one that holds nothing else.

    Attributes:
        slices: name -> slice, in the order of the inner vector.
        size: numbers of the inner vector.

    Args:
        slices: name -> slice of what the network uses.
        outer: name -> place of the whole weight in the outer vector.
    """

    def __init__(self, slices: Mapping[str, Slice], outer: Mapping[str, Place]) -> None:
        # Sizes that fill cache lines come first: so nearly all weights begin with one, which products run faster on.
        order = sorted(slices, key=lambda n: slices[n].size % LINE != 0)
        self.slices = {n: slices[n] for n in order}
        self._sizes = [s.size for s in self.slices.values()]
        self._outer = outer
        self.size = sum(self._sizes)
        self._index: torch.Tensor | None = None

    @cached_property
    def places(self) -> dict[str, Place]:
        """Of the slices in the inner vector."""
        return places({n: s.shape for n, s in self.slices.items()})

    def take(self, outer: torch.Tensor) -> torch.Tensor:
        """The inner vector ``[size]``, a copy."""
        if outer.device.type != "cpu":
            return outer.index_select(0, self.numbers(outer.device))
        inner = outer.new_empty(self.size)
        theirs, own = self._views(outer, inner)
        torch._foreach_copy_(own, theirs)
        return inner

    def put(self, outer: torch.Tensor, inner: torch.Tensor) -> None:
        """Write an inner vector back."""
        if outer.device.type != "cpu":
            outer.index_copy_(0, self.numbers(outer.device), inner)
        else:
            theirs, own = self._views(outer, inner)
            torch._foreach_copy_(theirs, own)

    def named(self, inner: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> slice, a view of an inner vector. Gradients of all of them come back to it in one piece."""
        parts = zip(self.slices.items(), self.split(inner), strict=True)
        return {n: part if s.columns is None else part.view(s.shape) for (n, s), part in parts}

    def split(self, inner: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The slices, each flat: views of an inner vector."""
        return inner.split(self._sizes)

    @cached_property
    def _pieces(self) -> list[_Piece]:
        found = []
        for name, part in self.slices.items():
            whole, own = self._outer[name], self.places[name]
            first, last = part.rows
            if part.columns is None:
                found.append(_Piece(whole.start + first, 0, own.start, 0, 1, last - first))
                continue
            done = own.start
            for a, b in part.columns:
                start = whole.start + first * whole.stride + a
                found.append(_Piece(start, whole.stride, done, own.stride, last - first, b - a))
                done += b - a
        return found

    def _views(self, outer: torch.Tensor, inner: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The pieces in either vector."""
        a, b = outer.storage_offset(), inner.storage_offset()
        return (
            [outer.as_strided((p.rows, p.columns), (p.outer_stride, 1), a + p.outer) for p in self._pieces],
            [inner.as_strided((p.rows, p.columns), (p.inner_stride, 1), b + p.inner) for p in self._pieces],
        )

    def numbers(self, device: torch.device) -> torch.Tensor:
        """For each number of the inner vector its position in the outer one ``[size]``: how a GPU takes and puts.

        Made on the device, of one small copy that nobody waits for; about 80 bytes a number while it is made.
        Number i of all pieces in turn, in row r of its piece, lies at ``i + shift + r gap`` in either vector.
        """
        if self._index is None:
            ends = list(accumulate(p.rows * p.columns for p in self._pieces))
            starts = [0, *ends[:-1]]
            shifts = [
                [p.outer - s for p, s in zip(self._pieces, starts)],
                [p.inner - s for p, s in zip(self._pieces, starts)],
            ]
            gaps = [
                [p.outer_stride - p.columns for p in self._pieces],
                [p.inner_stride - p.columns for p in self._pieces],
            ]
            table = torch.tensor([ends, starts, [p.columns for p in self._pieces], *shifts, *gaps])
            if device.type == "cuda":
                table = table.pin_memory()
            table = table.to(device, non_blocking=True)
            i = torch.arange(self.size, device=device)
            of_piece = table[1:].index_select(1, torch.searchsorted(table[0], i, right=True))
            row = (i - of_piece[0]).div_(of_piece[1], rounding_mode="floor")
            outer, inner = torch.addcmul(of_piece[2:4] + i, of_piece[4:], row).unbind()
            self._index = torch.empty_like(i).scatter_(0, inner, outer)
        return self._index
