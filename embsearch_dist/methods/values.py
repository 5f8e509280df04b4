"""What methods that keep single values of a field have in common: their masks as kept values, and what a mask says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.precision import PRECISIONS, served
from embsearch_dist.schema import Schema


def values_of(schema: Schema, masks: Sequence[torch.Tensor]) -> dict[str, KeptValues]:
    """The fields of which some value has no row.

    Args:
        masks: of each field ``[cardinality]`` bool, in schema order; id 0 has a row whatever its mask says.
    """
    return {name: KeptValues.of(m.numpy()) for name, m in zip(schema.names, masks, strict=True) if not m[1:].all()}


def mask_told(schema: Schema, widths: Sequence[int], values: Mapping[str, KeptValues], extra: int) -> dict[str, object]:
    """What ``search/mask-NAME.json`` says: rows of each field beside all that it has, and sizes; under ``structured``
    the sizes where the fields that keep something keep all of it."""
    own = dict(zip(schema.names, widths, strict=True))
    kept, whole = (Allocation(schema, own, {}, extra, values=dict(v)) for v in (values, {}))

    def sizes(found: Allocation) -> dict[str, object]:
        at = {p: found.total(served(p)) for p in PRECISIONS}
        return {"parameters": found.total("parameters"), "served_bytes": at}

    rows = {f.name: [kept.rows(f.name) if own[f.name] else 0, f.cardinality] for f in schema.fields}
    return {"rows": rows, **sizes(kept), "structured": sizes(whole)}
