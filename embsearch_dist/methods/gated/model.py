"""A model whose embedding columns are weighed row by row: gates of iHAS, field weights of AdaFS."""

from __future__ import annotations

import torch
from torch import nn

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.models.backbones.making import backbone_of
from embsearch_dist.models.model import CTRModel, Head, bare, seeded
from embsearch_dist.models.tables import MixedTables
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema


class GatedModel(CTRModel):
    """Tables of one width, a replicated selector that looks at their pooled rows, and the head behind both.

    The selector's parameters are the model's outer parameters: held-out rows alone train them. Selector and head
    are each under DDP, since the one learns in other steps than the other.
    """

    tables: MixedTables

    def __init__(self, config: Config, schema: Schema, width: int, selector: nn.Module, context: Context) -> None:
        """``width``: d of every field. ``selector``: any module; tasks know how to call it."""
        super().__init__()
        m, seed = config.model, config.run.seed
        self.width, fields = width, len(schema.fields)
        uniform = Allocation.uniform(schema, width)
        self.tables = MixedTables(uniform, context, config.dist, config.optim, seed, m.init_std, partial=True)
        with seeded(seed):
            backbone = backbone_of(m, fields, width, len(schema.dense))
        self.head = self._wrap(Head(nn.Identity(), backbone), context)
        self.selector = self._wrap(selector, context)
        # In a tuple: a registered module would stand in the state a second time.
        self._replicated = (nn.ModuleDict({"head": self.bare_head, "selector": self.bare_selector}),)

    @property
    def bare_selector(self) -> nn.Module:
        """The selector without DDP around it."""
        return bare(self.selector)

    @property
    def replicated(self) -> nn.Module:
        return self._replicated[0]

    @property
    def outer_parameters(self) -> list[nn.Parameter]:
        return list(self.bare_selector.parameters())

    @property
    def normed(self) -> list[nn.Module]:
        """Modules with running statistics that ordinary batches move and held-out ones only read."""
        return []

    def embed(self, batch: Batch) -> torch.Tensor:
        """Pooled embeddings ``[B, F, d]``, fields in schema order, nothing weighed yet."""
        return self.tables(batch.sparse).stack().transpose(0, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits ``[B]`` with every column open."""
        return self.head(batch.dense, self.embed(batch))
