"""The two ends of scoring: pooled rows from the tables, and from the sums of a subnet's terms to its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.adass.layout import Layout
from embsearch_dist.methods.adass.refit import HeadFit, Inherited
from embsearch_dist.methods.adass.terms import Sums
from embsearch_dist.methods.widest import known_in
from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.ranks.context import Context


class Frozen(Protocol):
    """What a pass needs to know of :class:`embsearch_dist.methods.adass.scorer.SubnetScorer`.

    Attributes:
        layers: weight (transposed) and bias of the MLP's layers behind the first.
        chunks: of ``layout.chunk_rows`` rows each; the first ``fit_chunks`` serve to fit heads, by ``fit_labels``.
        scored: rows in the others, without what fills the last one up.
    """

    context: Context
    layout: Layout
    backbone: Backbone
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    chunks: int
    fit_chunks: int
    fit_labels: torch.Tensor
    scored: int


class Output:
    """Where the sums of a pass go, chunk by chunk: through the rest of the MLP to logits, or first to a fit."""

    def __init__(self, scorer: Frozen, count: int) -> None:
        self.scorer, size = scorer, scorer.layout.chunk_rows
        device, skipped = scorer.context.device, scorer.fit_chunks
        self.found = torch.empty(count, scorer.chunks - skipped, size, device=device)
        self.fit = HeadFit(count, inherited(scorer), scorer.context) if skipped else None

    def take(self, chunk: int, candidates: slice, sums: Sums) -> None:
        """Sums ``[candidates, ...]`` of one chunk."""
        scorer, count = self.scorer, len(sums.number)
        plain = sums.number
        if sums.u.shape[1]:
            plain = plain + 0.5 * sums.u.view(*plain.shape, -1).square().sum(2)
        hidden = sums.first.view(count * plain.shape[1], scorer.backbone.first_width)
        if hidden.shape[1]:
            last = len(scorer.layers) - 1
            for weight, bias in scorer.layers[:last]:
                hidden = torch.addmm(bias, relu_(hidden), weight)
            hidden = relu_(hidden)
        if chunk < scorer.fit_chunks:
            assert self.fit is not None
            self.fit.add(candidates, hidden.view(*plain.shape, -1), plain, scorer.fit_labels[chunk])
            return
        target = self.found[candidates, chunk - scorer.fit_chunks]
        if self.fit is not None:
            target.copy_(self.fit.predict(candidates, hidden.view(*plain.shape, -1), plain))
        elif hidden.shape[1]:
            weight, bias = scorer.layers[-1]
            target.copy_(torch.addmm(bias, hidden, weight).view(count, -1) + plain)
        else:
            target.copy_(plain)

    def logits(self) -> torch.Tensor:
        return self.found.view(len(self.found), -1)[:, : self.scorer.scored]


def inherited(scorer: Frozen) -> Inherited:
    """The supernet's own last layer."""
    if not scorer.layers:
        return Inherited(torch.zeros(0, device=scorer.context.device), 0.0)
    weight, bias = scorer.layers[-1]
    return Inherited(weight[:, 0].float(), float(bias))


def relu_(x: torch.Tensor) -> torch.Tensor:
    """ReLU in place. A bfloat16 is negative when its bits are as an int16, whose maximum the CPU takes many
    times faster than that of bfloat16, which goes through float32."""
    if x.dtype == torch.bfloat16:
        x.view(torch.int16).clamp_(min=0)
        return x
    return x.relu_()


def look_up(
    model: SupernetModel, batches: Sequence[Batch], context: Context
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all batches pooled rows ``[F, n, table width]``, dense columns ``[n, n_dense]``, labels ``[n]``, and
    ``[F, n]`` bool: whether a row has a value of the field with an id of its own."""
    pooled: torch.Tensor | None = None
    parts: list[tuple[torch.Tensor, ...]] = []
    start, rows = 0, sum(b.size for b in batches)
    for batch in batches:
        here = batch.to(context.device)
        part = model.tables(here.sparse).stack()
        if pooled is None:
            pooled = part.new_empty(part.shape[0], rows, part.shape[2])
        pooled[:, start : start + part.shape[1]] = part
        start += part.shape[1]
        parts.append((here.dense, here.label, known_in(here.sparse, model.tables.names)))
    assert pooled is not None
    dense, labels, known = zip(*parts, strict=True)
    return pooled, torch.cat(dense), torch.cat(labels), torch.cat(known, 1)


def compare(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of ``reference [N]`` less that of each of ``logits [K, N]``, and its standard error: ``[K, 2]``."""
    labels, out = labels.to(logits.device), torch.zeros(len(logits), 2, dtype=torch.float64, device=logits.device)
    base = functional.binary_cross_entropy_with_logits(reference, labels, reduction="none")
    for k, row in enumerate(logits):
        gain = base - functional.binary_cross_entropy_with_logits(row, labels, reduction="none")
        out[k, 0] = gain.mean(dtype=torch.float64)
        out[k, 1] = gain.double().std() / len(gain) ** 0.5
    return out
