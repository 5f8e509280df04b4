"""The controller of AdaFS, the choice by its weights, and the model around it (Lin et al. 2022).

There are two BatchNorms. That of the embeddings is the model's: it is in force from the first step, ordinary batches
train its scale and shift (one per column, for all fields, from ``model.gain`` on) and move its statistics, and held-out
batches only read them. That of the controller's outputs is the controller's: held-out batches train its scale and
shift; its statistics follow both kinds of batch, for both pass through it in training mode. The statistics are those of
the global batch, hence alike on all ranks, and stand in checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.kernels.linear import Linear
from embsearch_dist.methods.adafs.config import AdaFSConfig
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.models.model import Head, seeded
from embsearch_dist.models.norm import UnifyNorm
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema

SEED = 1 << 32  # added to the run's seed: the controller must not begin with the backbone's numbers


class Controller(nn.Module):
    """Weights of N fields for each row: ``softmax(dropout(relu(norm(W e))))``, e the N*d columns of the row.

    Args:
        fields: N.
        width: d.
        dropout: probability with which an output is 0 before the softmax, in training.
        synchronise: the batch is spread over ranks; its statistics are those of all of it.
    """

    def __init__(self, fields: int, width: int, dropout: float, synchronise: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear = Linear(fields * width, fields)
        # BatchNorm takes a bias out again: its gradient would be rounding noise, which Adam makes full steps of.
        nn.init.zeros_(self.linear.bias.requires_grad_(False))
        # The outputs as the columns of one field: an ordinary BatchNorm over N channels.
        self.norm = UnifyNorm(1, 1, fields, "field", 1.0, synchronise)
        self.register_buffer("choice", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.choice: torch.Tensor

    def forward(self, e: torch.Tensor) -> torch.Tensor:
        """``e [B, N, d]`` -> weights ``[B, N]``, each row adds up to 1."""
        outputs = self.linear(e.flatten(1))
        outputs = self.norm(outputs[None], self.choice)[:, 0]
        return torch.softmax(functional.dropout(torch.relu(outputs), self.dropout, self.training), 1)


def keep_top(weights: torch.Tensor, k: int, renormalise: bool) -> torch.Tensor:
    """AdaFS-hard: the k largest of each row of ``weights [B, N]``, the others 0.

    Of equal weights the first in field order stays: ReLU leaves many equal ones, and which of them ``topk`` takes
    depends on the device. The choice itself has no gradient.

    Args:
        renormalise: what a row keeps adds up to 1.
    """
    if torch.compiler.is_exporting():  # a stable sort has no form in ONNX
        kept = (_places(weights) < k).to(weights.dtype)
    else:
        order = weights.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
        kept = torch.zeros_like(weights).scatter(1, order, 1.0)
    weights = weights * kept
    return weights / weights.sum(1, keepdim=True) if renormalise else weights


def _places(weights: torch.Tensor) -> torch.Tensor:
    """Where each of ``weights [B, N]`` stands in its row, the largest first, of equal ones the first: ``[B, N]``."""
    mine, other = weights[:, :, None], weights[:, None, :]
    before = torch.ones(weights.shape[1], weights.shape[1], dtype=torch.bool).tril(-1)  # the other comes first
    return ((other > mine) | ((other == mine) & before)).sum(2)


class AdaFSModel(GatedModel):
    """A gated model with a BatchNorm between tables and all that follows; the selector is a :class:`Controller`."""

    def __init__(self, config: Config, schema: Schema, search: AdaFSConfig, context: Context) -> None:
        fields, width, several = len(schema.fields), search.width, context.world_size > 1
        # In a tuple: it becomes a part of the head in `_wrap`, which the base class calls.
        self._norm = (UnifyNorm(fields, 1, width, search.norm, config.model.gain, several),)
        with seeded(config.run.seed + SEED):
            controller = Controller(fields, width, search.dropout, several)
        super().__init__(config, schema, width, controller, context)
        self._choice = torch.zeros(fields, dtype=torch.int64, device=context.device)

    def _wrap(self, module: nn.Module, context: Context) -> nn.Module:
        if isinstance(module, Head):
            # The head's optimizer then trains it, DDP averages its gradients, wherever in a step it is called, and
            # outer steps freeze it.
            module.add_module("norm", self.norm)
        return super()._wrap(module, context)

    @property
    def norm(self) -> UnifyNorm:
        """BatchNorm of the embeddings."""
        return self._norm[0]

    @property
    def normed(self) -> list[nn.Module]:
        return [self.norm]

    def raw(self, batch: Batch) -> torch.Tensor:
        """Pooled embeddings ``[F, B, d]`` as the tables hold them."""
        return self.tables(batch.sparse).stack()

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        """``raw [F, B, d]`` -> ``[B, F, d]``; in training mode this moves the running statistics."""
        return self.norm(raw, self._choice)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Normalised pooled embeddings ``[B, F, d]``, nothing weighed yet."""
        return self.normalise(self.raw(batch))
