"""Encodings of one network share a key, others do not: against a search of all numberings, and by random changes."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import MAX_ORDERS, canonical, key, prune
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import SPACES, Space, full

FULL = SPACES["full"]
PLAIN = Block(("fc",), 16, ("efc",), 16, (0,), (0,), (0,), (0,), False, False)
Uses = set[tuple[int, str]]  # (block, part): what the prediction depends on


def network(*blocks: Block) -> Architecture:
    return Architecture(tuple(blocks))


def live_parts(a: Architecture) -> Uses:
    """By recursion from the head: parts are a block's operators ("D", "S"), mergers and lists of sources."""
    found: Uses = set()

    def merged(number: int, branch: str) -> None:
        if number == 0:
            return
        block = a.blocks[number - 1]
        operators(number, branch)
        if branch == "D" and block.fm:
            found.add((number, "fm"))
            operators(number, "S")
        if branch == "S" and block.dense_to_sparse:
            found.add((number, "dense_to_sparse"))
            operators(number, "D")

    def operators(number: int, branch: str) -> None:
        found.add((number, branch))
        block = a.blocks[number - 1]
        for name in block.dense if branch == "D" else block.sparse:
            reads = ["left", "right"] if name in ("gating", "sum") else []
            reads += ["dense_sources"] if name in ("fc", "dot_product") else []
            reads += ["sparse_sources"] if name in ("dot_product", "efc", "attention") else []
            for part in reads:
                found.add((number, part))
                for source in getattr(block, part):
                    merged(source, "S" if part == "sparse_sources" else "D")

    merged(len(a.blocks), "D")
    merged(len(a.blocks), "S")
    return found


def reference(a: Architecture) -> str:
    """The smallest text of all numberings of the live blocks that put sources first. One source a side only."""
    live = live_parts(a)
    alive = sorted({number for number, _ in live})
    texts = []
    for order in itertools.permutations(alive):
        names = {0: 0} | {old: new for new, old in enumerate(order, 1)}
        rows: list[Any] = []
        for number in order:
            block = a.blocks[number - 1]
            lists = {
                part: sorted(names[s] for s in getattr(block, part)) if (number, part) in live else []
                for part in ("dense_sources", "sparse_sources", "left", "right")
            }
            if any(s >= names[number] for sources in lists.values() for s in sources):
                break
            sides = [lists.pop("left"), lists.pop("right")]
            if "gating" not in block.dense:
                sides.sort()
            dense = (block.dense, block.dense_width) if (number, "D") in live else None
            sparse = (block.sparse, block.sparse_width) if (number, "S") in live else None
            mergers = [(number, m) in live for m in ("fm", "dense_to_sparse")]
            rows.append([dense, sparse, mergers, list(lists.values()), sides])
        if len(rows) == len(order):
            texts.append(json.dumps(rows))
    return min(texts)


def reordered(a: Architecture, generator: np.random.Generator) -> Architecture:
    """The same blocks in another order that keeps sources before their readers and the last block last."""
    count = len(a.blocks)
    order: list[int] = []
    while len(order) < count:
        ready = [
            k
            for k in range(1, count + 1)
            if k not in order
            and all(
                s == 0 or s in order
                for part in ("dense_sources", "sparse_sources", "left", "right")
                for s in getattr(a.blocks[k - 1], part)
            )
            and (k != count or len(order) == count - 1)
        ]
        order.append(int(generator.choice(ready)))
    names = {0: 0} | {old: new for new, old in enumerate(order, 1)}
    blocks = []
    for old in order:
        block = a.blocks[old - 1]
        parts = ("dense_sources", "sparse_sources", "left", "right")
        renamed: dict[str, Any] = {part: tuple(sorted(names[s] for s in getattr(block, part))) for part in parts}
        blocks.append(replace(block, **renamed))
    return network(*blocks)


