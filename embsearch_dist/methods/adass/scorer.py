"""Score many subnets of a frozen supernet without touching its tables again.

The supernet does not change during the search, so the pooled max-table rows of the validation sample are
looked up once. From them every (field, candidate) gives its terms: its share of the linear part and of the MLP's
first layer, and its unified embedding u, of which the FM part needs two sums over the fields:
``sum_{f<g} <u_f, u_g> = (|sum_f u_f|^2 - sum_f |u_f|^2) / 2``. A subnet is then a sum of F blocks: neither a table
nor a wide matrix product is left in the loop.

Terms that fit into memory are made once. Otherwise the pooled rows are kept, which are some ten times smaller, and
each pass makes the terms of a slab of rows, takes them for all its candidates, and goes on to the next slab. A subnet
that differs from another in few fields needs the terms of these fields alone (:meth:`SubnetScorer.score_near`), so
what it costs does not grow with the number of fields.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass import layout as layouts
from embsearch_dist.methods.adass.passes import Output, look_up
from embsearch_dist.methods.adass.scoring import CANDIDATES_TOGETHER, Scoring
from embsearch_dist.methods.adass.terms import (
    STATES,
    Sums,
    Terms,
    add_up,
    chunked,
    difference,
    plus,
    slices,
    term_bytes,
)
from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.ranks.context import Context

NEAR_FIELDS = 64  # fields whose terms a slab of :meth:`SubnetScorer.score_near` holds, about


class SubnetScorer(Scoring):
    """Scores subnets of a backbone that is a sum over fields, from the sums of their terms."""

    backbone: Backbone

    def __init__(
        self,
        model: SupernetModel,
        batches: Sequence[Batch],
        context: Context,
        precision: str = "float32",
        cache_mb: int = 4096,
        refit: str = "none",
        area: bool = True,
    ) -> None:
        """
        Args:
            area: whether AUC is wanted; a sample of one class is refused then, and has an AUC of NaN otherwise.
            batches: this rank's share of the sample; all ranks hold equally many batches.
            precision: of the MLP's sums, ``float32`` or ``bfloat16``; linear and FM parts are always float32.
            cache_mb: MiB over all ranks that terms may take to be kept; else they are made in each pass.
            refit: ``linear`` fits the head of every candidate on the first half of the rows (of each rank), and
                scores it on the others; see :class:`embsearch_dist.methods.adass.refit.HeadFit`.
        """
        super().__init__(model, context)
        self.dtype = getattr(torch, precision)
        self.values = model.tables.weights  # column of each field's first-order weight; empty: there are none
        self._states: dict[tuple[int, ...], Sums] = {}
        with torch.no_grad():
            self.pooled, self.dense, self.own_labels, self.known = look_up(model, batches, context)
            self.rows = self.pooled.shape[1]
            row_bytes = term_bytes(self.fields, self.candidates, self.backbone, precision)
            self.layout = layouts.layout_for(
                context.device, -(-self.rows // 2) if refit != "none" else self.rows, row_bytes
            )
            self._share_labels(refit != "none")
            self.moments = self._moments(self.pooled)
            self.linear, weight = self.backbone.field_weights()
            self.weight = weight.to(self.dtype).contiguous()
            layers = self.backbone.later_layers
            self.layers = [(x.weight.to(self.dtype).T.contiguous(), x.bias.to(self.dtype)) for x in layers]
            self.terms: Terms | None = None
            self.cache_bytes = cache_mb << 20
            self._keep_terms(self.cache_bytes)
            if self.terms is not None:
                del self.pooled
        self._check_classes(area)

    def part(self, rows: int) -> SubnetScorer:
        """A scorer of the first ``rows`` rows over all ranks, or a few more (whole chunks); they are shared with this
        one. Itself if it has no more. Its terms are kept if the memory that pooled rows leave is enough."""
        chunks = max(2 if self.fit_chunks else 1, -(-rows // (self.context.world_size * self.layout.chunk_rows)))
        if chunks >= min(self.context.every(self.chunks)):
            return self
        few = copy.copy(self)
        few.rows = chunks * self.layout.chunk_rows
        few.own_labels, few.known = self.own_labels[: few.rows], self.known[:, : few.rows]
        few._share_labels(self.fit_chunks > 0)
        few._forget()
        few._states = {}
        if self.terms is not None:
            few.terms = self.terms.part(chunks)
        else:
            left = self.cache_bytes - max(self.context.every(self.pooled.nbytes)) * self.context.world_size
            few._keep_terms(left)
        return few

    @torch.no_grad()
    def _keep_terms(self, room: int) -> None:
        """Make all terms once and for all, if they take at most ``room`` bytes over all ranks."""
        row_bytes = term_bytes(self.fields, self.candidates, self.backbone, str(self.dtype).removeprefix("torch."))
        if max(self.context.every(self.rows)) * self.context.world_size * row_bytes <= room:
            self.terms = self._make_terms(slice(0, self.chunks), range(self.fields))

    def _share_labels(self, refit: bool) -> None:
        """Decide which rows fit heads and which score, and let every rank know the labels of the latter.

        Raises:
            UserError: one chunk of rows, and heads to be fitted.
        """
        size = self.layout.chunk_rows
        self.chunks = -(-self.rows // size)
        self.fit_chunks = self.chunks // 2 if refit else 0
        if refit and min(self.context.every(self.fit_chunks)) == 0:
            raise UserError("config key search.policy.refit: too few validation rows to hold half of them apart")
        fitted = self.fit_chunks * size
        self.fit_labels = self.own_labels[:fitted].view(-1, size)
        self._share(self.own_labels[fitted:])

    def _make_terms(self, chunks: slice, fields: Sequence[int], out: Terms | None = None) -> Terms:
        """The terms of some fields, in this order, for some chunks of rows; missing rows of the last are zeros.

        Args:
            out: where they go, if it is large enough; its further chunks stay as they are.
        """
        size, width, depth = self.layout.chunk_rows, self.backbone.first_width, self.backbone.width
        count, blocks = chunks.stop - chunks.start, len(fields) * self.candidates + 1
        terms = out.part(count) if out is not None else self._room(count, blocks)
        every = len(fields) == self.fields
        linear, weight = self.linear[list(fields)], self.weight[list(fields)].repeat_interleave(self.candidates, 0)
        slab = max(1, layouts.SLAB_BYTES // (blocks * size * depth * 4))  # the unified embeddings of a slab
        for start in range(0, count, slab):
            stop = min(start + slab, count)
            part = slice((chunks.start + start) * size, (chunks.start + stop) * size)
            pooled = self.pooled[:, part] if every else self.pooled[list(fields), part]
            u = self._unified(pooled, fields)
            number = (u.view(len(u), len(fields), self.candidates, depth) @ linear[:, :, None]).view(len(u), -1)
            if self.backbone.fm:
                number -= 0.5 * u.square().sum(2)
            if self.values:
                values = torch.stack([pooled[k, :, self.values[f]] for k, f in enumerate(fields)], 1)
                number += (values[:, :, None] * self.unify.present).flatten(1)
            u, number = chunked(u, size), chunked(number, size)
            terms.number[start:stop, :-1] = number.view(stop - start, size, -1).transpose(1, 2)
            # Chunk by chunk [blocks, rows, d], as the products read it.
            u = u.view(stop - start, size, blocks - 1, depth).transpose(1, 2)
            if self.backbone.fm:
                terms.u[start:stop, :-1] = u.flatten(2)
            if width:
                inputs = u.to(self.dtype, memory_format=torch.contiguous_format)
                for k in range(stop - start):
                    torch.bmm(inputs[k], weight, out=terms.first[start + k, :-1].view(blocks - 1, size, width))
            dense = self.backbone.dense_terms(self.dense[part])
            terms.number[start:stop, -1] = chunked(dense[0], size)
            if width:
                terms.first[start:stop, -1] = chunked(dense[1], size)
        return terms

    def _room(self, chunks: int, blocks: int) -> Terms:
        """Terms that are not made yet. The dense columns have no unified embedding: zeros."""
        size, device, depth = self.layout.chunk_rows, self.context.device, self.backbone.width * self.backbone.fm
        terms = Terms(
            torch.empty(chunks, blocks, size, device=device),
            torch.empty(chunks, blocks, size * depth, device=device),
            torch.empty(chunks, blocks, size * self.backbone.first_width, dtype=self.dtype, device=device),
        )
        terms.u[:, -1] = 0
        return terms

    def _unified(self, x: torch.Tensor, fields: Sequence[int]) -> torch.Tensor:
        """Unified embeddings ``[n, F' * T, d]`` of every (field, candidate), zero for a dropped field.

        Args:
            x: pooled rows ``[F', n, table width]`` of the given ``fields`` in this order.
        """
        out = x.new_zeros(x.shape[1], len(fields), self.candidates, self.backbone.width)
        for j in range(self.candidates):
            if self.unify.present[j]:
                out[:, :, j] = self._chosen(x, torch.full((len(fields),), j, device=x.device), fields)
        return out.flatten(1, 2)

    def _slabs(self, fields: Sequence[int] | None = None) -> Iterator[tuple[int, Terms, dict[int, int]]]:
        """First chunk and terms of each slab of rows, and at which place among them each field is."""
        if self.terms is not None:
            yield 0, self.terms, {f: f for f in range(self.fields)}
            return
        fields = range(self.fields) if fields is None else fields
        of_row = term_bytes(len(fields), self.candidates, self.backbone, str(self.dtype).removeprefix("torch."))
        slab = max(1, layouts.SLAB_BYTES // (of_row * self.layout.chunk_rows))
        slab = min(slab, self.chunks)
        places, room = {f: i for i, f in enumerate(fields)}, self._room(slab, len(fields) * self.candidates + 1)
        for start in range(0, self.chunks, slab):
            yield start, self._make_terms(slice(start, min(start + slab, self.chunks)), fields, room), places

    @torch.no_grad()
    def logits(self, choices: torch.Tensor) -> torch.Tensor:
        """``choices [K, F]`` candidate indices -> logits of this rank's scored rows ``[K, rows]``."""
        first = torch.arange(self.fields) * self.candidates
        dense = torch.full((len(choices), 1), self.fields * self.candidates)
        blocks = torch.cat([choices + first, dense], 1).to(self.context.device)
        offsets = torch.arange(len(choices), device=blocks.device) * blocks.shape[1]
        out = Output(self, len(choices))
        for start, terms, _ in self._slabs():
            for k in range(len(terms.number)):
                for part in slices(len(choices), CANDIDATES_TOGETHER):
                    sums = add_up(terms, k, blocks[part].flatten(), offsets[: part.stop - part.start])
                    out.take(start + k, part, sums)
        return out.logits()

    @torch.no_grad()
    def logits_near(self, base: Sequence[int], choices: torch.Tensor) -> torch.Tensor:
        """:meth:`logits` of subnets ``[K, F]`` that differ from ``base [F]`` in few fields, from its sums."""
        state, out = self._state(tuple(base)), Output(self, len(choices))
        own = torch.tensor(list(base))
        rows, changed = (choices != own).nonzero(as_tuple=True)
        fields = changed.unique().tolist() or [0]  # no subnet differs: any field gives the empty sums
        counts = torch.bincount(rows, minlength=len(choices))
        offsets = (counts.cumsum(0) - counts).to(self.context.device)
        for start, terms, places in self._slabs(fields):
            first = torch.tensor([places[f] * self.candidates for f in changed.tolist()], dtype=torch.int64)
            new, old = ((first + c).to(self.context.device) for c in (choices[rows, changed], own[changed]))
            bounds = [*offsets.tolist(), len(rows)]
            for k in range(len(terms.number)):
                for part in slices(len(choices), CANDIDATES_TOGETHER):
                    some = slice(bounds[part.start], bounds[part.stop])
                    own_offsets = offsets[part] - some.start
                    sums = difference(terms, k, new[some], old[some], own_offsets)
                    out.take(start + k, part, plus(state, start + k, sums, self.dtype))
        return out.logits()

    def _state(self, base: tuple[int, ...]) -> Sums:
        """Sums ``[chunks, ...]`` float32 of a subnet, from those of a kept one if it differs in less than half."""
        if base in self._states:
            return self._states[base]
        own = torch.tensor(base)
        kept = {k: int((torch.tensor(k) != own).sum()) for k in self._states}
        near = min(kept, key=lambda k: kept[k], default=None)
        old = near if near is not None and 2 * kept[near] < self.fields else None
        device, size = self.context.device, self.layout.chunk_rows
        if old is None:
            depth = self.backbone.width if self.backbone.fm else 0
            widths = (size, size * depth, size * self.backbone.first_width)
            state = Sums(*(torch.zeros(self.chunks, w, device=device) for w in widths))
            fields = list(range(self.fields))
        else:
            state = Sums(*(x.clone() for x in vars(self._states[old]).values()))
            fields = [f for f in range(self.fields) if base[f] != old[f]]
        for part in slices(len(fields), NEAR_FIELDS):
            some = fields[part]
            for start, terms, places in self._slabs(some):
                new = torch.tensor([places[f] * self.candidates + base[f] for f in some], device=device)
                if old is None and part.start == 0:
                    new = torch.cat([new, new.new_tensor([terms.number.shape[1] - 1])])
                gone = [] if old is None else [places[f] * self.candidates + old[f] for f in some]
                for k in range(len(terms.number)):
                    for total, values in zip(vars(state).values(), vars(terms).values(), strict=True):
                        total[start + k] += values[k, new].float().sum(0) - values[k, gone].float().sum(0)
        while len(self._states) >= STATES:
            del self._states[next(iter(self._states))]
        self._states[base] = state
        return state
