"""What a subnet is added up from: the terms of its (field, candidate) pairs, and what they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.models.backbones.additive import Backbone

STATES = 2  # subnets whose sums are kept for others that differ little


@dataclass
class Terms:
    """Terms of some fields for some chunks of rows. Blocks are the (field, candidate) pairs, the last one the dense
    columns'. Chunk by chunk in memory: with whole columns side by side the blocks of a chunk would lie megabytes
    apart, in the same few lines of every cache.

    Attributes:
        number: ``[chunks, blocks, chunk rows]`` float32, linear part less half the square of u.
        u: ``[chunks, blocks, chunk rows * d]`` float32, unified embeddings; no columns without an FM part.
        first: ``[chunks, blocks, chunk rows * width]``, shares in the first layer.
    """

    number: torch.Tensor
    u: torch.Tensor
    first: torch.Tensor

    def part(self, chunks: int) -> Terms:
        """The first chunks, in the same memory."""
        return Terms(*(x[:chunks] for x in vars(self).values()))


@dataclass
class Sums:
    """Terms added up to subnets: the same three, ``[subnets or chunks, ...]``."""

    number: torch.Tensor
    u: torch.Tensor
    first: torch.Tensor


def slices(count: int, size: int) -> Iterator[slice]:
    """``0..count`` in parts of ``size``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def add_up(terms: Terms, chunk: int, blocks: torch.Tensor, offsets: torch.Tensor) -> Sums:
    """Sums of the given blocks of a chunk, a bag from each offset on."""
    return Sums(
        *(
            functional.embedding_bag(blocks, x[chunk], offsets, mode="sum")
            if x.shape[2]
            else x.new_zeros(len(offsets), 0)
            for x in (terms.number, terms.u, terms.first)
        )
    )


def difference(terms: Terms, chunk: int, new: torch.Tensor, old: torch.Tensor, offsets: torch.Tensor) -> Sums:
    """Sums of the new blocks less those of the old ones."""
    plus, minus = (vars(add_up(terms, chunk, x, offsets)).values() for x in (new, old))
    return Sums(*(a - b for a, b in zip(plus, minus, strict=True)))


def plus(state: Sums, chunk: int, change: Sums, dtype: torch.dtype) -> Sums:
    """A subnet's sums of one chunk and changes ``[K, ...]`` to it, added; first layers in ``dtype``."""
    first = (state.first[chunk] + change.first).to(dtype)
    return Sums(state.number[chunk] + change.number, state.u[chunk] + change.u, first)


def chunked(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``[n, ...]`` -> ``[chunks, rows * ...]``, filled up with zeros."""
    missing = -len(x) % rows
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)).reshape(-1, rows * x[0].numel())


def term_bytes(fields: int, candidates: int, backbone: Backbone, precision: str) -> int:
    """Bytes that the terms of one row take."""
    of_block = 4 + 4 * backbone.width * backbone.fm + getattr(torch, precision).itemsize * backbone.first_width
    return (fields * candidates + 1) * of_block


def sample_rows(rows: int, wanted: int, fields: int, table_width: int, backbone: nn.Module, cache_mb: int) -> int:
    """Rows of the sample: as wanted, unless pooled rows and, of additive backbones, the sums of :data:`STATES` subnets
    would take more than ``cache_mb`` MiB."""
    sums = 0
    if isinstance(backbone, Backbone):
        sums = 4 * (1 + backbone.width * backbone.fm + backbone.first_width)
    row = 4 * (fields * table_width + 1) + STATES * sums
    return max(1, min(rows, wanted, (cache_mb << 20) // row))