@pytest.mark.parametrize(
    "space",
    [
        Space(3, ("fc", "sum"), ("efc",), (16,), (16,), 2),
        Space(4, ("fc", "dot_product", "gating", "sum"), ("efc",), (16,), (16,), 1),
        Space(5, ("fc",), ("efc",), (16,), (16,), 2),
    ],
    ids=["3 blocks", "4 blocks", "5 blocks"],
)
def test_keys_tell_apart_exactly_what_all_numberings_tell_apart(space: Space) -> None:
    generator = np.random.default_rng(5)
    groups: dict[str, set[str]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for k in range(400):
        a = draw(space, SCHEMES[0], generator)
        if k % 2:  # with mergers two draws are rarely the same network
            a = network(*(replace(b, fm=False, dense_to_sparse=False) for b in a.blocks))
        name = reference(a)
        groups[name].add(key(a))
        counts[name] += 1
    assert all(len(keys) == 1 for keys in groups.values())
    assert len({k for keys in groups.values() for k in keys}) == len(groups)
    assert sum(c > 1 for c in counts.values()) > 20  # there were equal networks to recognise


def test_order_of_independent_blocks_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    moved = 0
    for _ in range(150):
        a = draw(FULL, SCHEMES[1], generator)
        b = reordered(a, generator)
        moved += a != b
        assert key(a) == key(b)
        assert canonical(a) == canonical(b)
    assert moved > 75


def test_dead_parts_do_not_matter() -> None:
    generator = np.random.default_rng(1)
    changed = 0
    for _ in range(150):
        a = draw(FULL, SCHEMES[0], generator)
        live = live_parts(a)
        other = draw(FULL, SCHEMES[0], generator)
        blocks = []
        for number, (old, new) in enumerate(zip(a.blocks, other.blocks), 1):
            dead: dict[str, Any] = {
                part: getattr(new, part)
                for part in ("dense_sources", "sparse_sources", "left", "right", "fm", "dense_to_sparse")
                if (number, part) not in live
                and not (part in ("fm", "dense_to_sparse") and getattr(old, part) is False)
            }
            if (number, "D") not in live:
                dead |= {"dense": new.dense, "dense_width": new.dense_width}
            if (number, "S") not in live:
                dead |= {"sparse": new.sparse, "sparse_width": new.sparse_width}
            if "dense" in dead and "dot_product" in new.dense and (number, "S") in live:
                dead.pop("dense")
            blocks.append(replace(old, **dead))
        b = network(*blocks)
        changed += a != b
        assert key(a) == key(b)
    assert changed > 100


def test_every_live_part_matters() -> None:
    """Each change of one part of one live block gives another key than the one it came from."""
    generator = np.random.default_rng(2)
    for _ in range(60):
        a = draw(FULL, SCHEMES[0], generator)
        live, own = live_parts(a), key(a)
        for number, block in enumerate(a.blocks, 1):
            changes: list[dict[str, Any]] = []
            if (number, "D") in live:
                changes += [{"dense": (o,)} for o in FULL.dense_operators if o not in block.dense]
                changes += [{"dense_width": w} for w in FULL.dense_widths if w != block.dense_width]
            if (number, "S") in live:
                changes += [{"sparse": (o,)} for o in FULL.sparse_operators if o not in block.sparse]
                changes += [{"sparse_width": w} for w in FULL.sparse_widths if w != block.sparse_width]
            for part in ("dense_sources", "sparse_sources"):
                sets = [s for k in range(1, 5) for s in itertools.combinations(range(number), k)]
                changes += [{part: s} for s in sets if (number, part) in live and s != getattr(block, part)]
            for part in ("left", "right"):
                if (number, part) in live:
                    changes += [{part: (s,)} for s in range(number) if (s,) != getattr(block, part)]
            for part in ("fm", "dense_to_sparse"):
                if (number, part) in live:
                    changes.append({part: False})
            for change in generator.permutation(np.array(changes, dtype=object))[:4]:
                blocks = list(a.blocks)
                blocks[number - 1] = replace(block, **change)
                assert key(network(*blocks)) != own, (number, change)


def test_a_merger_of_a_branch_somebody_reads_matters() -> None:
    for part in ("fm", "dense_to_sparse"):
        merged: dict[str, Any] = {part: True}
        assert key(network(replace(PLAIN, **merged))) != key(network(PLAIN))


def test_copies_of_a_block_are_not_one_block_read_twice() -> None:
    last = replace(PLAIN, dense=("gating",), left=(1,), right=(2,), sparse_sources=(0,))
    copies = network(PLAIN, PLAIN, last)
    twice = network(PLAIN, PLAIN, replace(last, right=(1,)))
    assert key(copies) != key(twice)
    assert len(canonical(copies).blocks) == 3
    assert len(canonical(twice).blocks) == 2
    # One level deeper: two readers of one block, or each of its own copy.
    reader = replace(PLAIN, dense_sources=(1,), sparse_sources=(0,))
    last = replace(PLAIN, dense=("sum",), left=(3,), right=(4,), sparse_sources=(0,))
    apart = network(PLAIN, PLAIN, reader, replace(reader, dense_sources=(2,)), last)
    shared = network(PLAIN, PLAIN, reader, reader, last)
    assert key(apart) != key(shared)


def test_pairs_that_look_alike_may_be_numbered_either_way() -> None:
    """Two equal blocks, each with an equal reader: which reader reads which of them is only a matter of numbers."""
    reader = replace(PLAIN, dense_sources=(1,))
    other = replace(reader, dense_sources=(2,))
    last = replace(PLAIN, dense_sources=(3, 4))
    assert key(network(PLAIN, PLAIN, reader, other, last)) == key(network(PLAIN, PLAIN, other, reader, last))
    assert key(network(PLAIN, PLAIN, reader, other, last)) == key(
        network(PLAIN, reader, PLAIN, replace(other, dense_sources=(3,)), replace(last, dense_sources=(2, 4)))
    )
    assert key(network(PLAIN, PLAIN, reader, other, last)) != key(network(PLAIN, PLAIN, reader, reader, last))


def test_sides_may_change_places_under_sum_but_not_under_a_gate() -> None:
    wide = replace(PLAIN, dense_width=32)
    for operator, same in (("sum", True), ("gating", False)):
        last = replace(PLAIN, dense=(operator,), left=(1,), right=(2,))
        swapped = replace(last, left=(2,), right=(1,))
        assert (key(network(PLAIN, wide, last)) == key(network(PLAIN, wide, swapped))) is same
    both = replace(PLAIN, dense=("gating", "sum"), left=(1,), right=(2,))
    swapped = replace(both, left=(2,), right=(1,))
    assert key(network(PLAIN, wide, both)) != key(network(PLAIN, wide, swapped))


def test_several_sources_on_a_side_lose_what_is_dead_alone() -> None:
    wide, third = replace(PLAIN, dense_width=32), replace(PLAIN, dense=("dot_product",))
    last = replace(PLAIN, dense=("sum",), left=(1, 2), right=(3,))
    dead, behind = replace(PLAIN, sparse=("attention",)), replace(last, left=(2, 3), right=(4,))
    assert key(network(dead, PLAIN, wide, third, behind)) == key(network(PLAIN, wide, third, last))
    assert key(network(PLAIN, wide, third, replace(last, left=(1,)))) != key(network(PLAIN, wide, third, last))
    assert len(canonical(full(FULL)).blocks) == 7


def test_the_canonical_form_is_canonical() -> None:
    generator = np.random.default_rng(3)
    for scheme in SCHEMES:
        for _ in range(40):
            a = draw(FULL, scheme, generator)
            form = canonical(a)
            assert canonical(form) == form
            assert key(form) == key(a)
            if len(form.blocks) <= 5:
                assert reference(form) == reference(a)


def test_only_what_the_head_needs_is_kept() -> None:
    first = Block(("dot_product",), 32, ("attention",), 48, (0,), (0,), (0,), (0,), True, True)
    # Reads the first block's tokens alone: its FM goes, its dense operator feeds the merged tokens.
    second = Block(("sum",), 64, ("efc",), 16, (1,), (1,), (0,), (0,), False, False)
    kept = prune(network(first, second))
    assert kept == (
        replace(first, left=(), right=(), fm=False),
        replace(second, dense_sources=()),
    )
    # Without the merger the dense branch goes, too.
    kept = prune(network(replace(first, dense_to_sparse=False), second))
    assert kept[0] == Block((), 0, ("attention",), 48, (), (0,), (), (), False, False)
    # A block nobody reads.
    assert prune(network(first, replace(second, sparse_sources=(0,))))[0] is None


def test_many_blocks_that_look_alike_keep_their_order() -> None:
    """8! orders are more than are tried; the form is still one of the same network."""
    leaves = [PLAIN] * 8
    last = replace(PLAIN, dense_sources=tuple(range(1, 9)), sparse_sources=tuple(range(1, 9)))
    assert MAX_ORDERS < 40_320
    a = network(*leaves, last)
    assert canonical(a) == network(*(replace(b, left=(), right=()) for b in a.blocks))
    assert key(a) != key(network(*leaves[:7], replace(last, dense_sources=(1,), sparse_sources=tuple(range(1, 8)))))
