"""What a NASRec architecture computes, from weights given by name: the same code for a network that is trained alone
and for one that is cut out of the supernet (operators: notes to Zhang et al. 2023, section 3.2).

Dense outputs are ``[B, Dd]``. Sparse ones are ``[B, width, tokens]``, tokens last, so that the linear maps over tokens
and their LayerNorm read what lies side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.errors import UserError
from embsearch_dist.kernels.attention import attention
from embsearch_dist.kernels.linear import linear, pair_products, pairs
from embsearch_dist.networks.architecture import HEADS, Architecture, Block
from embsearch_dist.networks.canonical import canonical, key
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.slices import Layout, initial, slices_of
from embsearch_dist.networks.space import Space, load

Weights = Mapping[str, torch.Tensor]


def features(
    blocks: Sequence[Block | None], weights: Weights, dense: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads: dense ``[B, Dd]`` and sparse ``[B, width, T]`` of the last block.

    Args:
        blocks: pruned, in their places; None for a dead one.
        weights: as :func:`embsearch_dist.networks.slices.slices_of` names and shapes them.
        dense: ``[B, I]``; without columns it counts as one of zeros.
        tokens: ``[B, width, F]``.
    """
    denses: list[torch.Tensor | None] = [dense if dense.shape[1] else dense.new_zeros(dense.shape[0], 1)]
    sparses: list[torch.Tensor | None] = [tokens.contiguous()]  # once, and not by everything that reads it
    for number, block in enumerate(blocks, 1):
        if block is None:
            denses.append(None)
            sparses.append(None)
            continue
        own = _Named(weights, f"block{number}_")
        d = _dense(block, own, denses, sparses) if block.dense else None
        s = _sparse(block, own, sparses) if block.sparse else None
        # Both mergers read what the operators left, not what the other merger has made of it.
        merged_d, merged_s = d, s
        if block.fm:
            assert d is not None and s is not None
            merged_d = d + own.norm("fm", own.linear("fm", pair_products(s)))
        if block.dense_to_sparse:
            assert d is not None and s is not None
            made = own.norm("merge", own.linear("merge", d))
            merged_s = torch.cat([made.view(made.shape[0], tokens.shape[1], -1), s], 2)
        denses.append(merged_d)
        sparses.append(merged_s)
    last_d, last_s = denses[-1], sparses[-1]
    assert last_d is not None and last_s is not None
    return last_d, last_s


