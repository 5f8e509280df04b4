"""Adam that moves only the rows that a step looked up, by FBGEMM's formula:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

t counts the steps of the whole training, not those of a row; g is the sum over all look-ups of the row in the global
batch. With ``elements``, for tables of which a step reads some columns alone, an element whose g is exactly zero is
left as it is, moments included: so is every column that no row of the batch has read.

``adam.c`` computes it on CPU; :func:`update_by_torch` without a compiler and on GPUs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from embsearch_dist import compiled

VERSION = 1
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
FEW = 4096  # look-ups that are not worth a second thread


class Numbers(ctypes.Structure):
    """What the formula needs beside tensors, for one step; the layout is that of ``adam.c``."""

    _fields_ = (
        ("beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("rest1", ctypes.c_float),
        ("rest2", ctypes.c_float),
        ("rate", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("elements", ctypes.c_int32),
    )
    beta1: float
    beta2: float
    rest1: float
    rest2: float
    rate: float
    scale: float
    eps: float
    elements: int


def numbers(step: int, lr: float, elements: bool) -> Numbers:
    """The numbers of step t, counted from 1."""
    rate, scale = lr / (1 - BETA1**step), 1 / math.sqrt(1 - BETA2**step)
    return Numbers(BETA1, BETA2, 1 - BETA1, 1 - BETA2, rate, scale, EPS, elements)


def moved(
    w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, g: torch.Tensor, n: Numbers, moves: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New weights and moments ``[rows, width]`` for the summed gradient ``g``.

    Args:
        moves: ``[rows, 1]`` bool, the rows that were looked up; None: all of them.
    """
    first = n.beta1 * m + n.rest1 * g
    second = n.beta2 * v + n.rest2 * g * g
    to = w - n.rate * first / (second.sqrt() * n.scale + n.eps)
    if n.elements:
        moves = g != 0
    if moves is None:
        return to, first, second
    return torch.where(moves, to, w), torch.where(moves, first, m), torch.where(moves, second, v)


@dataclass(frozen=True)
class Layout:
    """Tables side by side in flat storage, and their columns in the pooled embeddings."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    places: tuple[int, ...]
    """First element of each table in the storage."""

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First column of each table in the pooled embeddings."""
        return tuple(int(n) for n in np.cumsum([0, *self.widths[:-1]]))

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        """Heights, widths, places and starts for the kernel."""
        return [np.array(x, dtype=np.int64) for x in (self.heights, self.widths, self.places, self.starts)]

    def blocks(self) -> list[tuple[int, int]]:
        """Runs ``[first, last)`` of neighbours with one width: together they are one matrix."""
        found: list[tuple[int, int]] = []
        for t, width in enumerate(self.widths):
            follows = t > 0 and self.places[t] == self.places[t - 1] + self.heights[t - 1] * self.widths[t - 1]
            if follows and width == self.widths[t - 1]:
                found[-1] = (found[-1][0], t + 1)
            else:
                found.append((t, t + 1))
        return found


@dataclass(frozen=True)
class Bags:
    """The look-ups of a batch: bag b of table t holds ``ids[offsets[t * B + b]]`` to ``ids[offsets[t * B + b + 1]]``.

    Attributes:
        ids: ``[L]`` int64, rows of the table.
        offsets: ``[T * B + 1]`` int64.
        weights: ``[L]`` float32, what each row is multiplied with before rows are added; None: 1.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None


Storage = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Weights and both moments, flat float32 of one layout."""


