"""Parameters and FLOPs of an architecture, counted from its structure: no network is built.

FLOPs are those of one row, forward: two for each multiply-add of a matrix product. Left out are bias additions,
LayerNorm, activations, softmax, the squares of the factorization machine, sums, and the look-up of embeddings.
Parameters are those of the blocks and the head; the embedding tables are not among them.

Dead parts cost nothing: :func:`~embsearch_dist.networks.canonical.prune` takes them out first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.space import Space


@dataclass(frozen=True)
class Cost:
    """Parameters (numbers) and FLOPs (of one row)."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops + other.flops)


@dataclass(frozen=True)
class NetworkCost:
    """What each block costs, in the order of the architecture (a dead one nothing), and the head."""

    blocks: tuple[Cost, ...]
    head: Cost

    @property
    def total(self) -> Cost:
        return sum(self.blocks, self.head)


@dataclass(frozen=True)
class Shape:
    """What a source gives: columns of its dense output, tokens of its sparse output."""

    columns: int
    tokens: int


def network_cost(
    architecture: Architecture, space: Space, n_dense: int, fields: int, layer_norm: str = "all"
) -> NetworkCost:
    """Count an architecture on data of ``n_dense`` dense columns (0 counts as one column of zeros) and ``fields``.

    Args:
        layer_norm: ``all`` as in the supernet, or ``attention`` for a network that has been trained without the others
            (:class:`embsearch_dist.networks.network.ArchitectureNetwork`); parameters differ, FLOPs do not.
    """
    costs = []
    for block, found in zip(prune(architecture), operator_costs(architecture, space, n_dense, fields)):
        total = sum(found.values(), Cost())
        if block is not None and layer_norm != "all":
            total += Cost(-norms_left_out(block, space))
        costs.append(total)
    last = output_shape(architecture.blocks[-1], space)
    return NetworkCost(tuple(costs), linear(last.columns + last.tokens * space.width, 1))


def operator_costs(architecture: Architecture, space: Space, n_dense: int, fields: int) -> list[dict[str, Cost]]:
    """Of each block what each of its live parts costs, by the part's name; arguments as :func:`network_cost`."""
    shapes = [Shape(max(1, n_dense), fields)]
    costs: list[dict[str, Cost]] = []
    for block in prune(architecture):
        costs.append({} if block is None else block_costs(block, shapes, space))
        shapes.append(Shape(0, 0) if block is None else output_shape(block, space))
    return costs


def norms_left_out(block: Block, space: Space) -> int:
    """Parameters of a block's LayerNorms but for those behind attention's residuals."""
    columns = len(block.dense) * block.dense_width + len(block.sparse) * block.sparse_width
    columns += block.dense_to_sparse * space.tokens * space.width + block.fm * block.dense_width
    return layer_norm(columns).parameters


def output_shape(block: Block, space: Space) -> Shape:
    """Of the outputs other blocks see, merged tokens included."""
    return Shape(block.dense_width, block.sparse_width + space.tokens * block.dense_to_sparse)


def block_costs(block: Block, shapes: Sequence[Shape], space: Space) -> dict[str, Cost]:
    """All parts of one block by name: its operators and mergers.

    Args:
        shapes: of the stem and of the blocks before it.
    """
    width, dense, sparse = space.width, block.dense_width, block.sparse_width
    columns = sum(shapes[s].columns for s in block.dense_sources)
    tokens = sum(shapes[s].tokens for s in block.sparse_sources)
    left, right = ([shapes[s].columns for s in side] for side in (block.left, block.right))
    parts = {
        "fc": lambda: fc(columns, dense),
        "dot_product": lambda: dot_product(columns, tokens, dense, width),
        "gating": lambda: gating(left, right, dense),
        "sum": lambda: sum_(max(left + right), dense),
        "efc": lambda: efc(tokens, sparse, width),
        "attention": lambda: attention(tokens, sparse, width),
    }
    found = {name: parts[name]() for name in (*block.dense, *block.sparse)}
    if block.dense_to_sparse:
        found["dense_to_sparse"] = dense_to_sparse(dense, space.tokens, width)
    if block.fm:
        found["fm"] = fm(dense, width)
    return found


def projected_tokens(dense_width: int) -> int:
    """Tokens k that dot_product projects its sparse input to: k(k+1)/2 products are about ``dense_width`` of them.

    The paper's operator balancing, from the width the block chose: round(sqrt(2 Dd)), at least 2.
    """
    return max(2, round(math.sqrt(2 * dense_width)))


def fc(columns: int, dense: int) -> Cost:
    """Linear, LayerNorm, ReLU."""
    return linear(columns, dense) + layer_norm(dense)


def dot_product(columns: int, tokens: int, dense: int, width: int) -> Cost:
    """The dense input as one token beside k projected ones, all pairs' inner products, Linear, LayerNorm.

    The inner products come from the product of the (k + 1) x width matrix with itself, whose whole result is counted.
    """
    k = projected_tokens(dense)
    pairs = Cost(0, _product(k + 1, width, k + 1))
    inputs = linear(columns, width) + linear(tokens, k, rows=width)
    return inputs + pairs + linear(k * (k + 1) // 2, dense) + layer_norm(dense)


def gating(left: Sequence[int], right: Sequence[int], dense: int) -> Cost:
    """sigmoid(Linear(left)) * right, Linear, LayerNorm; the gate has the columns of the widest right source."""
    return linear(sum(left), max(right)) + linear(sum(right), dense) + layer_norm(dense)


def sum_(wider: int, dense: int) -> Cost:
    """left + right, filled up to the widest source's columns, Linear, LayerNorm."""
    return linear(wider, dense) + layer_norm(dense)


def efc(tokens: int, sparse: int, width: int) -> Cost:
    """Linear over the tokens, LayerNorm over them, ReLU."""
    return linear(tokens, sparse, rows=width) + layer_norm(sparse)


def attention(tokens: int, sparse: int, width: int) -> Cost:
    """Linear over the tokens and LayerNorm; self-attention, then a network of two layers, each with residual and
    LayerNorm. The heads share the width, so their number does not enter."""
    project = linear(tokens, sparse, rows=width) + layer_norm(sparse)
    inside = [linear(width, width, rows=sparse)] * 4  # query, key, value, output
    scores = Cost(0, _product(sparse, width, sparse))
    weighted = Cost(0, _product(sparse, sparse, width))
    layers = [linear(width, width, rows=sparse)] * 2
    return sum([*inside, scores, weighted, *layers, layer_norm(width), layer_norm(width)], project)


def dense_to_sparse(dense: int, tokens: int, width: int) -> Cost:
    """Linear from the dense output to ``tokens`` tokens, LayerNorm."""
    return linear(dense, tokens * width) + layer_norm(tokens * width)


def fm(dense: int, width: int) -> Cost:
    """Factorization machine of the sparse output, then Linear and LayerNorm to the dense width."""
    return linear(width, dense) + layer_norm(dense)


def linear(inputs: int, outputs: int, rows: int = 1) -> Cost:
    """A linear layer with bias, used on so many ``rows`` of one sample."""
    return Cost(inputs * outputs + outputs, _product(rows, inputs, outputs))


def layer_norm(columns: int) -> Cost:
    """Scale and shift."""
    return Cost(2 * columns)


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns
