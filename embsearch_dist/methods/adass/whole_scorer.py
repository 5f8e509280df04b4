"""Score subnets of a frozen supernet behind which stands any backbone: nothing can be added up, so each runs whole.

The pooled rows of the validation sample are looked up once, as for an additive backbone. For each subnet its transform
and the whole backbone then run on them. So a score costs a forward pass behind the tables, and one that differs in a
single field costs as much as any.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.adass.layout import layout_for
from embsearch_dist.methods.adass.passes import look_up
from embsearch_dist.methods.adass.scoring import Scoring
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.ranks.context import Context

ROWS_TOGETHER = 8192  # whose activations are held at a time


class WholeScorer(Scoring):
    """Scores subnets of any backbone, in float32."""

    def __init__(self, model: SupernetModel, batches: Sequence[Batch], context: Context, area: bool = True) -> None:
        """
        Args:
            batches: this rank's share of the sample; all ranks hold equally many batches.
            area: whether AUC is wanted; a sample of one class is refused then, and has an AUC of NaN otherwise.

        Raises:
            UserError: the sample has one class, and AUC is wanted.
        """
        super().__init__(model, context)
        self.every = range(self.fields)
        with torch.no_grad():
            self.pooled, self.dense, self.own_labels, self.known = look_up(model, batches, context)
            self.moments = self._moments(self.pooled)
        self.layout = layout_for(context.device, len(self.own_labels))
        self._share(self.own_labels)
        self._check_classes(area)

    def part(self, rows: int) -> WholeScorer:
        """A scorer of the first ``rows`` rows over all ranks, rounded up to as many on each; itself if it has no more.

        Statistics of a norm stay those of the whole sample.
        """
        own = -(-rows // self.context.world_size)
        if own >= min(self.rows_of):
            return self
        few = copy.copy(self)
        few.pooled, few.dense, few.own_labels = self.pooled[:, :own], self.dense[:own], self.own_labels[:own]
        few.known = self.known[:, :own]
        few._share(few.own_labels)
        few._forget()
        return few

    @torch.no_grad()
    def logits(self, choices: torch.Tensor) -> torch.Tensor:
        """``choices [K, F]`` candidate indices -> logits of this rank's rows ``[K, rows]``."""
        device = self.context.device
        out = torch.empty(len(choices), self.scored, device=device)
        for start in range(0, self.scored, ROWS_TOGETHER):
            part = slice(start, start + ROWS_TOGETHER)
            x, dense = self.pooled[:, part], self.dense[part]
            for k, choice in enumerate(choices.to(device)):
                kept = self.unify.present[choice].to(x.dtype)
                out[k, part] = self.backbone(self._chosen(x, choice, self.every) * kept[:, None], dense)
        return out

    def logits_near(self, base: Sequence[int], choices: torch.Tensor) -> torch.Tensor:
        """:meth:`logits`: a backbone that is no sum has nothing in common with that of ``base``."""
        return self.logits(choices)
