"""Max-tables and mixed tables against plain torch on sliced tables: values, and gradients column by column."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.config.widths import check_candidates
from embsearch_dist.errors import UserError
from embsearch_dist.models.model import SubnetModel, SupernetModel
from embsearch_dist.models.tables import MaxTables, MixedTables
from tests.factories import (
    STEEP,
    ids_of,
    one_rank,
    random_batch,
    small_config,
    small_schema,
    table_gradients,
    whole_tables,
)

SCHEMA = small_schema(11, 7, 5, 3)
CANDIDATES = [0, 2, 3, 6]
# Per scheme: the columns of each candidate in the physical table, worked out by hand.
COLUMNS = {"shared": [(0, 0), (0, 2), (0, 3), (0, 6)], "independent": [(0, 0), (0, 2), (2, 5), (5, 11)]}
WIDTH = {"shared": 8, "independent": 12}


def max_tables(scheme: str) -> MaxTables:
    return MaxTables(SCHEMA, CANDIDATES, scheme, one_rank(), DistConfig(), OptimConfig(), 0, 0.1)


def supernet(scheme: str, norm: str = "none", backbone: str = "deepfm") -> SupernetModel:
    # The learned map of each width; the other transforms are in test_transforms.py.
    kind = ["model.transform=width", f"model.norm={norm}", f"model.backbone={backbone}"]
    overrides = [*kind, "model.init_std=0.5", *STEEP]
    model = SupernetModel(small_config("no-data", "no-run", *overrides), SCHEMA, CANDIDATES, scheme, one_rank(), True)
    with torch.no_grad():  # away from the identity, so that a mixed-up weight shows
        generator = torch.Generator().manual_seed(5)
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("scheme", ["shared", "independent"])
def test_each_candidate_owns_the_columns_its_scheme_says(scheme: str) -> None:
    tables = max_tables(scheme)
    assert tables.columns == COLUMNS[scheme]
    assert tables.width == WIDTH[scheme]
    for row, (start, stop) in zip(tables.mask, COLUMNS[scheme], strict=True):
        assert torch.nonzero(row).flatten().tolist() == list(range(start, stop))


def test_a_look_up_returns_the_rows_of_each_field_in_schema_order() -> None:
    tables, batch = max_tables("shared"), random_batch(SCHEMA)
    values, ids = whole_tables(tables.sharded), ids_of(batch, SCHEMA)
    expected = torch.stack([values[n][ids[n]] for n in SCHEMA.names])
    assert torch.equal(tables(batch.sparse).stack(), expected)


@pytest.mark.parametrize("scheme", ["shared", "independent"])
@pytest.mark.parametrize("backbone", ["deepfm", "wide_deep", "fm"])
@pytest.mark.parametrize(
    ("choice", "keep"), [([3, 1, 2, 2], [1, 1, 1, 1]), ([0, 3, 3, 1], [1, 1, 0, 1]), ([2, 2, 0, 3], [0, 0, 0, 1])]
)
def test_a_subnet_equals_plain_torch_on_sliced_tables(
    scheme: str, backbone: str, choice: list[int], keep: list[int]
) -> None:
    """Forward, and the gradient of every table: exactly zero outside the chosen columns and rows."""
    model, batch = supernet(scheme, backbone=backbone), random_batch(SCHEMA)
    before = whole_tables(model.sharded)
    logits, _ = model(batch, torch.tensor(choice), torch.tensor(keep, dtype=torch.bool))
    binary_cross_entropy_with_logits(logits, batch.label).backward()

    ids = ids_of(batch, SCHEMA)
    slices: dict[str, torch.Tensor] = {}
    unify, plain = model.bare_head.unify, []
    for f, (name, j, on) in enumerate(zip(SCHEMA.names, choice, keep, strict=True)):
        start, stop = COLUMNS[scheme][j]
        if not on or start == stop:
            plain.append(torch.zeros(batch.size, 8))
            continue
        slices[name] = before[name][:, start:stop].clone().requires_grad_()
        plain.append(slices[name][ids[name]] @ unify.weight[j, start:stop].detach() + unify.bias[j].detach())
        assert SCHEMA.names.index(name) == f
    expected = model.bare_head.backbone(torch.stack(plain, 1), batch.dense)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    binary_cross_entropy_with_logits(expected, batch.label).backward()

    gradients = table_gradients(model.sharded, before)
    for name, j in zip(SCHEMA.names, choice, strict=True):
        gradient = gradients[name]
        if name not in slices:
            assert not gradient.any()
            continue
        start, stop = COLUMNS[scheme][j]
        wanted = slices[name].grad
        assert wanted is not None
        # FM's terms cancel in some entries: what rounding leaves there goes with the largest, not with the entry.
        largest = float(wanted.abs().max())
        torch.testing.assert_close(gradient[:, start:stop], wanted, rtol=1e-4, atol=1e-5 * largest)
        outside = torch.cat([gradient[:, :start], gradient[:, stop:]], 1)
        assert not outside.any()


@pytest.mark.parametrize("norm", ["none", "field", "width"])
def test_dropped_fields_and_candidate_zero_reach_the_backbone_as_zeros(norm: str) -> None:
    model, batch = supernet("shared", norm), random_batch(SCHEMA)
    for training in (True, False):
        model.train(training)
        choice, keep = torch.tensor([0, 3, 1, 2]), torch.tensor([True, True, False, True])
        u = model.bare_head.unify(model.tables(batch.sparse), choice, keep)
        assert not u[:, [0, 2]].any()
        assert u[:, [1, 3]].abs().sum((0, 2)).gt(0).all()


def mixed(widths: Sequence[int], *overrides: str) -> tuple[SubnetModel, Allocation]:
    allocation = Allocation(SCHEMA, dict(zip(SCHEMA.names, widths, strict=True)))
    config = small_config("no-data", "no-run", "model.transform=width", "model.init_std=0.5", *STEEP, *overrides)
    model = SubnetModel(config, allocation, one_rank())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(6)
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, allocation


@pytest.mark.parametrize("widths", [(6, 2, 6, 3), (2, 0, 6, 0), (5, 5, 5, 5), (0, 0, 4, 0)])
@pytest.mark.parametrize("norm", ["none", "field"])
def test_a_retrained_model_equals_its_plain_torch_twin(widths: tuple[int, ...], norm: str) -> None:
    model, allocation = mixed(widths, f"model.norm={norm}")
    batch = random_batch(SCHEMA)
    ids, tables, unify = ids_of(batch, SCHEMA), whole_tables(model.sharded), model.bare_head.unify
    of_width = {w: i for i, w in enumerate(unify.groups)}
    leaves = {n: tables[n].clone().requires_grad_() for n in allocation.kept}
    parts = []
    for name in allocation.kept:
        w = allocation.widths[name]
        u = leaves[name][ids[name], :w] @ unify.weights[of_width[w]].detach() + unify.bias[of_width[w]].detach()
        if norm == "field":
            twin = torch.nn.BatchNorm1d(8)
            with torch.no_grad():
                twin.weight.copy_(unify.norm.scale[of_width[w]])
                twin.bias.copy_(unify.norm.shift[of_width[w]])
            u = twin(u)
        parts.append(u)
    expected = model.bare_head.backbone(torch.stack(parts, 1), batch.dense)
    logits, _ = model(batch)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    binary_cross_entropy_with_logits(logits, batch.label).backward()
    binary_cross_entropy_with_logits(expected, batch.label).backward()
    for name, gradient in table_gradients(model.sharded, tables).items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-3, atol=1e-7)


def test_the_columns_that_only_pad_a_table_never_change() -> None:
    for optimizer in ("sgd", "adam", "adagrad"):
        model, _ = mixed((6, 2, 3, 3), f"optim.embedding={optimizer}")
        before = whole_tables(model.sharded)
        for seed in range(3):
            model(random_batch(SCHEMA, seed=seed))[0].sum().backward()
            model.sharded.step()
        after = whole_tables(model.sharded)
        for name, nominal in zip(SCHEMA.names, (6, 2, 3, 3), strict=True):
            moved = after[name] != before[name]
            assert moved[:, :nominal].any()
            assert not moved[:, nominal:].any()


def test_equal_widths_may_skip_the_transform() -> None:
    model, _ = mixed((4, 4, 4, 4), "model.unify=mixed")
    batch = random_batch(SCHEMA)
    tables, ids = whole_tables(model.sharded), ids_of(batch, SCHEMA)
    u = torch.stack([tables[n][ids[n]] for n in SCHEMA.names], 1)
    torch.testing.assert_close(model(batch)[0], model.bare_head.backbone(u, batch.dense), rtol=1e-5, atol=1e-6)
    assert mixed((4, 4, 8, 4), "model.unify=mixed")[0].bare_head.backbone.width == 8


def test_the_key_order_of_a_batch_does_not_matter_to_mixed_tables() -> None:
    allocation = Allocation(SCHEMA, {"f0": 6, "f1": 2, "f2": 6, "f3": 3})
    tables = MixedTables(allocation, one_rank(), DistConfig(), OptimConfig(), 0, 0.1)
    assert [t.width for t in tables.sharded.tables.values()] == [4, 4, 8, 8]  # narrow ones first
    batch, whole = random_batch(SCHEMA), whole_tables(tables.sharded)
    ids = ids_of(batch, SCHEMA)
    pooled = tables(batch.sparse)
    assert pooled.widths == (6, 2, 6, 3)
    for f, (name, width) in enumerate(allocation.widths.items()):
        assert torch.equal(pooled.stack([f])[0], whole[name][ids[name], :width])


def test_the_flops_of_a_model_count_its_matrix_products() -> None:
    model, _ = mixed((6, 2, 6, 0))
    inputs = 3 * 8 + 1
    unify = 2 * 8 * (6 + 2 + 6)
    assert model.flops_per_sample() == unify + 2 * (inputs + inputs * 8 + 8 * 4 + 4)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([4], "at least two"),
        ([-2, 4], "must be >= 0"),
        ([2, 8, 4], r"4 follows 8; write \[2, 4, 8\]"),
        ([2, 2], "2 follows 2"),
    ],
)
def test_bad_candidates_are_refused(widths: list[int], message: str) -> None:
    with pytest.raises(UserError, match=f"search.candidates: .*{message}"):
        check_candidates(widths)
