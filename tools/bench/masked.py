"""The supernet as published: every operator at full width in every step, and zeros where the architecture has nothing.

It computes what :class:`embsearch_dist.methods.nasrec.model.SlicedNetwork` computes, from the same weights, and is the
reference that tests and ``tools/bench/nasrec.py`` hold the slices against. One thing differs from the published code:
LayerNorm counts the active columns alone, since with the inactive ones a network would not be what it is alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.methods.nasrec.model import SlicedNetwork
from embsearch_dist.networks.architecture import HEADS, Block
from embsearch_dist.networks.cost import projected_tokens
from embsearch_dist.networks.slices import Layout

Blocks = Sequence[Block | None]


class MaskedNetwork(nn.Module):
    """Reads the weights of a :class:`SlicedNetwork` and computes all of them.

    Args:
        network: whose weights are used; gradients come back to them whole.
    """

    def __init__(self, network: SlicedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, blocks: Blocks, dense: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """``u [B, F, width]``, ``dense [B, n_dense]`` -> logits ``[B]`` of a pruned architecture."""
        layout = self.network.layout
        rows = len(u)
        if not dense.shape[1]:
            dense = dense.new_zeros(rows, 1)
        denses, sparses = [dense], [u.transpose(1, 2)]
        for number, block in enumerate(blocks, 1):
            d, s = _Block(self.network, layout, number, block or _NOTHING, rows).run(denses, sparses)
            denses.append(d)
            sparses.append(s)
        w, width = self.network.weights, layout.space.width
        place = layout.exit_of(len(blocks))
        flat = sparses[-1].reshape(rows, -1) @ w["head_sparse"][place * width : (place + 1) * width].reshape(-1)
        return denses[-1] @ w["head_dense"][place] + flat + w["head_bias"][place]


class _Block:
    def __init__(self, network: SlicedNetwork, layout: Layout, number: int, block: Block, rows: int) -> None:
        self.weights, self.layout, self.number, self.block, self.rows = network.weights, layout, number, block, rows
        self.device = network.weights["head_bias"].device

    def weight(self, name: str) -> torch.Tensor:
        return self.weights[f"block{self.number}_{name}"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight(f"{name}_weight"), self.weight(f"{name}_bias"))

    def first(self, size: int, active: int) -> torch.Tensor:
        """A mask of ``size`` whose first ``active`` are open."""
        return (torch.arange(size, device=self.device) < active).float()

    def norm(self, name: str, x: torch.Tensor, active: int) -> torch.Tensor:
        """LayerNorm over the first ``active`` columns of the last dimension; zeros behind them."""
        mask, count = self.first(x.shape[-1], active), max(1, active)
        x = x * mask
        mean = x.sum(-1, keepdim=True) / count
        centred = (x - mean) * mask
        variance = centred.square().sum(-1, keepdim=True) / count
        normed = centred / torch.sqrt(variance + 1e-5)
        return (normed * self.weight(f"{name}_scale") + self.weight(f"{name}_shift")) * mask

    def joined(self, parts: list[torch.Tensor], chosen: tuple[int, ...], dim: int) -> torch.Tensor:
        """All sources side by side, zeros for those that are not chosen."""
        return torch.cat([p if k in chosen else torch.zeros_like(p) for k, p in enumerate(parts)], dim)

    def run(self, denses: list[torch.Tensor], sparses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        space, block = self.layout.space, self.block
        d = sum(self.dense(name, denses, sparses) * (name in block.dense) for name in space.dense_operators)
        s = sum(self.sparse(name, sparses) * (name in block.sparse) for name in space.sparse_operators)
        assert isinstance(d, torch.Tensor) and isinstance(s, torch.Tensor)
        made = self.norm("merge", self.linear("merge", d), space.tokens * space.width) * block.dense_to_sparse
        merged = torch.cat([made.view(self.rows, space.width, space.tokens), s], 2)
        squares = s.sum(2).square() - s.square().sum(2)
        return d + self.norm("fm", self.linear("fm", squares), block.dense_width) * block.fm, merged

    def dense(self, name: str, denses: list[torch.Tensor], sparses: list[torch.Tensor]) -> torch.Tensor:
        block, layout = self.block, self.layout
        active = block.dense_width
        if name == "fc":
            x = self.joined(denses, block.dense_sources, 1)
            return torch.relu(self.norm("fc", self.linear("fc", x), active))
        if name == "dot_product":
            k, most = projected_tokens(max(active, 1)), projected_tokens(layout.dense_max)
            token = self.linear("dot_dense", self.joined(denses, block.dense_sources, 1))
            tokens = self.linear("dot_tokens", self.joined(sparses, block.sparse_sources, 2)) * self.first(most, k)
            z = torch.cat([token[:, :, None], tokens], 2)
            below = torch.tril_indices(most + 1, most + 1, -1, device=z.device)
            pairs = torch.bmm(z.transpose(1, 2), z)[:, below[0], below[1]]
            return self.norm("dot", self.linear("dot", pairs), active)
        if name == "gating":
            gate = torch.sigmoid(self.linear("gate", self.joined(denses, block.left, 1)))
            gated = [p * gate[:, : p.shape[1]] for p in denses]
            return self.norm("gating", self.linear("gating", self.joined(gated, block.right, 1)), active)
        sides = [denses[s] for s in (*block.left, *block.right)] or [denses[0]]
        wider = self.weight("sum_weight").shape[1]
        total = sum(functional.pad(p, (0, wider - p.shape[1])) for p in sides)
        assert isinstance(total, torch.Tensor)
        return self.norm("sum", self.linear("sum", total), active)

    def sparse(self, name: str, sparses: list[torch.Tensor]) -> torch.Tensor:
        block, width = self.block, self.layout.space.width
        active, x = block.sparse_width, self.joined(sparses, block.sparse_sources, 2)
        if name == "efc":
            return torch.relu(self.norm("efc", self.linear("efc", x), active))
        x = self.norm("attention", self.linear("attention", x), active).transpose(1, 2)
        tokens = x.shape[1]
        q, k, v = self.linear("qkv", x).view(self.rows, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / (width // HEADS) ** 0.5
        closed = self.first(tokens, active) == 0
        mixed = torch.softmax(scores.masked_fill(closed, -1e30), -1) @ v
        x = self.norm("residual1", x + self.linear("out", mixed.transpose(1, 2).reshape(x.shape)), width)
        hidden = torch.relu(self.linear("ffn1", x))
        x = self.norm("residual2", x + self.linear("ffn2", hidden), width)
        return x.transpose(1, 2) * self.first(tokens, active)


_NOTHING = Block((), 0, (), 0, (), (), (), (), False, False)
