"""Random architectures: the sampling schemes of supernet training, its warm-up, and mutations of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from embsearch_dist.errors import UserError, nearest
from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.space import Space, check, full

SCHEMES = ("single_operator_any_connection", "single_operator_single_connection", "any_operator_any_connection")
SET_SIZES = ("binomial", "uniform")
_STREAM = 0x4E415352  # keeps these draws apart from others that start from (seed, step, rank)


def draw(space: Space, scheme: str, generator: np.random.Generator, set_size: str = "binomial") -> Architecture:
    """A random architecture.

    Every block gets one dense and one sparse operator, one width each and two mergers, all uniform; one source
    each for left and right, uniform (they may coincide); and two sets of sources, drawn without replacement. The depth
    is uniform too, where it is searched.

    Args:
        scheme: ``single_operator_any_connection`` is the paper's choice; ``.._single_connection`` draws sets of one
            source; ``any_operator_..`` draws a set of operators in each branch the way it draws sources.
        set_size: of n members, at most c = ``max_sources`` of them: ``binomial`` = 1 + Binomial(min(n, c) - 1, 1/2)
            as in the published training, ``uniform`` on 1 .. min(n, c).

    Raises:
        UserError: an unknown scheme or set size.
    """
    blocks = _draw_blocks(space, scheme, generator, set_size)
    return Architecture(blocks[: _draw_depth(space, generator)])


def training_architecture(
    space: Space,
    scheme: str,
    seed: int,
    step: int,
    rank: int = 0,
    warmup_steps: int = 0,
    set_size: str = "binomial",
) -> Architecture:
    """The architecture a training step uses: a function of ``seed``, ``step`` and ``rank`` alone, so that a continued
    run draws what the unbroken one would have drawn. Ranks that must agree pass the same ``rank``.

    Warm-up: with probability p = 1 - step / warmup_steps the connections of the whole network are all on, and, drawn
    for each block by itself, all its operators, its widest outputs and both mergers. So the first step trains the
    whole supernet, and later ones mixed states, ever more rarely. Where depth is searched, the network has all blocks
    with the same probability, and a drawn depth otherwise.
    """
    generator = np.random.default_rng([_STREAM, seed % 2**64, step, rank])
    drawn = _draw_blocks(space, scheme, generator, set_size)
    if step >= warmup_steps:
        return Architecture(drawn[: _draw_depth(space, generator)])
    share = 1 - step / warmup_steps
    whole = full(space).blocks
    connected = generator.random() < share
    blocks = []
    for block, widest in zip(drawn, whole, strict=True):
        inside = widest if generator.random() < share else block
        blocks.append(_combine(inside, widest if connected else block))
    deepest = not space.fewest_blocks or generator.random() < share
    return Architecture(tuple(blocks[: space.blocks if deepest else _draw_depth(space, generator)]))


def mutate(
    architecture: Architecture, space: Space, count: int, generator: np.random.Generator, set_size: str = "uniform"
) -> Architecture:
    """Change ``count`` members of a searched architecture, one after the other (a later change may undo an earlier).

    Each time: a block, uniform; with probability 1/2 one of its connections, else one of its other members; a new
    value for it, redrawn until it differs. Members whose change would not change the block are passed over: sources
    its operator does not read, and what has a single value in the space. The operators of both branches are one
    member, as in the published search, whose sets of sources are of uniform size, too.

    Where depth is searched it is as likely a place of a change as each block. A shorter network ends at an earlier
    block; a longer one gets random blocks, each of which reads the block before it, so that nothing falls out of use.

    Raises:
        UserError: an architecture outside the space.
    """
    check(space, architecture, searched=True, where="mutation")
    _check_names(SCHEMES[0], set_size)
    blocks = list(architecture.blocks)
    for _ in range(count):
        index = int(generator.integers(len(blocks) + (len(space.depths) > 1)))
        if index == len(blocks):
            blocks = _other_depth(blocks, space, generator, set_size)
            continue
        blocks[index] = _mutate_block(blocks[index], index + 1, space, generator, set_size)
    return Architecture(tuple(blocks))


def mutations_at(generation: int, generations: int) -> int:
    """How many mutations a child gets in a generation (counted from 0): 6 at first, 1 at the end, of 240."""
    return (generations - generation) // max(20, generations // 5) + 1


def _draw_blocks(space: Space, scheme: str, generator: np.random.Generator, set_size: str) -> tuple[Block, ...]:
    """As many as the space has at most."""
    _check_names(scheme, set_size)
    return tuple(_draw_block(space, scheme, number, generator, set_size) for number in range(1, space.blocks + 1))


def _draw_depth(space: Space, generator: np.random.Generator) -> int:
    """No draw where there is one depth alone."""
    return int(_choice(space.depths, generator)) if len(space.depths) > 1 else space.blocks


def _other_depth(blocks: list[Block], space: Space, generator: np.random.Generator, set_size: str) -> list[Block]:
    depth = int(_choice([d for d in space.depths if d != len(blocks)], generator))
    changed = blocks[:depth]
    while len(changed) < depth:
        before = len(changed)
        block = _draw_block(space, SCHEMES[0], before + 1, generator, set_size)
        dense, sparse = (_with(s, before, space) for s in (block.dense_sources, block.sparse_sources))
        changed.append(replace(block, dense_sources=dense, sparse_sources=sparse))
    return changed


def _with(sources: tuple[int, ...], wanted: int, space: Space) -> tuple[int, ...]:
    """A set of sources with ``wanted``, in the place of the last one where the set is full."""
    others = [s for s in sources if s != wanted]
    return tuple(sorted([*others[: space.max_sources - 1], wanted]))


def _draw_block(space: Space, scheme: str, number: int, generator: np.random.Generator, set_size: str) -> Block:
    dense, sparse = space.dense_operators, space.sparse_operators
    one_source, many_operators = scheme == SCHEMES[1], scheme == SCHEMES[2]
    most = 1 if one_source else space.max_sources
    return Block(
        dense=_subset(dense, len(dense) if many_operators else 1, generator, set_size),
        dense_width=_choice(space.dense_widths, generator),
        sparse=_subset(sparse, len(sparse) if many_operators else 1, generator, set_size),
        sparse_width=_choice(space.sparse_widths, generator),
        dense_sources=_subset(range(number), most, generator, set_size),
        sparse_sources=_subset(range(number), most, generator, set_size),
        left=_side(space, number, generator),
        right=_side(space, number, generator),
        dense_to_sparse=_coin(generator),
        fm=_coin(generator),
    )


def _combine(inside: Block, outside: Block) -> Block:
    """Operators, widths and mergers of one block, connections of the other."""
    return replace(
        inside,
        dense_sources=outside.dense_sources,
        sparse_sources=outside.sparse_sources,
        left=outside.left,
        right=outside.right,
    )


def _mutate_block(block: Block, number: int, space: Space, generator: np.random.Generator, set_size: str) -> Block:
    connections, others = _changeable(block, number, space)
    name = _choice(connections if connections and _coin(generator) else others, generator)
    old: Any = getattr(block, name) if name != "operators" else (block.dense, block.sparse)
    new = old
    while new == old:
        new = _new_value(name, number, space, generator, set_size)
    if name != "operators":
        return replace(block, **{name: new})
    changed = replace(block, dense=new[0], sparse=new[1])
    # An architecture written by hand may leave out what the old operator did not read.
    fill: dict[str, Any] = {}
    for key in ("dense_sources", "left", "right"):
        read = changed.reads_dense if key == "dense_sources" else changed.reads_pair
        if read and not getattr(changed, key):
            fill[key] = _new_value(key, number, space, generator, set_size)
    return replace(changed, **fill)


def _changeable(block: Block, number: int, space: Space) -> tuple[list[str], list[str]]:
    """The connections and the other members of a block whose change changes the block."""
    connections: list[str] = []
    if number > 1:  # the first block can only read the stem
        connections += ["dense_sources"] * block.reads_dense + ["sparse_sources"] * block.reads_sparse
        connections += ["left", "right"] * block.reads_pair
    choices = {
        "operators": len(space.dense_operators) * len(space.sparse_operators),
        "dense_width": len(space.dense_widths),
        "sparse_width": len(space.sparse_widths),
        "dense_to_sparse": 2,
        "fm": 2,
    }
    return connections, [name for name, count in choices.items() if count > 1]


def _new_value(name: str, number: int, space: Space, generator: np.random.Generator, set_size: str) -> Any:
    if name == "operators":
        return (_choice(space.dense_operators, generator),), (_choice(space.sparse_operators, generator),)
    if name in ("dense_width", "sparse_width"):
        return _choice(getattr(space, name + "s"), generator)
    if name in ("dense_sources", "sparse_sources"):
        return _subset(range(number), space.max_sources, generator, set_size)
    if name in ("left", "right"):
        return _side(space, number, generator)
    return _coin(generator)


def _subset(items: Sequence[Any], most: int, generator: np.random.Generator, set_size: str) -> tuple[Any, ...]:
    """A random set of at least one and at most ``most`` of ``items``, in their order."""
    bound = min(len(items), most)
    extra = generator.binomial(bound - 1, 0.5) if set_size == "binomial" else generator.integers(bound)
    picked = generator.permutation(len(items))[: 1 + int(extra)]
    return tuple(items[k] for k in sorted(picked.tolist()))


def _side(space: Space, number: int, generator: np.random.Generator) -> tuple[int, ...]:
    return (int(generator.integers(number)),) if space.binary else ()


def _choice(items: Sequence[Any], generator: np.random.Generator) -> Any:
    return items[int(generator.integers(len(items)))]


def _coin(generator: np.random.Generator) -> bool:
    return bool(generator.integers(2))


def _check_names(scheme: str, set_size: str) -> None:
    for what, name, known in (("sampling scheme", scheme, SCHEMES), ("set size", set_size, SET_SIZES)):
        if name not in known:
            raise UserError(f"{what} {name!r} is none of {', '.join(known)}{nearest(name, known)}")
