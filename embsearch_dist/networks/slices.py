"""Which part of a NASRec supernet's weights a network uses: every weight is a slice by operator, source and width.

The supernet holds each operator of each block at its greatest width, with columns for every source that may come
before it. A network is a choice among them: leading rows for the width it chose, the columns of the sources it reads.
Taking only these (instead of computing everything and multiplying by zeros) is what makes a training step cost what
the network costs, and what makes the network compute exactly what it would compute alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from embsearch_dist.networks.architecture import Block
from embsearch_dist.networks.cost import projected_tokens
from embsearch_dist.networks.space import Space, full

Range = tuple[int, int]


@dataclass(frozen=True)
class Slice:
    """One weight of a network within the supernet's weight of that name.

    Attributes:
        rows: ``[start, stop)`` of the first dimension.
        columns: such ranges of the second dimension, laid side by side; None for a vector.
        bound: first values are uniform in [-bound, bound]; 0: they are all ``value``.
        value: see ``bound``.
    """

    rows: Range
    columns: tuple[Range, ...] | None = None
    bound: float = 0.0
    value: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.rows[1] - self.rows[0]
        return (rows,) if self.columns is None else (rows, sum(b - a for a, b in self.columns))

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of that part."""
        part = whole[self.rows[0] : self.rows[1]]
        if self.columns is None:
            return part.clone()
        return torch.cat([part[:, a:b] for a, b in self.columns], 1)

    def put(self, whole: torch.Tensor, values: torch.Tensor) -> None:
        """Write ``values``, shaped as :meth:`take` gives them, back."""
        part = whole[self.rows[0] : self.rows[1]]
        if self.columns is None:
            part.copy_(values)
            return
        start = 0
        for a, b in self.columns:
            part[:, a:b] = values[:, start : start + b - a]
            start += b - a

    def within(self, outer: Slice) -> Slice:
        """The same part, counted from the start of a slice that holds all of it."""
        first = outer.rows[0]
        rows = (self.rows[0] - first, self.rows[1] - first)
        if self.columns is None or outer.columns is None:
            return Slice(rows)
        columns = []
        for a, b in self.columns:
            start = 0
            for c, d in outer.columns:
                if c <= a and b <= d:
                    columns.append((start + a - c, start + b - c))
                start += d - c
        return Slice(rows, tuple(columns))


@dataclass(frozen=True)
class Layout:
    """Where the outputs of the stem and of every block lie in what a block of the supernet reads.

    Args:
        space: operators, widths and blocks.
        columns: dense columns I of the stem; data without any have one column of zeros.
        fields: tokens F of the stem.
    """

    space: Space
    columns: int
    fields: int

    @property
    def dense_max(self) -> int:
        """Dd of the widest block."""
        return max(self.space.dense_widths)

    @property
    def sparse_max(self) -> int:
        """Ns of the widest block, without merged tokens."""
        return max(self.space.sparse_widths)

    def exit_of(self, depth: int) -> int:
        """The place of a network's head among those of all depths: the deepest first. What has fewer blocks than any
        searched network (a canonical form, where some are dead) shares the head of the shallowest."""
        return self.space.blocks - max(depth, self.space.depths[0])

    def dense_range(self, source: int, blocks: Sequence[Block | None]) -> Range:
        """The columns a source's dense output takes in the supernet's weights."""
        if source == 0:
            return 0, self.columns
        start = self.columns + (source - 1) * self.dense_max
        return start, start + self.dense_width(source, blocks)

    def dense_width(self, source: int, blocks: Sequence[Block | None]) -> int:
        return self.columns if source == 0 else _block(blocks, source).dense_width

    def token_range(self, source: int, blocks: Sequence[Block | None]) -> Range:
        """The tokens of a source; those merged into a block's sparse output stand before its own."""
        if source == 0:
            return 0, self.fields
        start = self.fields + (source - 1) * (self.space.tokens + self.sparse_max)
        own = _block(blocks, source)
        skipped = 0 if own.dense_to_sparse else self.space.tokens
        return start + skipped, start + self.space.tokens + own.sparse_width


def slices_of(blocks: Sequence[Block | None], layout: Layout, layer_norm: str = "all") -> dict[str, Slice]:
    """Name -> slice of every weight that a network uses.

    Args:
        blocks: pruned, in their places (:func:`embsearch_dist.networks.canonical.prune`); None for a dead one.
        layer_norm: ``all``, or ``attention``: of the LayerNorms those behind attention's residuals alone.
    """
    found: dict[str, Slice] = {}
    for number, block in enumerate(blocks, 1):
        if block is not None:
            for name, part in _block_slices(block, blocks, layout).items():
                if layer_norm == "all" or not _is_left_out(name):
                    found[f"block{number}_{name}"] = part
    return found | _head_slices(_block(blocks, len(blocks)), layout.exit_of(len(blocks)), layout)


