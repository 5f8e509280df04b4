"""Rows of a data set -> the batch that models see."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.store.bags import offsets_of
from embsearch_dist.data.store.shards import Rows
from embsearch_dist.schema import Schema


class BatchMaker:
    """Turns rows into a :class:`Batch`; without lists, lengths and offsets are built once per batch size.

    With lengths, offsets and the per-key sums given, TorchRec computes nothing and never syncs.
    """

    def __init__(self, schema: Schema) -> None:
        self.keys = schema.names
        self.fields = schema.fields
        self._ones: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def sparse(self, ids: torch.Tensor) -> KeyedJaggedTensor:
        """``[F, B]`` int32 ids, one per field and sample -> the jagged tensor TorchRec wants."""
        n_fields, size = ids.shape
        lengths, offsets = self._constant(n_fields * size, ids.device)
        return keyed(self.keys, ids.reshape(-1), None, lengths, offsets, size, [size] * n_fields)

    def _constant(self, total: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and offsets of ``total`` bags of one id."""
        if (total, device) not in self._ones:
            # The tail of an evaluation adds a size or two; more would be a stream of odd sizes.
            if len(self._ones) >= 8:
                self._ones.clear()
            lengths = torch.ones(total, dtype=torch.int32, device=device)
            self._ones[total, device] = lengths, torch.arange(total + 1, dtype=torch.int32, device=device)
        return self._ones[total, device]

    def jagged(self, rows: Rows) -> KeyedJaggedTensor:
        """Rows with list fields. If any field is weighted, all are: TorchRec knows no weights of some."""
        size, single, several = len(rows), iter(rows.ids), iter(rows.bags)
        lengths = np.ones((len(self.fields), size), np.int32)
        ids: list[np.ndarray] = []
        weights: list[np.ndarray] | None = [] if any(f.weighted for f in self.fields) else None
        for field, own in zip(self.fields, lengths, strict=True):
            bags = next(several) if field.is_list else None
            if bags is not None:
                own[:] = bags.lengths
            ids.append(next(single) if bags is None else bags.ids)
            if weights is not None:
                given = None if bags is None else bags.weights
                weights.append(np.ones(len(ids[-1]), np.float32) if given is None else given)
        flat = lengths.reshape(-1)
        return keyed(
            self.keys,
            torch.from_numpy(np.concatenate(ids)),
            torch.from_numpy(np.concatenate(weights)) if weights is not None else None,
            torch.from_numpy(flat),
            torch.from_numpy(offsets_of(flat).astype(np.int32)),
            size,
            [len(x) for x in ids],
        )

    def __call__(self, rows: Rows, position: Position) -> Batch:
        sparse = self.jagged(rows) if rows.bags else self.sparse(torch.from_numpy(rows.ids))
        return Batch(torch.from_numpy(rows.dense), sparse, torch.from_numpy(rows.label), position)


def keyed(
    keys: list[str],
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    lengths: torch.Tensor,
    offsets: torch.Tensor,
    size: int,
    counts: list[int],
) -> KeyedJaggedTensor:
    """``size`` bags of each field, fields one after the other; ``counts``: ids of each field."""
    return KeyedJaggedTensor(
        keys=keys,
        values=ids,
        weights=weights,
        lengths=lengths,
        offsets=offsets,
        stride=size,
        length_per_key=counts,
        offset_per_key=list(itertools.accumulate(counts, initial=0)),
    )
