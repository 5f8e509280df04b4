"""Score many subnets of a frozen supernet without touching its tables again.

The supernet does not change during the search, so the pooled max-table rows of the validation sample are
looked up once. From them every (field, candidate) gives its share of the linear part and of the MLP's first
layer, and every pair of them its inner product in the FM part (see models/backbones.py). A subnet's first layer
is then a sum of F cached blocks, and its linear and FM parts a sum of cached numbers: neither a table nor a
wide matrix product is left in the loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.nn import functional

from embsearch_dist.data.batch import Batch
from embsearch_dist.dist.context import Context
from embsearch_dist.errors import UserError
from embsearch_dist.models.backbones import Backbone
from embsearch_dist.models.ctr import SupernetModel
from embsearch_dist.models.unify import SupernetUnify
from embsearch_dist.train.metrics import METRICS, binned_auc, score, score_many

CANDIDATES_PER_PASS = 64


@dataclass(frozen=True)
class Layout:
    """How the sample is cut up, and where metrics are worked out.

    Args:
        chunk_rows: rows whose terms lie together; a pass takes one chunk after another.
        slab_chunks: chunks whose terms are made at a time.
        together: metrics of all candidates of a pass at once, where the logits lie; else one by one on the CPU.
    """

    chunk_rows: int
    slab_chunks: int
    together: bool


# A CPU keeps the terms of a small chunk in its caches while all candidates of a pass use them. On a GPU each chunk
# costs a number of launches, and it waits at every candidate whose metrics are worked out elsewhere.
CPU = Layout(chunk_rows=128, slab_chunks=32, together=False)
ACCELERATOR = Layout(chunk_rows=8192, slab_chunks=1, together=True)


def layout_for(device: torch.device, rows: int) -> Layout:
    """The layout of ``rows`` rows. Large chunks are of one size, so that the last need not be filled up."""
    if device.type == "cpu":
        return CPU
    chunks = -(-rows // ACCELERATOR.chunk_rows)
    return replace(ACCELERATOR, chunk_rows=-(-rows // chunks))


class SubnetScorer:
    """Inherited-weight metrics of subnets on a fixed sample of validation rows, spread over the ranks.

    Every result is kept: a candidate is never scored twice (``archive``).
    """

    def __init__(
        self, model: SupernetModel, batches: Sequence[Batch], context: Context, precision: str = "float32"
    ) -> None:
        """
        Args:
            batches: this rank's share of the sample; all ranks hold equally many batches.
            precision: of the MLP's sums, ``float32`` or ``bfloat16``; linear and FM parts are always float32.
        """
        self.context, self.dtype = context, getattr(torch, precision)
        head = model.bare_head
        unify, self.backbone = head.unify, head.backbone
        assert isinstance(unify, SupernetUnify)
        self.fields, self.candidates = len(model.tables.names), len(unify.mask)
        self.archive: dict[tuple[int, ...], dict[str, float]] = {}
        model.eval()
        with torch.no_grad():
            pooled = torch.cat([model.tables(b.to(context.device).sparse).stack() for b in batches], 1)
            dense = torch.cat([b.dense.to(context.device) for b in batches])
            self.rows = pooled.shape[1]
            self.rows_of = context.every(self.rows)
            self.layout = layout_for(context.device, self.rows)
            labels = context.gather(torch.cat([b.label.to(context.device) for b in batches]))
            self.labels = labels if self.layout.together else labels.cpu()
            self._make_terms(unify, pooled, dense, model.tables.weights)
            layers = self.backbone.later_layers
            self.layers = [(x.weight.to(self.dtype).T.contiguous(), x.bias.to(self.dtype)) for x in layers]
        if self.labels.sum() in (0, len(self.labels)):
            raise UserError(f"the validation sample of {len(self.labels)} rows has one class only: AUC is undefined")

    def _make_terms(
        self, unify: SupernetUnify, pooled: torch.Tensor, dense: torch.Tensor, weights: Sequence[int]
    ) -> None:
        """Fill ``first [chunks, blocks, chunk rows * width]`` and ``logit [chunks, numbers, chunk rows]``.

        A block is a (field, candidate), the last one the dense columns'. The numbers are the linear parts in the
        same order, then the pairs of :func:`pair_offsets`. Chunk by chunk in memory: with whole columns side by
        side the blocks of a chunk would lie megabytes apart, in the same few lines of every cache. The last
        chunk is filled up with rows of zeros.

        Args:
            weights: column of each field's first-order weight; empty where values have none of their own.
        """
        rows, device = pooled.shape[1], pooled.device
        size, slab = self.layout.chunk_rows, self.layout.slab_chunks
        chunks, blocks = -(-rows // size), self.fields * self.candidates + 1
        pairs, offsets = pair_offsets(self.fields, self.candidates, self.backbone.fm)
        width = self.backbone.first_width
        self.first = torch.zeros(chunks, blocks, size * width, dtype=self.dtype, device=device)
        self.logit = torch.zeros(chunks, blocks + len(pairs), size, device=device)
        moments = self._moments(unify, pooled) if unify.norm.kind == "field" else None
        pairs, self.offsets = pairs.to(device), offsets.to(device)
        for start in range(0, chunks, slab):
            part = slice(start * size, (start + slab) * size)
            u = self._unified(unify, pooled[:, part], moments)
            target = slice(start, start + slab)
            for k in range(blocks):
                terms = (
                    self.backbone.dense_terms(dense[part])
                    if k == blocks - 1
                    else self.backbone.field_terms(k // self.candidates, u[:, k])
                )
                self.logit[target, k] = chunked(terms[0], size)
                if weights and k < blocks - 1 and unify.present[k % self.candidates]:
                    field = k // self.candidates
                    self.logit[target, k] += chunked(pooled[field, part, weights[field]], size)
                if width:
                    self.first[target, k] = chunked(terms[1], size)
            if len(pairs):
                self.logit[target, blocks:] = self._pairs(u, pairs)

    def _unified(
        self, unify: SupernetUnify, x: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Unified embeddings ``[n, F * T, d]`` of every (field, candidate), zero for a dropped field."""
        out = x.new_zeros(x.shape[1], self.fields, self.candidates, self.backbone.width)
        for j in range(self.candidates):
            if unify.present[j]:
                choice = torch.full((self.fields,), j, device=x.device)
                u = unify.mapped(x, choice)
                if moments is None:
                    u = unify.norm(u, choice)
                else:
                    u = unify.norm.apply_statistics(u, choice, *(m[j] for m in moments))
                out[:, :, j] = unify.filled(u, choice)
        return out.flatten(1, 2)

    def _moments(self, unify: SupernetUnify, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance ``[T, F, d]`` over the whole sample. A pair that was drawn rarely has running
        statistics of an older supernet; those of the sample are exact and use no label."""
        count = self.context.sum(torch.tensor(float(x.shape[1]), device=x.device))
        means, variances = [], []
        for j in range(self.candidates):
            u = unify.mapped(x, torch.full((self.fields,), j, device=x.device))
            means.append(self.context.sum(u.sum(1)) / count)
            square = torch.stack([(v - m).square_().sum(0) for v, m in zip(u, means[-1], strict=True)])
            variances.append(self.context.sum(square) / count)
        return torch.stack(means), torch.stack(variances)

    def _pairs(self, u: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """FM terms ``[chunks, pairs, chunk rows]`` of the unified embeddings ``[n, F * T, d]``."""
        products, size = self.backbone.pair_terms(u).flatten(1), self.layout.chunk_rows
        return chunked(products[:, pairs], size).view(-1, size, len(pairs)).transpose(1, 2)

    @torch.no_grad()
    def logits(self, choices: torch.Tensor) -> torch.Tensor:
        """``choices [K, F]`` candidate indices -> logits of this rank's rows ``[K, rows]``."""
        count, device, width = len(choices), self.logit.device, self.backbone.first_width
        blocks, numbers = term_indices(choices.to(device), self.candidates, self.offsets)
        out = torch.empty(count, len(self.logit), self.layout.chunk_rows, device=device)
        for k in range(len(self.logit)):
            out[:, k] = functional.embedding_bag(numbers, self.logit[k], mode="sum")
            if width:
                hidden = functional.embedding_bag(blocks, self.first[k], mode="sum").view(-1, width)
                for weight, bias in self.layers:
                    hidden = torch.addmm(bias, relu_(hidden), weight)
                out[:, k] += hidden.view(count, -1)
        return out.view(count, -1)[:, : self.rows]

    def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
        """Metrics (auc, logloss, accuracy) of subnets ``[K, F]``, on every rank, from the archive if known."""
        keys = [tuple(row) for row in choices.tolist()]
        new = list(dict.fromkeys(k for k in keys if k not in self.archive))
        for start in range(0, len(new), CANDIDATES_PER_PASS):
            self._score_new(new[start : start + CANDIDATES_PER_PASS])
        return [self.archive[k] for k in keys]

    def _score_new(self, keys: list[tuple[int, ...]]) -> None:
        """Score the candidates of one pass; the archive has them then. One copy comes back from the device."""
        world, rank = self.context.world_size, self.context.rank
        shares = [len(range(r, len(keys), world)) for r in range(world)]
        own = self._exchange(self.logits(torch.tensor(keys)), shares)
        table = torch.zeros(len(keys), len(METRICS), dtype=torch.float64, device=self.context.device)
        table.split(shares)[rank].copy_(self._measure(own))
        rows = float(len(self.labels))
        for key, values in zip(keys, self.context.sum(table).tolist(), strict=True):
            self.archive[key] = {**dict(zip(METRICS, values, strict=True)), "rows": rows}

    def _exchange(self, local: torch.Tensor, shares: list[int]) -> torch.Tensor:
        """Logits of this rank's rows and all candidates ``[K, rows]`` -> of all rows and this rank's candidates.

        Rank r works out the metrics of the ``shares[r]`` candidates behind those of the ranks before it. So each
        logit travels once; summing counts per bin over the ranks would move :data:`BINS` numbers of each class for
        each candidate, which is more until the sample has hundreds of thousands of rows.
        """
        world, rank = self.context.world_size, self.context.rank
        if world == 1:
            return local
        sent, received = [k * self.rows for k in shares], [shares[rank] * n for n in self.rows_of]
        out = local.new_empty(sum(received))
        dist.all_to_all_single(out, local.flatten(), received, sent)
        parts = zip(out.split(received), self.rows_of, strict=True)
        return torch.cat([x.view(shares[rank], n) for x, n in parts], 1)

    def _measure(self, logits: torch.Tensor) -> torch.Tensor:
        """:data:`METRICS` of the candidates ``[K, all rows]`` -> ``[K, 3]`` float64."""
        if self.layout.together:
            return score_many(logits, self.labels)
        found = [score(row, self.labels, binned_auc) for row in logits]
        return torch.tensor([[m[n] for n in METRICS] for m in found], dtype=torch.float64).view(-1, len(METRICS))


def pair_offsets(fields: int, candidates: int, fm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the FM terms of two fields are.

    Returns:
        The flat places, in a ``[F * T, F * T]`` table of products, of all pairs of different fields, lower
        field first; and ``[pairs of fields, 3]``: both fields and where their T * T numbers begin.
    """
    couples = list(itertools.combinations(range(fields), 2)) if fm else []
    size, square = fields * candidates, candidates**2
    inner = torch.arange(candidates)
    flat = [((f * candidates + inner[:, None]) * size + g * candidates + inner).flatten() for f, g in couples]
    start = size + 1
    rows = [[f, g, start + k * square] for k, (f, g) in enumerate(couples)]
    places = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    return torch.cat([torch.zeros(0, dtype=torch.int64), *flat]), places


def term_indices(choices: torch.Tensor, candidates: int, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks ``[K, F + 1]`` and numbers ``[K, F + 1 + pairs of fields]`` that make up each subnet ``[K, F]``."""
    fields = choices.shape[1]
    dense = choices.new_full((len(choices), 1), fields * candidates)
    first = torch.arange(fields, device=choices.device) * candidates
    blocks = torch.cat([choices + first, dense], 1)
    low, high, start = offsets.unbind(1)
    return blocks, torch.cat([blocks, start + choices[:, low] * candidates + choices[:, high]], 1)


def chunked(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``[n, ...]`` -> ``[chunks, rows * ...]``, filled up with zeros."""
    missing = -len(x) % rows
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)).reshape(-1, rows * x[0].numel())


def relu_(x: torch.Tensor) -> torch.Tensor:
    """ReLU in place. A bfloat16 is negative when its bits are as an int16, whose maximum the CPU takes many
    times faster than that of bfloat16, which goes through float32."""
    if x.dtype == torch.bfloat16:
        x.view(torch.int16).clamp_(min=0)
        return x
    return x.relu_()


def sample_rows(
    rows: int, wanted: int, fields: int, candidates: int, backbone: Backbone, precision: str, cache_mb: int
) -> int:
    """Rows of the sample: as wanted, unless their terms would take more than ``cache_mb`` MiB."""
    pairs, _ = pair_offsets(fields, candidates, backbone.fm)
    blocks = fields * candidates + 1
    row = 4 * (blocks + len(pairs)) + getattr(torch, precision).itemsize * blocks * backbone.first_width
    return max(1, min(rows, wanted, (cache_mb << 20) // row))
