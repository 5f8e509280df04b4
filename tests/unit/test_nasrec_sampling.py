"""Random architectures of NASRec: every scheme's distribution, the warm-up of training, mutations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.networks.architecture import KEYS, Architecture, Block
from embsearch_dist.networks.sampling import SCHEMES, draw, mutate, mutations_at, training_architecture
from embsearch_dist.networks.space import SPACES, Space, check, full

FULL, SMALL = SPACES["full"], SPACES["small"]
ANY_CONNECTION, ONE_CONNECTION, ANY_OPERATOR = SCHEMES
CONNECTIONS = ("dense_sources", "sparse_sources", "left", "right")


def draws(space: Space, scheme: str, count: int, set_size: str = "binomial") -> list[Architecture]:
    generator = np.random.default_rng(0)
    return [draw(space, scheme, generator, set_size) for _ in range(count)]


def shares(values: list) -> dict:
    return {value: count / len(values) for value, count in Counter(values).items()}


@pytest.mark.parametrize("space", [FULL, SMALL, Space(3, ("sum",), ("efc",), (8,), (4,), 1)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_belong_to_the_space(space: Space, scheme: str) -> None:
    for a in draws(space, scheme, 40):
        check(space, a, searched=scheme != ANY_OPERATOR, where="draw")
        assert len(a.blocks) == space.blocks
        assert all(bool(b.left) is bool(b.right) is space.binary for b in a.blocks)


@pytest.mark.parametrize(("set_size", "expected"), [("binomial", (1, 3, 3, 1)), ("uniform", (2, 2, 2, 2))])
def test_sets_of_sources_have_the_published_sizes(set_size: str, expected: tuple[int, ...]) -> None:
    last = [a.blocks[6] for a in draws(FULL, ANY_CONNECTION, 1500, set_size)]
    for key in ("dense_sources", "sparse_sources"):
        sizes = shares([len(getattr(b, key)) for b in last])
        assert [sizes[k] for k in (1, 2, 3, 4)] == pytest.approx([e / 8 for e in expected], abs=0.04)
        members = Counter(s for b in last for s in getattr(b, key))
        assert [members[s] / 1500 for s in range(7)] == pytest.approx([2.5 / 7] * 7, abs=0.05)
    # The cap is the smaller of the space's and of what there is.
    second = shares([len(a.blocks[1].dense_sources) for a in draws(FULL, ANY_CONNECTION, 600, set_size)])
    assert second == pytest.approx({1: 0.5, 2: 0.5}, abs=0.08)


def test_the_other_members_are_uniform() -> None:
    third = [a.blocks[2] for a in draws(FULL, ANY_CONNECTION, 1500)]
    for key, count in (("dense", 4), ("sparse", 2), ("dense_width", 8), ("sparse_width", 4), ("fm", 2), ("left", 3)):
        found = shares([getattr(b, key) for b in third])
        assert len(found) == count
        assert all(share == pytest.approx(1 / count, abs=0.05) for share in found.values())
    assert np.mean([b.left == b.right for b in third]) == pytest.approx(1 / 3, abs=0.05)


def test_single_connection_reads_one_source() -> None:
    blocks = [b for a in draws(FULL, ONE_CONNECTION, 50) for b in a.blocks]
    assert all(len(getattr(b, key)) == 1 for b in blocks for key in CONNECTIONS)
    assert all(len(b.dense) == len(b.sparse) == 1 for b in blocks)
    assert {b.dense_sources[0] for b in blocks} == set(range(7))


def test_any_operator_draws_sets_of_operators() -> None:
    blocks = [b for a in draws(FULL, ANY_OPERATOR, 200) for b in a.blocks]
    dense = shares([len(b.dense) for b in blocks])
    assert [dense[k] for k in (1, 2, 3, 4)] == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8], abs=0.04)
    sparse = shares([len(b.sparse) for b in blocks])
    assert sparse == pytest.approx({1: 0.5, 2: 0.5}, abs=0.04)
    assert max(len(b.dense_sources) for b in blocks) == 4
    assert {name for b in blocks for name in b.dense} == set(FULL.dense_operators)


def test_unknown_names_are_refused() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(UserError, match="sampling scheme 'single_operator' is none of single_operator_any"):
        draw(FULL, "single_operator", generator)
    with pytest.raises(UserError, match="set size 'binom' is none of binomial, uniform.*'binomial'"):
        draw(FULL, ANY_CONNECTION, generator, "binom")


def test_training_draws_depend_on_seed_step_and_rank_alone() -> None:
    def at(seed: int, step: int, rank: int) -> Architecture:
        return training_architecture(FULL, ANY_CONNECTION, seed, step, rank, warmup_steps=10)

    first = at(3, 50, 1)
    draw(FULL, ANY_CONNECTION, np.random.default_rng(9))
    assert at(3, 50, 1) == first
    assert len({at(3, 50, 1), at(4, 50, 1), at(3, 51, 1), at(3, 50, 2), at(-3, 50, 1)}) == 5


def test_warm_up_starts_with_the_whole_supernet_and_ends_without_it() -> None:
    assert training_architecture(FULL, ANY_CONNECTION, 0, 0, warmup_steps=100) == full(FULL)
    assert training_architecture(SMALL, ANY_CONNECTION, 0, 0, warmup_steps=100) == full(SMALL)
    for step in (100, 101, 5000):
        a = training_architecture(FULL, ANY_CONNECTION, 0, step, warmup_steps=100)
        assert a == training_architecture(FULL, ANY_CONNECTION, 0, step)
        check(FULL, a, True, "drawn")


def test_warm_up_draws_connections_together_and_insides_by_block() -> None:
    """A quarter of the way: everything is on with probability 3/4."""
    whole, steps = full(FULL).blocks, 600
    connected, inside = [], []
    for seed in range(steps):
        a = training_architecture(FULL, ANY_CONNECTION, seed, 250, warmup_steps=1000)
        every = [all(getattr(b, k) == getattr(w, k) for k in CONNECTIONS) for b, w in zip(a.blocks[3:], whole[3:])]
        assert all(every) or not any(every[1:])  # block 4 alone may have drawn all its sources by chance
        connected.append(every[-1])
        inside.append([len(b.dense) == 4 for b in a.blocks])
        for b, w in zip(a.blocks, whole):
            if len(b.dense) == 4:  # widths and mergers come with the operators
                assert replace(b, **{k: getattr(w, k) for k in CONNECTIONS}) == w
            else:
                assert len(b.dense) == len(b.sparse) == 1
    assert np.mean(connected) == pytest.approx(0.75, abs=0.06)
    assert np.mean(inside, axis=0) == pytest.approx([0.75] * 7, abs=0.07)
    assert np.corrcoef(np.array(inside, dtype=float).T[:2])[0, 1] == pytest.approx(0, abs=0.13)
    assert np.corrcoef(connected, np.array(inside)[:, 0])[0, 1] == pytest.approx(0, abs=0.13)


def changes(before: Architecture, after: Architecture) -> list[tuple[int, str]]:
    pairs = enumerate(zip(before.blocks, after.blocks), 1)
    return [(number, k) for number, (a, b) in pairs for k in KEYS if getattr(a, k) != getattr(b, k)]


@pytest.mark.parametrize("space", [FULL, SMALL, Space(2, ("fc",), ("efc",), (8,), (4,), 1)])
def test_a_mutation_changes_one_member_that_is_in_use(space: Space) -> None:
    generator = np.random.default_rng(1)
    for _ in range(400):
        parent = draw(space, ANY_CONNECTION, generator)
        child = mutate(parent, space, 1, generator)
        check(space, child, True, "child")
        found = changes(parent, child)
        keys = {k for _, k in found}
        assert len({number for number, _ in found}) == 1
        assert len(found) == 1 or keys == {"dense", "sparse"}  # operators of both branches are one member
        number, key = found[0]
        block = parent.blocks[number - 1]
        assert key != "dense_sources" or block.reads_dense
        assert key not in ("left", "right") or block.reads_pair
        assert key not in CONNECTIONS or number > 1


def test_half_of_the_mutations_change_a_connection() -> None:
    generator = np.random.default_rng(2)
    parent = Architecture((Block(("fc",), 16, ("efc",), 16, (0,), (0,), (0,), (0,), False, False),) * 7)
    found = [changes(parent, mutate(parent, FULL, 1, generator))[0] for _ in range(3000)]
    numbers = shares([number for number, _ in found])
    assert [numbers[k] for k in range(1, 8)] == pytest.approx([1 / 7] * 7, abs=0.025)
    keys = shares([k for number, k in found if number > 1])
    assert keys["dense_sources"] == pytest.approx(0.25, abs=0.03)
    assert keys["sparse_sources"] == pytest.approx(0.25, abs=0.03)
    assert keys["dense"] + keys["sparse"] == pytest.approx(0.1, abs=0.02)
    for key in ("dense_width", "sparse_width", "fm", "dense_to_sparse"):
        assert keys[key] == pytest.approx(0.1, abs=0.02)
    assert set(keys) <= {*CONNECTIONS[:2], "dense", "sparse", "dense_width", "sparse_width", "fm", "dense_to_sparse"}
    gated = Architecture(tuple(replace(b, dense=("gating",)) for b in parent.blocks))
    keys = shares([changes(gated, mutate(gated, FULL, 1, generator))[0][1] for _ in range(2000)])
    assert "dense_sources" not in keys
    assert keys["left"] == pytest.approx(keys["right"], abs=0.04)
    assert keys["left"] == pytest.approx(6 / 7 / 6, abs=0.03)


def test_several_mutations_change_more_and_repeat() -> None:
    parent = draw(FULL, ANY_CONNECTION, np.random.default_rng(4))
    six = [mutate(parent, FULL, 6, np.random.default_rng(k)) for k in range(60)]
    assert np.mean([len(changes(parent, child)) for child in six]) > 4
    assert mutate(parent, FULL, 6, np.random.default_rng(5)) == six[5]
    assert mutate(parent, FULL, 0, np.random.default_rng(5)) == parent


def test_a_mutation_fills_in_what_the_new_operator_reads() -> None:
    """Written by hand, a block may leave out sources its operator does not read."""
    block = Block(("sum",), 16, ("efc",), 16, (), (0,), (0,), (0,), False, False)
    parent = Architecture((block, replace(block, dense=("fc",), dense_sources=(0,), left=(), right=())))
    space = Space(2, ("fc", "sum"), ("efc",), (16,), (16,))
    generator = np.random.default_rng(0)
    found = [mutate(parent, space, 1, generator) for _ in range(200)]
    assert any(child.blocks[0].dense == ("fc",) for child in found)
    assert any(child.blocks[1].dense == ("sum",) for child in found)


def test_only_searched_architectures_mutate() -> None:
    with pytest.raises(UserError, match="mutation, block 1, .*needs exactly one operator"):
        mutate(full(FULL), FULL, 1, np.random.default_rng(0))


def test_children_mutate_less_and_less() -> None:
    counts = [mutations_at(g, 240) for g in range(240)]
    assert counts[0] == 6
    assert counts[-1] == 1
    assert counts == sorted(counts, reverse=True)
    assert Counter(counts) == {6: 1, 5: 48, 4: 48, 3: 48, 2: 48, 1: 47}
    assert {mutations_at(g, 10) for g in range(10)} == {1}
