"""Candidates that cannot differ: which they are, and that a wide table is a narrow one behind the same model."""

from __future__ import annotations

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.models.backbones.additive import Backbone
from embsearch_dist.models.distinct import distinct_candidates
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.models.unify import MixedUnify
from embsearch_dist.schema import Field, Schema
from tests.factories import one_rank, random_batch, set_tables, small_config, whole_tables

SCHEMA = Schema("small", (Field("few", 5), Field("some", 9), Field("many", 60), Field("tags", 60, "sum")), ("x",))
CANDIDATES = [0, 2, 6, 8, 12, 16]


def numbers(*overrides: str) -> list[list[int]]:
    found = distinct_candidates(SCHEMA, CANDIDATES, small_config("none", "none", *overrides).model)
    return [row.nonzero()[:, 0].tolist() for row in found]


def first(*counts: int) -> list[list[int]]:
    return [list(range(n)) for n in counts]


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        (["transform=width"], (4, 4, 4, 6)),  # d_f is 8; the shared bias forbids it for a list
        (["transform=width", "unified_width=32"], (6, 6, 6, 6)),
        (["transform=field"], (3, 4, 4, 4)),
        (["transform=field", "unified_width=32"], (3, 5, 6, 6)),
        (["transform=field", "norm=field"], (6, 6, 6, 6)),
        (["transform=mlp"], (6, 6, 6, 6)),
        (["transform=identity"], (6, 6, 6, 6)),  # DeepFM
        (["transform=identity", "backbone=fm"], (6, 6, 6, 6)),
        (["transform=identity", "backbone=mlp"], (3, 4, 4, 4)),  # 8 outputs of the first layer
        (["transform=identity", "backbone=wide_deep"], (3, 5, 5, 5)),  # and one of the linear part
        (["transform=identity", "backbone=wide_deep", "first_order=value"], (3, 4, 4, 4)),
        (["transform=identity", "backbone=mlp", "hidden=[64]"], (3, 5, 6, 6)),
    ],
)
def test_wide_candidates_count_where_they_can_differ(settings: list[str], counts: tuple[int, ...]) -> None:
    assert numbers(*(f"model.{s}" for s in settings)) == first(*counts)


def built(widths: list[int], *overrides: str) -> SubnetModel:
    """A model whose maps are near their start (so that they have an inverse), all other weights at random."""
    config = small_config("none", "none", "model.init_std=0.5", *overrides)
    model = SubnetModel(config, Allocation(SCHEMA, dict(zip(SCHEMA.names, widths, strict=True))), one_rank())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.bare_head.backbone.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for parameter in model.bare_head.unify.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def factors(product: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, m]`` as ``[n, columns] @ [columns, m]``; exact if its rank allows."""
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    rank = min(columns, len(s))
    left, right = torch.zeros(len(product), columns), torch.zeros(columns, product.shape[1])
    left[:, :rank], right[:rank] = u[:, :rank], (s[:, None] * v)[:rank]
    return left, right


def fold_inputs(table: torch.Tensor, wide: Backbone, narrow: Backbone, field: int) -> torch.Tensor:
    """The narrow table; what reads it in the narrow backbone takes up the rest."""
    columns, narrow_columns = wide.columns(field), narrow.columns(field)
    readers = [("first", wide.first.weight), *([] if wide.values else [("linear", wide.linear.weight)])]
    inside = torch.cat([weight for _, weight in readers])
    found, right = factors(table @ inside[:, columns].T, narrow_columns.stop - narrow_columns.start)
    whole = torch.cat([inside[:, : columns.start], right.T, inside[:, columns.stop :]], 1)
    state = wide.state_dict() | {
        f"{name}.weight": part
        for (name, _), part in zip(readers, whole.split([len(w) for _, w in readers]), strict=True)
    }
    narrow.load_state_dict(state)
    return found


def fold_map(table: torch.Tensor, wide: MixedUnify, narrow: MixedUnify, field: int) -> torch.Tensor:
    """The narrow table; its map takes up the rest if it is the field's own, and stays as it is if others use it."""
    for other in range(len(wide.widths)):
        if other != field:
            for target, source in zip(narrow.map_of(other), wide.map_of(other), strict=True):
                target.copy_(source)
    (weight, bias), (target, shift) = wide.map_of(field), narrow.map_of(field)
    if narrow.transform == "width":
        return (table @ weight + bias - shift) @ torch.linalg.pinv(target)
    found, right = factors(table @ weight, len(target))
    target.copy_(right)
    shift.copy_(bias)
    return found


@pytest.mark.parametrize("first_order", ["embedding", "value"])
@pytest.mark.parametrize(
    ("transform", "backbone", "field"),
    [
        ("width", "deepfm", "many"),
        ("field", "deepfm", "many"),
        ("field", "deepfm", "few"),
        ("identity", "wide_deep", "few"),
        ("identity", "wide_deep", "many"),
    ],
)
def test_a_wide_table_is_a_narrow_one(transform: str, backbone: str, field: str, first_order: str) -> None:
    """The same logits from the widest candidate of a field as from its last one that counts."""
    settings = [f"model.transform={transform}", f"model.backbone={backbone}", f"model.first_order={first_order}"]
    f, wide = SCHEMA.names.index(field), max(CANDIDATES)
    narrow = CANDIDATES[numbers(*settings)[f][-1]]
    assert narrow < wide
    # Other fields have the narrow width too, so that a map of theirs is not free.
    others = [narrow if name == "some" else 2 for name in SCHEMA.names]
    models = [built([*others[:f], w, *others[f + 1 :]], *settings) for w in (wide, narrow)]
    tables, heads = [whole_tables(m.sharded) for m in models], [m.bare_head for m in models]
    for name in SCHEMA.names:
        if name != field:
            tables[1][name].copy_(tables[0][name])
    table, own = tables[0][field], tables[1][field]
    if first_order == "value":
        own[:, narrow] = table[:, wide]
    with torch.no_grad():
        if transform == "identity":
            own[:, :narrow] = fold_inputs(table[:, :wide], heads[0].backbone, heads[1].backbone, f)
        else:
            heads[1].backbone.load_state_dict(heads[0].backbone.state_dict())
            own[:, :narrow] = fold_map(table[:, :wide], heads[0].unify, heads[1].unify, f)
        set_tables(models[1].sharded, tables[1])
        batch = random_batch(SCHEMA, 64)
        expected, found = models[0](batch)[0], models[1](batch)[0]
    assert float(expected.std()) > 0.1
    assert float((expected - found).abs().max()) < 1e-5