def head(weights: Weights, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """Logits ``[B]``: one linear unit on both outputs of the last block."""
    logits = torch.addmv(weights["head_bias"].expand(dense.shape[0]), dense, weights["head_dense"].reshape(-1))
    return logits.addmv_(sparse.flatten(1), weights["head_sparse"].reshape(-1))


class _Named:
    """The weights of one block."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[self._prefix + name]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension."""
        shape = x.shape
        out = linear(x.reshape(-1, shape[-1]), self[f"{name}_weight"], self[f"{name}_bias"])
        return out.view(*shape[:-1], -1)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """LayerNorm over the last dimension; ``x`` itself where the network has none in this place."""
        if f"{self._prefix}{name}_scale" not in self._weights:
            return x
        return functional.layer_norm(x, x.shape[-1:], self[f"{name}_scale"], self[f"{name}_shift"])


def _dense(
    block: Block, own: _Named, denses: Sequence[torch.Tensor | None], sparses: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """D ``[B, Dd]``: the sum of the block's dense operators."""
    found: list[torch.Tensor] = []
    if block.reads_dense:
        x = _joined([denses[s] for s in block.dense_sources], 1)
    if "fc" in block.dense:
        found.append(torch.relu(own.norm("fc", own.linear("fc", x))))
    if "dot_product" in block.dense:
        tokens = own.linear("dot_tokens", _joined([sparses[s] for s in block.sparse_sources], 2))
        z = torch.cat([own.linear("dot_dense", x)[:, :, None], tokens], 2)
        found.append(own.norm("dot", own.linear("dot", pairs(z))))
    if "gating" in block.dense:
        gate = torch.sigmoid(own.linear("gate", _joined([denses[s] for s in block.left], 1)))
        right = [denses[s] for s in block.right]
        gated = _joined([r * gate[:, : r.shape[1]] for r in right if r is not None], 1)
        found.append(own.norm("gating", own.linear("gating", gated)))
    if "sum" in block.dense:
        sides = [denses[s] for s in (*block.left, *block.right)]
        found.append(own.norm("sum", own.linear("sum", _added([x for x in sides if x is not None]))))
    return _added(found)


def _sparse(block: Block, own: _Named, sparses: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """S ``[B, width, Ns]``: the sum of the block's sparse operators."""
    x = _joined([sparses[s] for s in block.sparse_sources], 2)
    found: list[torch.Tensor] = []
    if "efc" in block.sparse:
        found.append(torch.relu(own.norm("efc", own.linear("efc", x))))
    if "attention" in block.sparse:
        found.append(_attention(own, own.norm("attention", own.linear("attention", x))))
    return _added(found)


def _attention(own: _Named, x: torch.Tensor) -> torch.Tensor:
    """Self-attention among tokens, then two layers, each with a residual and LayerNorm; ``[B, width, Ns]``."""
    x = x.transpose(1, 2).contiguous()
    x = own.norm("residual1", x + own.linear("out", attention(own.linear("qkv", x), HEADS)))
    x = own.norm("residual2", x + own.linear("ffn2", torch.relu(own.linear("ffn1", x))))
    return x.transpose(1, 2)


def _joined(parts: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor:
    found = [p for p in parts if p is not None]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _added(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of matrices, of which narrower ones have zeros behind their columns."""
    if len(parts) == 1:
        return parts[0]
    widest = max(x.shape[-1] for x in parts)
    padded = [functional.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in parts]
    return padded[0] + padded[1] if len(padded) == 2 else torch.stack(padded).sum(0)


def read_network(path: str, fields: int, width: int, dense: int, layer_norm: str = "all") -> ArchitectureNetwork:
    """The network of an architecture file behind embeddings of one width; ``layer_norm`` as its own argument.

    Raises:
        UserError: the file is missing or wrong, or its space has another width.
    """
    architecture, space = load(path)
    check_width(path, space, width)
    return ArchitectureNetwork(architecture, space, fields, dense, layer_norm)


def check_width(path: str, space: Space, width: int) -> None:
    """Refuse embeddings of another width than the space's."""
    if space.width != width:
        raise UserError(
            f"{path}: its space has embeddings of width {space.width}, and here they come with {width}. "
            f"Set --model.unify always, --model.transform width and --model.unified_width {space.width}, "
            f"or --allocation ues-{space.width}"
        )


class ArchitectureNetwork(nn.Module):
    """One architecture with weights of its own, in the place of a backbone.

    Only its live parts exist, so DDP waits for no gradient that never comes.

    Attributes:
        key: of the architecture.
        flops: of a forward pass of one row.

    Args:
        architecture: any encoding; its canonical form is built.
        space: token width and the number of merged tokens.
        fields: F.
        dense: dense columns of the data; 0 gives one of zeros.
        layer_norm: ``all`` keeps the LayerNorms that the supernet has, so that the network computes what its slices
            do; ``attention`` only those behind the two residuals of attention, as the published code trains what it
            has found.
    """

    def __init__(
        self, architecture: Architecture, space: Space, fields: int, dense: int, layer_norm: str = "all"
    ) -> None:
        super().__init__()
        self.blocks = canonical(architecture).blocks
        self.key = key(architecture)
        self.flops = network_cost(architecture, space, dense, fields).total.flops
        self.width, self.fields = space.width, fields
        layout = Layout(space, max(1, dense), fields)
        parts = slices_of(self.blocks, layout, layer_norm)
        self.weights = nn.ParameterDict({n: nn.Parameter(initial(p)) for n, p in parts.items()})

    def forward(self, u: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``u [B, F, width]``, ``dense [B, n_dense]`` -> logits ``[B]``."""
        weights = dict(self.weights.items())
        return head(weights, *features(self.blocks, weights, dense, u.transpose(1, 2)))
