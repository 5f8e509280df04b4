"""Score many subnets of a frozen supernet without touching its tables again.

The supernet does not change during the search, so the pooled max-table rows of the validation sample are
looked up once. From them every (field, candidate) pair gives its *terms*: its share in the backbone's
linear, FM and first-layer sums (see models/backbones.py). A subnet is then a sum of F cached blocks
followed by the rest of the MLP, and K subnets are one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn import functional

from embsearch_dist.data.batch import Batch
from embsearch_dist.dist.context import Context
from embsearch_dist.errors import UserError
from embsearch_dist.models.ctr import SupernetModel
from embsearch_dist.models.unify import SupernetUnify
from embsearch_dist.train.metrics import score

CHUNK_ROWS = 128  # the terms of a chunk of rows stay in cache while all candidates of a pass use them
CANDIDATES_PER_PASS = 64


class SubnetScorer:
    """Inherited-weight metrics of subnets on a fixed sample of validation rows, spread over the ranks.

    Every result is kept: a candidate is never scored twice (``archive``).
    """

    def __init__(self, model: SupernetModel, batches: Sequence[Batch], context: Context) -> None:
        """``batches``: this rank's share of the sample; all ranks hold equally many batches."""
        self.context = context
        head = model.bare_head
        unify, self.backbone = head.unify, head.backbone
        assert isinstance(unify, SupernetUnify)
        self.fields, self.candidates = len(model.tables.names), len(unify.mask)
        self.archive: dict[tuple[int, ...], dict[str, float]] = {}
        model.eval()
        with torch.no_grad():
            pooled = torch.cat([model.tables(b.to(context.device).sparse) for b in batches], 1)
            dense = torch.cat([b.dense.to(context.device) for b in batches])
            self.labels = context.gather(torch.cat([b.label.to(context.device) for b in batches])).cpu()
            self.rows = pooled.shape[1]
            self.shallow, self.deep = self._make_terms(unify, pooled, dense)
        if self.labels.sum() in (0, len(self.labels)):
            raise UserError(f"the validation sample of {len(self.labels)} rows has one class only: AUC is undefined")

    def _make_terms(
        self, unify: SupernetUnify, pooled: torch.Tensor, dense: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Terms of every (field, candidate) pair, ``[chunks, F * T + 1, CHUNK_ROWS * width]``.

        The last block is the dense columns'. Chunk by chunk in memory: with whole columns side by side the
        blocks of a chunk would lie megabytes apart, in the same few lines of every cache. The last chunk is
        filled up with zero rows.
        """
        blocks, rows = self.fields * self.candidates + 1, pooled.shape[1]
        chunks = -(-rows // CHUNK_ROWS)
        shallow, deep = (
            torch.zeros(chunks, blocks, CHUNK_ROWS * w, device=pooled.device) for w in self.backbone.term_widths
        )

        def put(block: int, terms: tuple[torch.Tensor, torch.Tensor]) -> None:
            for target, values in zip((shallow, deep), terms, strict=True):
                filled = functional.pad(values, (0, 0, 0, chunks * CHUNK_ROWS - rows))
                target[:, block] = filled.view(chunks, -1)

        for j in range(self.candidates):
            choice = torch.full((self.fields,), j, device=pooled.device)
            if not unify.present[j]:
                continue
            u = unify.linear(pooled, choice)
            if unify.norm.kind == "field":
                u = unify.norm.apply_statistics(u, choice, *self._moments(u))
            else:
                u = unify.norm(u, choice)
            for f in range(self.fields):
                put(f * self.candidates + j, self.backbone.field_terms(f, u[:, f]))
        put(blocks - 1, self.backbone.dense_terms(dense))
        return shallow, deep

    def _moments(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance ``[F, d]`` over the whole sample. A pair that was drawn rarely has running
        statistics of an older supernet; those of the sample are exact and use no label."""
        count = torch.tensor(float(u.shape[1]), device=u.device)
        total = u.sum(1)
        for tensor in (count, total):
            self.context.sum(tensor)
        mean = total / count
        square = self.context.sum(torch.stack([(v - m).square_().sum(0) for v, m in zip(u, mean, strict=True)]))
        return mean, square / count

    @torch.no_grad()
    def logits(self, choices: torch.Tensor) -> torch.Tensor:
        """``choices [K, F]`` candidate indices -> logits of this rank's rows ``[K, rows]``."""
        count, device = len(choices), self.shallow.device
        pick = torch.zeros(count, self.shallow.shape[1], device=device)
        pick.scatter_(1, choices.to(device) + torch.arange(self.fields, device=device) * self.candidates, 1.0)
        pick[:, -1] = 1.0
        out = torch.empty(count, len(self.shallow), CHUNK_ROWS, device=device)
        one, many = self.backbone.term_widths
        # One pair of buffers for all chunks: fresh ones would cost more in page faults than the product itself.
        shallow = torch.empty(count, CHUNK_ROWS * one, device=device)
        deep = torch.empty(count, CHUNK_ROWS * many, device=device)
        for k in range(len(self.shallow)):
            torch.mm(pick, self.shallow[k], out=shallow)
            torch.mm(pick, self.deep[k], out=deep)
            logits = self.backbone.finish(shallow.view(-1, one), deep.view(count * CHUNK_ROWS, many))
            out[:, k] = logits.view(count, -1)
        return out.view(count, -1)[:, : self.rows]

    def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
        """Metrics (auc, logloss, accuracy) of subnets ``[K, F]``, on every rank, from the archive if known."""
        keys = [tuple(row) for row in choices.tolist()]
        new = list(dict.fromkeys(k for k in keys if k not in self.archive))
        for start in range(0, len(new), CANDIDATES_PER_PASS):
            self._score_new(new[start : start + CANDIDATES_PER_PASS])
        return [self.archive[k] for k in keys]

    def _score_new(self, keys: list[tuple[int, ...]]) -> None:
        local = self.logits(torch.tensor(keys))
        world, rank = self.context.world_size, self.context.rank
        if world == 1:
            results = [score(row.cpu(), self.labels) for row in local]
        else:
            # Every rank gets all rows of all candidates and works out the metrics of its share of them.
            whole = [self.context.gather(row.contiguous()).cpu() for row in local]
            names = ("auc", "logloss", "accuracy", "rows")
            table = torch.zeros(len(keys), len(names), dtype=torch.float64)
            for k in range(rank, len(keys), world):
                values = score(whole[k], self.labels)
                table[k] = torch.tensor([values[n] for n in names], dtype=torch.float64)
            table = table.to(self.context.device)
            dist.all_reduce(table)
            results = [dict(zip(names, row, strict=True)) for row in table.tolist()]
        self.archive.update(zip(keys, results, strict=True))


def sample_rows(rows: int, wanted: int, blocks: int, width: int, cache_mb: int) -> int:
    """Rows of the sample: as wanted, unless ``[blocks, rows, width]`` floats would not fit the cache."""
    fits = (cache_mb << 20) // (4 * blocks * width)
    return max(1, min(rows, wanted, fits))
