"""What methods that keep single values of a field have in common: their masks as kept values, and what a mask says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from embsearch_dist.allocation import Allocation, cost
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.precision import PRECISIONS, SERVED, served
from embsearch_dist.schema import Schema


def values_of(schema: Schema, masks: Sequence[torch.Tensor]) -> dict[str, KeptValues]:
    """The fields of which some value has no row.

    Args:
        masks: of each field ``[cardinality]`` bool, in schema order; id 0 has a row whatever its mask says.
    """
    return {name: KeptValues.of(m.numpy()) for name, m in zip(schema.names, masks, strict=True) if not m[1:].all()}


def cost_of_values(kept: KeptValues, width: int, resource: str, extra: int) -> int:
    """What a table of ``width`` costs in one of ``allocation.RESOURCES`` that has rows for these values alone; bytes as
    served with a bit for each value of the field."""
    bits = kept.mask_bytes if width and resource in SERVED else 0
    return cost(resource, kept.rows, width, extra) + bits


def paying_values(
    schema: Schema, widths: Sequence[int], values: Mapping[str, KeptValues], resource: str, extra: int
) -> dict[str, KeptValues]:
    """Those of ``values`` whose tables, at ``widths [F]``, cost no more than with rows for all values.

    As served, a field that loses one value of a million would save a row and need 125,000 bytes of bits.
    """
    own = dict(zip(schema.names, widths, strict=True))
    whole = {f.name: cost(resource, f.cardinality, own[f.name], extra) for f in schema.fields}
    return {n: k for n, k in values.items() if cost_of_values(k, own[n], resource, extra) <= whole[n]}


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
