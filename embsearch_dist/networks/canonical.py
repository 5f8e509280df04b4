"""One form for all encodings of a network: what nothing reads is dropped, blocks are numbered by structure alone.

In NASRec's encoding many parts are free to change without a change of the network: left and right of a block with an
fc operator, a block nobody reads, the order of blocks that do not depend on each other. A search that compares
encodings trains and counts such copies as different candidates.

Equal here means: the same graph of operators and widths, so the same network when trained from scratch. Within a
supernet two encodings of one network use the weights of different blocks, so their inherited scores may differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

from embsearch_dist.networks.architecture import KEYS, Architecture, Block

# Orders of blocks that look alike which are tried to find the one that is written first. Seven blocks have at most
# 720 (six equal ones before the last).
MAX_ORDERS = 5040


@dataclass
class _Live:
    """Which merged outputs of the blocks something reads."""

    dense: set[int]
    sparse: set[int]


def prune(architecture: Architecture) -> tuple[Block | None, ...]:
    """Each block with its live parts only, in place; None for a block nobody reads.

    Walks back from the head. A branch, merger or list of sources that the prediction does not depend on is emptied.
    """
    last = len(architecture.blocks)
    live = _Live({last}, {last})
    kept: list[Block | None] = []
    for number in range(last, 0, -1):
        kept.append(_prune_block(number, architecture.blocks[number - 1], live))
    return tuple(reversed(kept))


def canonical(architecture: Architecture) -> Architecture:
    """The canonical form: live parts only, blocks in an order that depends on the structure alone.

    A branch that is not live has no operators and width 0. The sides of ``sum`` are sorted. The result may have
    fewer blocks than the space. Its function is the architecture's own, up to the order of rows in weights.

    Networks that are equal get one form; only where more than ``MAX_ORDERS`` orders of blocks look alike may they
    keep two. Different networks never share a form.
    """
    blocks = _compact(prune(architecture))
    colors = _colors(blocks)
    classes = [[b for b in range(len(blocks)) if colors[b] == c] for c in sorted(set(colors))]
    if math.prod(math.factorial(len(c)) for c in classes) > MAX_ORDERS:
        orders: Iterator[list[int]] = iter([[b for c in classes for b in c]])
    else:
        orders = ([b for c in parts for b in c] for parts in product(*(permutations(c) for c in classes)))
    best = min((_renumber(blocks, order) for order in orders), key=lambda found: [_members(b) for b in found])
    return Architecture(tuple(best))


def key(architecture: Architecture) -> str:
    """32 hex digits that equal networks share (see :func:`canonical`) and different ones do not.

    The widths of embeddings and of merged tokens belong to the space and do not enter: compare within one space.
    """
    body = [_members(block) for block in canonical(architecture).blocks]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:32]


def _prune_block(number: int, block: Block, live: _Live) -> Block | None:
    """The live parts of a block whose readers are all known; adds what it reads to ``live``."""
    fm = block.fm and number in live.dense
    dense_to_sparse = block.dense_to_sparse and number in live.sparse
    # A merger reads the other branch as the operators left it, so it keeps that branch alive by itself.
    dense = number in live.dense or dense_to_sparse
    sparse = number in live.sparse or fm
    if not dense and not sparse:
        return None
    block = replace(
        block,
        dense=block.dense if dense else (),
        dense_width=block.dense_width if dense else 0,
        sparse=block.sparse if sparse else (),
        sparse_width=block.sparse_width if sparse else 0,
        fm=fm,
        dense_to_sparse=dense_to_sparse,
    )
    block = replace(
        block,
        dense_sources=block.dense_sources if block.reads_dense else (),
        sparse_sources=block.sparse_sources if block.reads_sparse else (),
        left=block.left if block.reads_pair else (),
        right=block.right if block.reads_pair else (),
    )
    live.dense.update(block.dense_sources, block.left, block.right)
    live.sparse.update(block.sparse_sources)
    return block


def _compact(kept: Sequence[Block | None]) -> list[Block]:
    """The live blocks, numbered anew without gaps."""
    alive = [k for k, block in enumerate(kept) if block is not None]
    blocks = [block or _NOTHING for block in kept]
    return _renumber(blocks, alive)


def _renumber(blocks: Sequence[Block], order: Sequence[int]) -> list[Block]:
    """``blocks[order[0]]``, ``blocks[order[1]]``, ... with their sources renamed to match."""
    names = {0: 0} | {old + 1: new for new, old in enumerate(order, 1)}
    found = []
    for index in order:
        block = blocks[index]
        left, right = ([names[s] for s in side] for side in (block.left, block.right))
        if _symmetric(block):
            left, right = sorted((left, right))
        found.append(
            replace(
                block,
                dense_sources=tuple(sorted(names[s] for s in block.dense_sources)),
                sparse_sources=tuple(sorted(names[s] for s in block.sparse_sources)),
                left=tuple(sorted(left)),
                right=tuple(sorted(right)),
            )
        )
    return found


def _symmetric(block: Block) -> bool:
    """Whether left and right may change places."""
    return "sum" in block.dense and "gating" not in block.dense


def _colors(blocks: Sequence[Block]) -> list[int]:
    """A colour per block, ascending along the connections, that depends on the structure alone.

    Starts from depth and a block's own parts, then tells blocks apart by the colours of what they read and of who
    reads them, until nothing more is told apart (colour refinement).
    """
    depths = [0]
    for block in blocks:
        depths.append(1 + max((depths[s] for _, s in _edges(block)), default=0))
    own = [_members(replace(b, dense_sources=(), sparse_sources=(), left=(), right=())) for b in blocks]
    colors = _ranks(list(zip(depths[1:], own)))
    while True:
        readers: list[list[tuple[int, int]]] = [[] for _ in range(len(blocks) + 1)]
        for b, block in enumerate(blocks):
            for role, source in _edges(block):
                readers[source].append((role, colors[b]))
        signatures = []
        for b, block in enumerate(blocks):
            reads = sorted((role, colors[s - 1] if s else -1) for role, s in _edges(block))
            signatures.append((colors[b], tuple(reads), tuple(sorted(readers[b + 1]))))
        refined = _ranks(signatures)
        if len(set(refined)) == len(set(colors)):
            return refined
        colors = refined


def _edges(block: Block) -> list[tuple[int, int]]:
    """What a block reads: (role, source)."""
    sides = (2, 2) if _symmetric(block) else (2, 3)
    roles = ((0, block.dense_sources), (1, block.sparse_sources), (sides[0], block.left), (sides[1], block.right))
    return [(role, source) for role, sources in roles for source in sources]


def _ranks(values: Sequence[Any]) -> list[int]:
    """The place of each value among the different ones."""
    places = {value: place for place, value in enumerate(sorted(set(values)))}
    return [places[value] for value in values]


def _members(block: Block) -> tuple[Any, ...]:
    return tuple(getattr(block, name) for name in KEYS)


_NOTHING = Block((), 0, (), 0, (), (), (), (), False, False)
