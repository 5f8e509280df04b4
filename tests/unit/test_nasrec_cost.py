"""Parameters and FLOPs of NASRec's architectures against counts by hand and published figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embsearch_dist.networks import cost as c
from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import canonical
from embsearch_dist.networks.cost import Cost, network_cost
from embsearch_dist.networks.sampling import SCHEMES, draw
from embsearch_dist.networks.space import SPACES, Space

FULL, SMALL = SPACES["full"], SPACES["small"]
PLAIN = Block(("fc",), 16, ("efc",), 4, (0,), (0,), (0,), (0,), False, False)


def test_linear_layers_by_hand() -> None:
    assert c.linear(3, 5) == Cost(3 * 5 + 5, 2 * 15)
    assert c.linear(3, 5, rows=7) == Cost(20, 7 * 30)
    assert c.fc(3, 5) == Cost(20 + 10, 30)
    assert c.sum_(9, 5) == Cost(9 * 5 + 5 + 10, 90)
    # The gate has the columns of the other side.
    assert c.gating([9], [7], 5) == Cost(9 * 7 + 7 + 7 * 5 + 5 + 10, 2 * 63 + 2 * 35)
    # One gate for several sources: as wide as the widest of them.
    assert c.gating([9, 4], [7, 3], 5) == Cost(13 * 7 + 7 + 10 * 5 + 5 + 10, 2 * 91 + 2 * 50)
    assert c.dense_to_sparse(5, 3, 16) == Cost(5 * 48 + 48 + 96, 2 * 240)
    assert c.fm(5, 16) == Cost(16 * 5 + 5 + 10, 160)


@pytest.mark.parametrize(("dense", "tokens"), [(1, 2), (2, 2), (16, 6), (32, 8), (512, 32), (768, 39), (1024, 45)])
def test_operator_balancing_keeps_the_pairs_near_the_width(dense: int, tokens: int) -> None:
    assert c.projected_tokens(dense) == tokens
    if dense >= 16:
        assert tokens * (tokens + 1) / 2 == pytest.approx(dense, rel=0.35)


def test_dot_product_by_hand() -> None:
    # 13 columns to a token of 16; 26 tokens to 6; 7 x 16 times 16 x 7; 21 products to 16.
    parameters = 13 * 16 + 16 + 26 * 6 + 6 + 21 * 16 + 16 + 2 * 16
    flops = 2 * (13 * 16 + 16 * 26 * 6 + 7 * 16 * 7 + 21 * 16)
    assert c.dot_product(13, 26, 16, 16) == Cost(parameters, flops)


def test_sparse_operators_by_hand() -> None:
    assert c.efc(26, 48, 16) == Cost(26 * 48 + 48 + 96, 2 * 16 * 26 * 48)
    square = 16 * 16 + 16
    parameters = 26 * 48 + 48 + 96 + 6 * square + 2 * 32
    flops = 2 * (16 * 26 * 48 + 6 * 48 * 16 * 16 + 2 * 48 * 48 * 16)
    assert c.attention(26, 48, 16) == Cost(parameters, flops)


def test_a_network_by_hand() -> None:
    """Stem 3 columns, 5 fields. Block 1: fc 16, efc 4, both mergers. Block 2: gating 8, efc 2."""
    space = Space(2, sparse_widths=(2, 4), dense_widths=(8, 16), tokens=2, width=8)
    first = replace(PLAIN, dense_to_sparse=True, fm=True)
    second = Block(("gating",), 8, ("efc",), 2, (1,), (0, 1), (0,), (1,), False, False)
    found = network_cost(Architecture((first, second)), space, 3, 5)
    fc = Cost(3 * 16 + 16 + 32, 2 * 48)
    efc = Cost(5 * 4 + 4 + 8, 2 * 8 * 20)
    mergers = Cost(16 * 16 + 16 + 32, 2 * 256) + Cost(8 * 16 + 16 + 32, 2 * 128)
    assert found.blocks[0] == fc + efc + mergers
    gating = Cost(3 * 16 + 16 + 16 * 8 + 8 + 16, 2 * (48 + 128))  # a gate of the stem's 3 columns, on 16
    tokens = 5 + 4 + 2  # fields, and the first block's with the merged ones
    assert found.blocks[1] == gating + Cost(tokens * 2 + 2 + 4, 2 * 8 * tokens * 2)
    assert found.head == Cost(8 + 2 * 8 + 1, 2 * 24)
    assert found.total == found.blocks[0] + found.blocks[1] + found.head


def test_no_dense_columns_cost_as_one() -> None:
    a = Architecture((PLAIN,))
    assert network_cost(a, FULL, 0, 5) == network_cost(a, FULL, 1, 5)


def test_several_operators_add_up() -> None:
    both = replace(PLAIN, dense=("fc", "sum"), sparse=("efc", "attention"))
    found = network_cost(Architecture((both,)), FULL, 3, 5).blocks[0]
    assert found == c.fc(3, 16) + c.sum_(3, 16) + c.efc(5, 4, 16) + c.attention(5, 4, 16)
    # All that is added is filled up to the widest.
    wide = Architecture((PLAIN, replace(PLAIN, dense=("sum",), left=(0, 1), right=(0,))))
    assert network_cost(wide, FULL, 3, 5).blocks[1] == c.sum_(16, 16) + c.efc(5, 4, 16)


def test_dead_parts_cost_nothing() -> None:
    dead = replace(PLAIN, dense=("gating",), dense_width=1024, sparse=("attention",), dense_to_sparse=True, fm=True)
    found = network_cost(Architecture((dead, PLAIN)), FULL, 3, 5)
    assert found.blocks[0] == Cost(0, 0)
    assert found.total == network_cost(Architecture((PLAIN,)), FULL, 3, 5).total
    # Only its tokens are read: the dense branch and FM go, with the merger the dense branch stays.
    last = replace(PLAIN, sparse_sources=(1,))
    without = replace(dead, dense_to_sparse=False)
    assert network_cost(Architecture((without, last)), FULL, 3, 5).blocks[0] == c.attention(5, 4, 16)
    merged = network_cost(Architecture((dead, last)), FULL, 3, 5).blocks[0]
    assert merged == c.attention(5, 4, 16) + c.gating([3], [3], 1024) + c.dense_to_sparse(1024, 8, 16)


def test_encodings_of_one_network_cost_the_same() -> None:
    generator = np.random.default_rng(0)
    for k in range(60):
        a = draw(FULL, SCHEMES[k % 3], generator)
        assert network_cost(a, FULL, 13, 26).total == network_cost(canonical(a), FULL, 13, 26).total


def published(rows: str) -> Architecture:
    """One block a line: dense, Dd, sparse, Ns, then sources (digits) of dense, sparse, left, right, and mergers."""
    blocks = []
    for row in rows.strip().splitlines():
        dense, dense_width, sparse, sparse_width, *sources, to_sparse, fm = row.split()
        columns, tokens, left, right = (tuple(map(int, s)) for s in sources)
        widths = int(dense_width), int(sparse_width)
        parts = ((dense,), widths[0], (sparse,), widths[1], columns, tokens, left, right)
        blocks.append(Block(*parts, dense_to_sparse=to_sparse == "1", fm=fm == "1"))
    return Architecture(tuple(blocks))


# The best architectures on Criteo that NASRec's authors report.
BEST_FULL = published("""
gating      128 attention 64 0    0    0 0 1 0
dot_product  32 efc       64 0    0    0 1 0 0
dot_product 768 efc       32 12   012  1 2 0 1
gating      768 efc       48 03   0123 2 0 1 0
fc           16 efc       16 0234 0123 3 1 0 1
fc          768 attention 16 0345 14   2 3 1 0
fc          128 attention 48 023  13   6 1 0 1
""")
BEST_SMALL = published("""
fc           256 efc 48 0    0    0 0 1 0
dot_product 1024 efc 48 1    01   1 0 1 1
fc           128 efc 16 02   012  0 0 1 0
fc            16 efc 48 2    02   1 2 0 1
dot_product  128 efc 32 0234 24   2 0 0 0
fc            16 efc 64 0125 125  3 5 1 0
fc          1024 efc 64 035  0125 0 5 0 0
""")


def test_the_published_architectures_cost_what_was_measured() -> None:
    """fvcore's multiply-adds of the authors' own networks: 2.21 M (Small), 1.26 M (Full, its attention's scores and
    weighted sums not counted: 64 tokens in block 1, 48 in block 7)."""
    assert network_cost(BEST_SMALL, SMALL, 13, 26).total.flops / 2e6 == pytest.approx(2.21, abs=0.006)
    attention = 2 * (64 * 64 + 48 * 48) * 16
    found = network_cost(BEST_FULL, FULL, 13, 26).total.flops / 2
    assert (found - attention) / 1e6 == pytest.approx(1.26, abs=0.006)
    # Blocks 4 to 6 of the one and block 6 of the other are read by nobody.
    assert [k for k, b in enumerate(network_cost(BEST_FULL, FULL, 13, 26).blocks, 1) if not b.flops] == [4, 5, 6]
    assert [k for k, b in enumerate(network_cost(BEST_SMALL, SMALL, 13, 26).blocks, 1) if not b.flops] == [6]