def update(storage: Storage, layout: Layout, bags: Bags, gradient: torch.Tensor, n: Numbers) -> None:
    """Apply one step in place.

    Args:
        gradient: ``[B, sum of widths]`` of the pooled embeddings.
    """
    if not bags.ids.numel():
        return
    if gradient.device.type == "cpu" and kernel() is not None:
        update_by_kernel(storage, layout, bags, gradient, n)
    else:
        update_by_torch(storage, layout, bags, gradient, n)


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where it was not built, or was built from another version of its source."""
    found = compiled.load("adam", VERSION)
    if found is not None:
        pointer, long = ctypes.c_void_p, ctypes.c_long
        numbers = ctypes.POINTER(Numbers)
        found.adam_update.argtypes = [long, long, pointer, long, *[pointer] * 10, numbers]
    return found


def update_by_kernel(storage: Storage, layout: Layout, bags: Bags, gradient: torch.Tensor, n: Numbers) -> None:
    """:func:`update` on CPU; tables are shared out over torch's threads, which changes no bit."""
    library = kernel()
    assert library is not None
    gradient = gradient.float().contiguous()
    ids, offsets = bags.ids.long().contiguous(), bags.offsets.long().contiguous()
    weights = None if bags.weights is None else bags.weights.float().contiguous()
    tables, rows = len(layout.widths), len(gradient)
    heights, widths, places, starts = layout.arrays

    def part(first: int, last: int) -> None:
        failed = library.adam_update(
            last - first,
            rows,
            gradient.data_ptr(),
            gradient.shape[1],
            starts[first:].ctypes.data,
            offsets.data_ptr() + 8 * first * rows,
            ids.data_ptr(),
            None if weights is None else weights.data_ptr(),
            heights[first:].ctypes.data,
            widths[first:].ctypes.data,
            places[first:].ctypes.data,
            *(t.data_ptr() for t in storage),
            ctypes.byref(n),
        )
        if failed:
            raise MemoryError(f"no memory to add up the gradients of {len(ids):,} look-ups")

    threads = min(torch.get_num_threads(), tables) if len(ids) >= FEW else 1
    if threads == 1:
        part(0, tables)
        return
    before = offsets[::rows].numpy()  # look-ups before each table
    cuts = np.searchsorted(before, np.linspace(0, before[-1], threads + 1)[1:-1])
    ends = [0, *cuts.tolist(), tables]
    list(compiled.pool(threads).map(part, ends[:-1], ends[1:]))


def update_by_torch(storage: Storage, layout: Layout, bags: Bags, gradient: torch.Tensor, n: Numbers) -> None:
    """:func:`update` in torch's operators, without a look at the device where all tables have one width.

    Look-ups are sorted by row and each run of equal ones is added up in that order, not by atomic additions: so a GPU
    gives the same bits every time. All look-ups of a row then compute and write the same values.
    """
    rows, starts, blocks = len(gradient), layout.starts, layout.blocks()
    for first, last in blocks:
        width, count = layout.widths[first], last - first
        offsets, chosen = bags.offsets[first * rows : last * rows + 1], slice(None)
        if len(blocks) > 1:
            chosen = slice(int(offsets[0]), int(offsets[-1]))
        ids = bags.ids[chosen].long()
        if not len(ids):
            continue
        bag = torch.repeat_interleave(offsets.diff(), output_size=len(ids))
        table, sample = bag // rows, bag % rows
        row, order = (ids + _bases(layout.heights[first:last], ids.device)[table]).sort(stable=True)
        columns = gradient[:, starts[first] : starts[first] + count * width]
        g = columns.view(rows, count, width)[sample[order], table[order]]
        if bags.weights is not None:
            g = g * bags.weights[chosen][order][:, None]
        g = _sum_equal(row, g)
        begin, end = layout.places[first], layout.places[last - 1] + layout.heights[last - 1] * width
        w, m, v = (t[begin:end].view(-1, width) for t in storage)
        for part, value in zip((w, m, v), moved(w[row], m[row], v[row], g, n), strict=True):
            part[row] = value


def _sum_equal(row: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``g [L, width]`` of ascending ``row [L]`` -> for each the sum over all equal ones."""
    begins = torch.ones_like(row)
    begins[1:] = row[1:] != row[:-1]
    segment = begins.cumsum(0) - 1
    lengths = torch.zeros_like(row).scatter_add_(0, segment, torch.ones_like(row))
    return torch.segment_reduce(g, "sum", lengths=lengths, unsafe=True, initial=0)[segment]


@cache
def _bases(heights: Sequence[int], device: torch.device) -> torch.Tensor:
    """First row of each table when their rows are counted through."""
    return torch.tensor(np.cumsum([0, *heights[:-1]]), device=device)
