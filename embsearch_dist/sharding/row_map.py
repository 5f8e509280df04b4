"""Ids of a batch -> the rows that they look up, where tables have rows for some of their fields' values alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchrec import KeyedJaggedTensor

from embsearch_dist.kept_values import KeptValues


class RowMap:
    """The maps of all fields side by side: 4 bytes for each value of a field of which not all are kept.

    Args:
        values: by feature; the ids of other features stay what they are.
    """

    def __init__(self, values: Mapping[str, KeptValues], device: torch.device) -> None:
        self._rows = {name: torch.from_numpy(kept.row_of).to(device) for name, kept in values.items()}
        self._last: tuple[KeyedJaggedTensor, KeyedJaggedTensor] | None = None

    def __call__(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same bags of rows. For one batch asked twice in a row the same object, which is mapped once."""
        if self._last is not None and self._last[0] is sparse:
            return self._last[1]
        ids, counts = sparse.values(), sparse.length_per_key()
        parts = []
        for key, own in zip(sparse.keys(), ids.split(counts), strict=True):
            parts.append(self._rows[key].index_select(0, own).to(own.dtype) if key in self._rows else own)
        mapped = KeyedJaggedTensor(
            keys=sparse.keys(),
            values=torch.cat(parts),
            weights=sparse.weights_or_none(),
            lengths=sparse.lengths(),
            offsets=sparse.offsets(),
            stride=sparse.stride(),
            length_per_key=counts,
            offset_per_key=sparse.offset_per_key(),
        )
        self._last = sparse, mapped
        return mapped
