"""Some rows of a batch as a batch of their own."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.making import keyed


def select(batch: Batch, rows: torch.Tensor, single: bool | None = None) -> Batch:
    """The given rows in the given order; a row may be named several times.

    What TorchRec would otherwise compute from the lengths is given with them, as ``BatchMaker`` does.

    Args:
        rows: ``[n]`` int64 on the batch's device, each ``0 <= row < batch.size``.
        single: every field has exactly one id a row (``not any(f.is_list for f in schema.fields)``), so that nothing
            has to be looked at. None: find out from the lengths, for which an accelerator is waited on.
    """
    sparse = batch.sparse
    if single is None:
        single = sparse.weights_or_none() is None and bool((sparse.lengths() == 1).all())
    chosen = _single(sparse, rows, batch.size) if single else _jagged(sparse, rows, batch.size)
    dense, label = batch.dense.index_select(0, rows), batch.label.index_select(0, rows)
    return Batch(dense, chosen, label, batch.position)


def _single(sparse: KeyedJaggedTensor, rows: torch.Tensor, size: int) -> KeyedJaggedTensor:
    keys, n = sparse.keys(), len(rows)
    ids = sparse.values().view(len(keys), size).index_select(1, rows).reshape(-1)
    lengths = torch.ones(len(ids), dtype=torch.int32, device=ids.device)
    offsets = torch.arange(len(ids) + 1, dtype=torch.int32, device=ids.device)
    return keyed(keys, ids, None, lengths, offsets, n, [n] * len(keys))


def _jagged(sparse: KeyedJaggedTensor, rows: torch.Tensor, size: int) -> KeyedJaggedTensor:
    """Lists: the one wait on an accelerator is for how many ids each field is left with."""
    fields = len(sparse.keys())
    lengths = sparse.lengths().view(fields, size).index_select(1, rows)
    counts = lengths.sum(1).tolist()
    flat = lengths.reshape(-1)
    offsets = torch.zeros(len(flat) + 1, dtype=torch.int32, device=flat.device)
    torch.cumsum(flat, 0, dtype=torch.int32, out=offsets[1:])
    starts = sparse.offsets()[:-1].view(fields, size).index_select(1, rows).reshape(-1)
    shift = torch.repeat_interleave(starts - offsets[:-1], flat, output_size=sum(counts))
    places = shift + torch.arange(sum(counts), dtype=shift.dtype, device=shift.device)
    weights = sparse.weights_or_none()
    ids = sparse.values().index_select(0, places)
    kept = None if weights is None else weights.index_select(0, places)
    return keyed(sparse.keys(), ids, kept, flat, offsets, len(rows), counts)