def _head_slices(last: Block, place: int, layout: Layout) -> dict[str, Slice]:
    """Of the head behind a network's last block; ``place`` is its row among the heads of all depths."""
    width = layout.space.width
    first = 0 if last.dense_to_sparse else layout.space.tokens
    read = (first, layout.space.tokens + last.sparse_width)
    bound = math.sqrt(6.0 / (last.dense_width + width * (read[1] - read[0]) + 1))
    return {
        "head_dense": Slice((place, place + 1), ((0, last.dense_width),), bound),
        "head_sparse": Slice((place * width, (place + 1) * width), (read,), bound),
        "head_bias": Slice((place, place + 1)),
    }


def whole(layout: Layout) -> dict[str, Slice]:
    """Every weight of the supernet: what the network with everything in it uses, and a head for every other depth."""
    blocks = full(layout.space).blocks
    heads = [_head_slices(blocks[-1], layout.exit_of(depth), layout) for depth in layout.space.depths]
    bounds = heads[0]
    joined = {n: replace(merged([h[n] for h in heads]), bound=bounds[n].bound) for n in bounds}
    return slices_of(blocks, layout) | joined


def merged(parts: Sequence[Slice]) -> Slice:
    """The smallest slice that holds all of these, of one weight."""
    rows = min(p.rows[0] for p in parts), max(p.rows[1] for p in parts)
    if parts[0].columns is None:
        return Slice(rows)
    joined: list[Range] = []
    for a, b in sorted({c for p in parts for c in p.columns or ()}):
        if joined and a <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(b, joined[-1][1])
        else:
            joined.append((a, b))
    return Slice(rows, tuple(joined))


def initial(part: Slice) -> torch.Tensor:
    """First values: Xavier-uniform for matrices, as in the published code; a constant for the rest."""
    values = torch.empty(part.shape)
    return values.uniform_(-part.bound, part.bound) if part.bound else values.fill_(part.value)


def _block_slices(block: Block, blocks: Sequence[Block | None], layout: Layout) -> dict[str, Slice]:
    space, width = layout.space, layout.space.width
    dense, tokens = block.dense_width, block.sparse_width
    columns = tuple(layout.dense_range(s, blocks) for s in block.dense_sources)
    read = tuple(layout.token_range(s, blocks) for s in block.sparse_sources)
    found: dict[str, Slice] = {}
    if "fc" in block.dense:
        found |= _linear("fc", dense, columns) | _norm("fc", dense)
    if "dot_product" in block.dense:
        k = projected_tokens(dense)
        found |= _linear("dot_dense", width, columns) | _linear("dot_tokens", k, read)
        found |= _linear("dot", dense, ((0, k * (k + 1) // 2),)) | _norm("dot", dense)
    if "gating" in block.dense:
        left = tuple(layout.dense_range(s, blocks) for s in block.left)
        right = tuple(layout.dense_range(s, blocks) for s in block.right)
        found |= _linear("gate", max(b - a for a, b in right), left)
        found |= _linear("gating", dense, right) | _norm("gating", dense)
    if "sum" in block.dense:
        wider = max(layout.dense_width(s, blocks) for s in (*block.left, *block.right))
        found |= _linear("sum", dense, ((0, wider),)) | _norm("sum", dense)
    if "efc" in block.sparse:
        found |= _linear("efc", tokens, read) | _norm("efc", tokens)
    if "attention" in block.sparse:
        found |= _linear("attention", tokens, read) | _norm("attention", tokens)
        whole = ((0, width),)
        found |= _linear("qkv", 3 * width, whole) | _linear("out", width, whole)
        found |= _linear("ffn1", width, whole) | _linear("ffn2", width, whole)
        # Small, as in the published code, so that two residuals do not outweigh the tokens at the start.
        found |= _norm("residual1", width, 0.17) | _norm("residual2", width, 0.17)
    if block.dense_to_sparse:
        found |= _linear("merge", space.tokens * width, ((0, dense),)) | _norm("merge", space.tokens * width)
    if block.fm:
        found |= _linear("fm", dense, ((0, width),)) | _norm("fm", dense)
    return found


def _is_left_out(name: str) -> bool:
    """Whether a weight belongs to a LayerNorm that the published code switches off in final training."""
    return name.endswith(("_scale", "_shift")) and not name.startswith("residual")


def _linear(name: str, outputs: int, columns: tuple[Range, ...]) -> dict[str, Slice]:
    rows, inputs = (0, outputs), sum(b - a for a, b in columns)
    bound = math.sqrt(6.0 / (inputs + outputs))
    return {f"{name}_weight": Slice(rows, columns, bound), f"{name}_bias": Slice(rows)}


def _norm(name: str, size: int, scale: float = 1.0) -> dict[str, Slice]:
    rows = (0, size)
    return {f"{name}_scale": Slice(rows, value=scale), f"{name}_shift": Slice(rows)}


def _block(blocks: Sequence[Block | None], number: int) -> Block:
    block = blocks[number - 1]
    assert block is not None, f"something reads block {number}, which is dead"
    return block
