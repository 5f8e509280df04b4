"""Spaces whose depth is searched: what is drawn, mutated, counted and shared, and the heads behind each depth."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.methods.nasrec.method import NASRec
from embsearch_dist.methods.nasrec.model import SliceAdagrad, SlicedNetwork
from embsearch_dist.methods.stages import run_stages
from embsearch_dist.networks.architecture import Architecture
from embsearch_dist.networks.canonical import canonical, key, prune
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.sampling import SCHEMES, draw, mutate, training_architecture
from embsearch_dist.networks.slices import Layout, merged, slices_of
from embsearch_dist.networks.space import SPACES, Space, SpaceConfig, check, full, load, size
from tests.factories import prepared
from tests.unit.test_nasrec_scoring import nasrec_run
from tools.bench.masked import MaskedNetwork

SPACE = Space(blocks=5, dense_widths=(4, 7, 16), sparse_widths=(4, 6), tokens=2, width=8, fewest_blocks=2)
FIXED = replace(SPACE, fewest_blocks=0)
ROWS, COLUMNS, FIELDS = 16, 3, 5


def drawn(count: int, space: Space = SPACE) -> list[Architecture]:
    generator = np.random.default_rng(0)
    return [draw(space, SCHEMES[0], generator) for _ in range(count)]


def supernet() -> SlicedNetwork:
    torch.manual_seed(0)
    return SlicedNetwork(Layout(SPACE, COLUMNS, FIELDS))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(ROWS, COLUMNS, generator=generator), torch.randn(ROWS, FIELDS, 8, generator=generator)


def test_depths_are_drawn_uniformly_and_belong_to_the_space() -> None:
    found = drawn(2000)
    counts = Counter(len(a.blocks) for a in found)
    assert set(counts) == {2, 3, 4, 5} and max(counts.values()) < 1.2 * min(counts.values())
    for a in found[:50]:
        check(SPACE, a, True, "draw")
    with pytest.raises(UserError, match="block 2 is missing: the space has 2 to 5 blocks, the file 1"):
        check(SPACE, Architecture(found[0].blocks[:1]), True, "x")
    with pytest.raises(UserError, match="block 3 is missing: the space has 5 blocks, the file 2"):
        check(FIXED, Architecture(found[0].blocks[:2]), True, "x")


def test_a_space_of_one_depth_draws_what_it_always_drew() -> None:
    """Run directories of older versions go on with the same networks."""
    a = draw(FIXED, SCHEMES[0], np.random.default_rng(3))
    assert replace(FIXED, fewest_blocks=5).depths == (5,) == FIXED.depths
    assert draw(replace(FIXED, fewest_blocks=5), SCHEMES[0], np.random.default_rng(3)) == a
    mutated = mutate(a, FIXED, 4, np.random.default_rng(4))
    trained = training_architecture(FIXED, SCHEMES[0], 1, 5, warmup_steps=20)
    assert [key(x)[:8] for x in (a, mutated, trained)] == ["babb4d57", "28400cf2", "b50f181b"]  # before depths
    assert "fewest_blocks" not in FIXED.to_json()


def test_training_begins_with_the_whole_supernet_and_comes_to_all_depths() -> None:
    assert training_architecture(SPACE, SCHEMES[0], 0, 0, warmup_steps=100) == full(SPACE)
    early = [len(training_architecture(SPACE, SCHEMES[0], 0, s, warmup_steps=400).blocks) for s in range(200)]
    late = [len(training_architecture(SPACE, SCHEMES[0], 0, s, warmup_steps=400).blocks) for s in range(400, 600)]
    assert set(late) == set(early) == {2, 3, 4, 5}
    assert early.count(5) > 120 > 80 > late.count(5)


def test_mutations_change_depth_as_often_as_a_block_and_keep_the_rest() -> None:
    generator = np.random.default_rng(0)
    changed = 0
    for a in drawn(600):
        b = mutate(a, SPACE, 1, generator)
        check(SPACE, b, True, "mutation")
        if len(a.blocks) == len(b.blocks):
            assert sum(x != y for x, y in zip(a.blocks, b.blocks, strict=True)) == 1
            continue
        changed += 1
        shared = min(len(a.blocks), len(b.blocks))
        assert a.blocks[:shared] == b.blocks[:shared]
        for number in range(shared, len(b.blocks)):
            assert number in b.blocks[number].sparse_sources and number in b.blocks[number].dense_sources
        assert all(block is not None for block in prune(b)[max(0, shared - 1) :])  # nothing of it fell out of use
    assert changed / 600 == pytest.approx(np.mean([1 / (d + 1) for d in (2, 3, 4, 5)]), abs=0.05)


def test_a_short_network_is_the_one_with_dead_blocks_behind_another_encoding() -> None:
    """Keys and costs are of the network, whatever the depth of its encoding."""
    for a in drawn(30):
        if len(a.blocks) == 5:
            continue
        # The same network five blocks long: a dead block is put in before its last one, which nothing reads.
        *before, last = a.blocks
        longer = Architecture((*before, before[0], last))
        assert key(longer) == key(a)
        assert network_cost(longer, SPACE, COLUMNS, FIELDS).total == network_cost(a, SPACE, COLUMNS, FIELDS).total
        network = ArchitectureNetwork(a, SPACE, FIELDS, COLUMNS)
        assert network_cost(a, SPACE, COLUMNS, FIELDS).total.parameters == sum(p.numel() for p in network.parameters())


def test_every_depth_has_a_head_of_its_own() -> None:
    network = supernet()
    assert network.weights["head_dense"].shape == (4, 16) and network.weights["head_bias"].shape == (4,)
    assert network.weights["head_sparse"].shape == (4 * 8, 2 + 6)
    rows = {len(a.blocks): slices_of(prune(a), network.layout)["head_bias"].rows for a in drawn(50)}
    assert rows == {5: (0, 1), 4: (1, 2), 3: (2, 3), 2: (3, 4)}
    # What has fewer live blocks than any searched network, and is not searched itself.
    assert network.layout.exit_of(1) == 3
    # Without searched depth the one head is where it always was, however many blocks are live.
    fixed = SlicedNetwork(Layout(FIXED, COLUMNS, FIELDS))
    assert fixed.weights["head_dense"].shape == (1, 16)
    blocks = canonical(draw(FIXED, SCHEMES[0], np.random.default_rng(1))).blocks
    assert slices_of(blocks, fixed.layout)["head_bias"].rows == (0, 1)


def test_slices_of_all_depths_are_the_masked_supernet_and_the_network_alone() -> None:
    network, (dense, u) = supernet(), inputs()
    masked = MaskedNetwork(network)
    torch.nn.init.normal_(network.weights["head_bias"])
    for a in drawn(25):
        blocks = prune(a)
        logits = network(blocks, dense, u)
        torch.testing.assert_close(logits, masked(blocks, dense, u), rtol=1e-4, atol=1e-5)
        alone, taken = ArchitectureNetwork(a, SPACE, FIELDS, COLUMNS), network.copies(canonical(a).blocks)
        assert {n: w.shape for n, w in alone.weights.items()} == {n: w.shape for n, w in taken.items()}


def test_a_step_leaves_the_heads_of_other_depths() -> None:
    network, (dense, u) = supernet(), inputs()
    optimizer = SliceAdagrad(network, 0.1, 1e-2)
    a = next(a for a in drawn(20) if len(a.blocks) == 3)
    before = network.weights["head_dense"].detach().clone()
    network(prune(a), dense, u).square().mean().backward()
    optimizer.step()
    moved = (network.weights["head_dense"] != before).any(1)
    assert moved.tolist() == [False, False, True, False]


def test_ranks_with_networks_of_different_depth_unite_their_heads() -> None:
    layout = supernet().layout
    heads = [slices_of(prune(a), layout)["head_sparse"] for a in drawn(20) if len(a.blocks) in (2, 4)]
    union = merged(heads)
    assert union.rows == (8, 32)
    whole = torch.randn(32, 8)
    for part in heads:
        assert torch.equal(part.within(union).take(union.take(whole)), part.take(whole))


def test_the_narrow_space_has_integer_widths_and_is_in_the_config() -> None:
    narrow = SpaceConfig(name="narrow").make()
    assert narrow == SPACES["narrow"] and narrow.depths == (5, 6, 7, 8, 9)
    assert narrow.dense_widths == narrow.sparse_widths == tuple(range(4, 33))
    assert SpaceConfig(name="narrow", blocks=4, fewest_blocks=0).make().depths == (4,)
    assert SpaceConfig(blocks=6, fewest_blocks=3).make().depths == (3, 4, 5, 6)
    with pytest.raises(UserError, match="config key search.space.*fewest_blocks: must be from 1 to blocks, which is 4"):
        SpaceConfig(name="narrow", blocks=4).check()
    widths = {b.dense_width for a in drawn(200, narrow) for b in a.blocks}
    assert widths == set(range(4, 33))


def test_the_size_counts_all_depths() -> None:
    by_depth = [10 ** size(replace(FIXED, blocks=d)) for d in (2, 3, 4, 5)]
    assert 10 ** (size(SPACE) - size(FIXED)) == pytest.approx(sum(by_depth) / by_depth[-1])


def test_a_space_comes_back_with_its_depths_and_without_any() -> None:
    for space in (SPACE, FIXED):
        assert Space.from_json(json.loads(json.dumps(space.to_json())), "x") == space
    assert "fewest_blocks" in SPACE.to_json()


def test_a_search_trains_and_scores_networks_of_all_depths(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Through both stages; what it leaves loads as a searched network of its space."""
    directory = tmp_path_factory.mktemp("depth") / "run"
    depth = ["search.space.fewest_blocks=1", "search.evolution.population=12", "search.evolution.generations=2"]
    run_stages(NASRec(), nasrec_run(prepared(tmp_path_factory), directory, *depth))
    seen = json.loads((directory / "evolution.json").read_text())["seen"]
    assert {len(c["blocks"]) for c in seen} == {1, 2, 3}
    found, space = load(directory / "architecture.json", searched=True)
    assert space.depths == (1, 2, 3)
    assert ArchitectureNetwork(found, space, 4, 1).key == min(seen, key=lambda c: c["fitness"])["key"]
