"""How often the values of each field are met in training, and a small network that looks at nothing else.

AutoEmb's controller and ESAPN's policy decide by the popularity of a looked-up value. Here it is a bucket of its count
in the training rows, ``0`` for none and ``1 + floor(log2(count))``, at most ``buckets - 1``, for others: so few that
what a network says of all of them is computed once a step, and looked up row by row.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_dist.methods.gated.config import PopularityConfig
from embsearch_dist.models.model import seeded
from embsearch_dist.models.rows import fill_rows
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema

SEED = 1 << 33  # added to the run's seed: the network must not begin with the backbone's numbers


def bucket_of(counts: torch.Tensor, buckets: int) -> torch.Tensor:
    """Bucket of each of ``counts`` (int64, at least 0), uint8. Compared with powers of two: a logarithm may round."""
    bounds = torch.tensor([1 << k for k in range(buckets - 1)], device=counts.device)
    return torch.bucketize(counts, bounds, right=True).to(torch.uint8)


class Popularity:
    """The bucket of every value of every field; a byte for each, on every rank.

    Args:
        counts: ``[sum of cardinalities]`` int64, fields in schema order one after the other.
    """

    def __init__(self, schema: Schema, counts: torch.Tensor, buckets: int) -> None:
        self.buckets, self.fields = buckets, len(schema.fields)
        self.lists = any(f.is_list for f in schema.fields)
        self.first = _first(schema, counts.device)
        self.table = bucket_of(counts, buckets)
        owner = torch.arange(self.fields, device=counts.device)
        owner = owner.repeat_interleave(torch.tensor(schema.cardinalities, device=counts.device))
        place = owner * buckets + self.table
        empty = torch.zeros(self.fields * buckets, dtype=torch.int64, device=counts.device)
        self.rows = empty.index_add(0, place, counts).view(self.fields, buckets)
        """``[F, K]``: ids of training rows whose value is of a bucket."""

    def of_values(self, ids: torch.Tensor) -> torch.Tensor:
        """Buckets of ``ids [F, n]``, row f of field f: ``[F, n]`` int64."""
        return self.table[self.first[:, None] + ids].long()

    def of(self, sparse: KeyedJaggedTensor) -> torch.Tensor:
        """``[B, F]`` int64: the bucket of each row's value; of a list the mean of its values', 0 of an empty one."""
        bucket = self.table[_places(sparse, self.first)].long()
        if not self.lists:
            return bucket.view(self.fields, -1).transpose(0, 1)
        lengths = sparse.lengths().long()
        owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        total = torch.zeros_like(lengths).index_add(0, owner, bucket)
        mean = total.double() / lengths.clamp(min=1)
        return mean.round().long().view(self.fields, -1).transpose(0, 1)


def popularity_of(run: Run, batch_size: int, buckets: int) -> Popularity:
    """Counts the values of the training rows of all ranks, in one pass over them."""
    counts = torch.zeros(sum(run.schema.cardinalities), dtype=torch.int64, device=run.context.device)
    first = _first(run.schema, run.context.device)
    for batch in run.stream("train", batch_size, shuffle=False).epoch(0):
        places = _places(batch.to(run.context.device).sparse, first)
        counts.index_add_(0, places, torch.ones_like(places))
    return Popularity(run.schema, run.context.sum(counts), buckets)


class PopularityNet(nn.Module):
    """Scores for each bucket of each field: an embedding of the bucket, a layer with ReLU, a linear layer.

    Each field has weights of its own. The last layer starts at zero, so that all buckets begin with ``start``.

    Args:
        outputs: O, scores of a bucket.
    """

    def __init__(self, fields: int, outputs: int, config: PopularityConfig, seed: int, start: float = 0.0) -> None:
        super().__init__()
        buckets, width, hidden = config.buckets, config.width, config.hidden
        with seeded(seed + SEED):
            self.embedding = nn.Parameter(torch.randn(fields, buckets, width))
            self.inner = nn.Parameter(torch.randn(fields, width, hidden) * (2 / width) ** 0.5)
        self.inner_bias = nn.Parameter(torch.zeros(fields, 1, hidden))
        self.last = nn.Parameter(torch.zeros(fields, hidden, outputs))
        self.last_bias = nn.Parameter(torch.full((fields, 1, outputs), start))
        # Beside the weights, so that what is read of them later need not count the rows once more.
        self.register_buffer("rows", torch.zeros(fields, buckets, dtype=torch.int64))
        self.rows: torch.Tensor

    def forward(self) -> torch.Tensor:
        """``[F, K, O]``."""
        inner = torch.relu(torch.baddbmm(self.inner_bias, self.embedding, self.inner))
        return torch.baddbmm(self.last_bias, inner, self.last)

    def shares(self) -> torch.Tensor:
        """``[F, K]`` float64: which share of a field's ids in training rows is of a bucket; all 0 without rows."""
        return self.rows.double() / self.rows.sum(1, keepdim=True).clamp(min=1)


def row_by_row(table: torch.Tensor, bucket: torch.Tensor, rows: int) -> torch.Tensor:
    """``table [F, K, O]`` looked up by ``bucket [B, F]``: ``[rows, F, O]``, zeros behind the B rows."""
    fields, buckets, outputs = table.shape
    place = bucket + torch.arange(fields, device=bucket.device) * buckets
    found = functional.embedding(place, table.reshape(fields * buckets, outputs))
    return found if rows == len(found) else fill_rows(found)


def _first(schema: Schema, device: torch.device) -> torch.Tensor:
    """Place of each field's value 0 among those of all fields."""
    return torch.tensor(list(accumulate(schema.cardinalities, initial=0))[:-1], device=device)


def _places(sparse: KeyedJaggedTensor, first: torch.Tensor) -> torch.Tensor:
    """Place of each id of a batch among the values of all fields."""
    counts = torch.tensor(sparse.length_per_key(), device=first.device)
    return sparse.values().long() + first.repeat_interleave(counts, output_size=len(sparse.values()))
