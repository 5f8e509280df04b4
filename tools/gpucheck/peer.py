"""The peer of check 9: DeepFM (Guo et al. 2017) in torch alone, as people write it.."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits


class DeepFM(nn.Module):
    """Linear part, factorisation machine and MLP on the embeddings of F fields and n dense columns.

    Args:
        sizes: rows of each table.
        bags: one ``nn.EmbeddingBag`` a field; otherwise all fields share one big ``nn.Embedding``.
        sparse: the gradients of bags are sparse tensors, as ``sparse=True`` makes them.
    """

    def __init__(
        self, sizes: Sequence[int], width: int, dense: int, hidden: Sequence[int], bags: bool, sparse: bool = True
    ) -> None:
        super().__init__()
        if bags:
            self.tables = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum", sparse=sparse) for n in sizes)
        else:
            self.tables = nn.ModuleList([nn.Embedding(sum(sizes), width)])
            first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
            self.register_buffer("first", first)
            self.first: torch.Tensor
        inputs = len(sizes) * width + dense
        self.linear = nn.Linear(inputs, 1)
        layers: list[nn.Module] = []
        for a, b in zip([inputs, *hidden], hidden, strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))
        self.bags = bags

    def forward(self, ids: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """``ids [B, F]`` int64, ``dense [B, n]`` -> logits ``[B]``."""
        if self.bags:
            u = torch.stack([table(ids[:, k : k + 1]) for k, table in enumerate(self.tables)], 1)
        else:
            u = self.tables[0](ids + self.first)
        x = torch.cat([u.flatten(1), dense], 1)
        fm = 0.5 * (u.sum(1).square() - u.square().sum(1)).sum(1)
        return self.linear(x).squeeze(1) + fm + self.mlp(x).squeeze(1)


class Training:
    """Adam for the dense part; for tables Adagrad on sparse gradients (bags) or dense Adam (one big table)."""

    def __init__(self, model: DeepFM, lr: float) -> None:
        self.model, tables = model, list(model.tables.parameters())
        rest = [p for n, p in model.named_parameters() if not n.startswith("tables.")]
        fused = next(model.parameters()).is_cuda
        own = torch.optim.Adagrad(tables, lr) if model.bags else torch.optim.Adam(tables, lr, fused=fused)
        self.optimizers: list[torch.optim.Optimizer] = [own, torch.optim.Adam(rest, lr, fused=fused)]

    def step(self, ids: torch.Tensor, dense: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """One training step; returns the loss, on the device."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = binary_cross_entropy_with_logits(self.model(ids, dense), label)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()
