"""Every transform and both kinds of first-order weights: found models, supernets, scores and folding agree."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import pad, relu

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.models.folded import can_fold
from embsearch_dist.models.model import SubnetModel, SupernetModel
from embsearch_dist.models.unify import MixedIdentity, MixedUnify, NoUnify
from tests.factories import (
    STEEP,
    ids_of,
    one_rank,
    random_batch,
    set_tables,
    small_config,
    small_schema,
    table_gradients,
    whole_tables,
)

SCHEMA = small_schema(11, 7, 5, 13)
CANDIDATES = [0, 2, 3, 6]
CHOICE = [3, 1, 0, 2]
TRANSFORMS = ["identity", "width", "field", "mlp"]
SCHEMES = ["shared", "independent"]
FIRST_ORDERS = ["embedding", "value"]


def shaken(model: SubnetModel | SupernetModel) -> None:
    """Away from every start, so that a mixed-up weight shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.head.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def supernet(scheme: str, *overrides: str) -> SupernetModel:
    config = small_config("no-data", "no-run", "model.init_std=0.5", *STEEP, *overrides)
    model = SupernetModel(config, SCHEMA, CANDIDATES, scheme, one_rank(), True)
    shaken(model)
    return model


def subnet(widths: Sequence[int], *overrides: str) -> SubnetModel:
    config = small_config("no-data", "no-run", "model.init_std=0.5", *STEEP, *overrides)
    model = SubnetModel(config, Allocation(SCHEMA, dict(zip(SCHEMA.names, widths, strict=True))), one_rank())
    shaken(model)
    return model


def cut_out(whole: SupernetModel, *overrides: str) -> SubnetModel:
    """The model of the allocation :data:`CHOICE` with the weights that the supernet has for it."""
    found = subnet([CANDIDATES[j] for j in CHOICE], *overrides)
    kept = [f for f, j in enumerate(CHOICE) if CANDIDATES[j]]
    tables, own = whole_tables(whole.sharded), whole_tables(found.sharded)
    columns = [range(*whole.tables.columns[j]) for j in CHOICE]
    for f in kept:
        name = SCHEMA.names[f]
        chosen = [*columns[f], *whole.tables.weights[:1]]
        own[name][:, : len(chosen)] = tables[name][:, chosen]
    set_tables(found.sharded, own)
    source, target = whole.bare_head, found.bare_head
    with torch.no_grad():
        if isinstance(target.unify, MixedUnify):
            for place, f in enumerate(kept):
                m, j = int(source.unify.first_map[f]) + CHOICE[f], CHOICE[f]
                weight, bias = target.unify.map_of(place)
                weight.copy_(source.unify.weight[m][list(columns[f])])
                bias.copy_(source.unify.bias[m])
                if target.unify.after is not None:
                    group = target.unify.groups.index(CANDIDATES[j])
                    target.unify.after.weight[group] = source.unify.after.weight[j]
                    target.unify.after.bias[group] = source.unify.after.bias[j]
        a, b = source.backbone, target.backbone
        widths = [CANDIDATES[CHOICE[f]] if isinstance(target.unify, MixedIdentity) else a.width for f in kept]
        inputs = [f * a.width + k for f, w in zip(kept, widths, strict=True) for k in range(w)]
        inputs += range(len(SCHEMA.names) * a.width, a.starts[-1] + len(SCHEMA.dense))
        if a.deep:
            b.first.weight.copy_(a.first.weight[:, inputs])
            b.first.bias.copy_(a.first.bias)
            b.rest.load_state_dict(a.rest.state_dict())
        b.linear.weight.copy_(a.linear.weight if a.values else a.linear.weight[:, inputs])
        b.linear.bias.copy_(a.linear.bias)
    return found


@pytest.mark.parametrize("first_order", FIRST_ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_subnet_of_the_supernet_is_the_found_model_with_its_weights(
    transform: str, scheme: str, first_order: str
) -> None:
    settings = [f"model.transform={transform}", f"model.first_order={first_order}"]
    whole, batch = supernet(scheme, *settings), random_batch(SCHEMA)
    found = cut_out(whole, *settings)
    before = whole_tables(whole.sharded), whole_tables(found.sharded)
    choice, keep = torch.tensor(CHOICE), torch.ones(4, dtype=torch.bool)
    inherited, own = whole(batch, choice, keep)[0], found(batch)[0]
    torch.testing.assert_close(inherited, own, rtol=1e-5, atol=1e-5)
    assert float(inherited.std()) > 0.1
    # The look-ups' gradients too, and nothing moves that the subnet does not read.
    for logits in (inherited, own):
        (logits * torch.arange(len(logits))).sum().backward()
    wide, narrow = (table_gradients(m.sharded, b) for m, b in zip((whole, found), before, strict=True))
    for name, j in zip(SCHEMA.names, CHOICE, strict=True):
        read = whole.tables.read[j] > 0
        assert not wide[name][:, ~read].any()
        if CANDIDATES[j]:
            expected = narrow[name][:, : int(read.sum())]
            rounding = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(wide[name][:, read], expected, rtol=1e-3, atol=rounding)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_candidate_with_columns_reads_the_weight_behind_the_last(scheme: str) -> None:
    tables = supernet(scheme, "model.first_order=value").tables
    last = 6 if scheme == "shared" else 11
    assert tables.weights == [last] * 4
    for (start, stop), read in zip(tables.columns, tables.read, strict=True):
        assert read.nonzero().flatten().tolist() == ([*range(start, stop), last] if stop > start else [])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("norm", ["none", "field"])
def test_what_a_gpu_computes_is_what_a_cpu_computes(transform: str, scheme: str, norm: str) -> None:
    whole, batch = supernet(scheme, f"model.transform={transform}", f"model.norm={norm}"), random_batch(SCHEMA)
    unify, pooled = whole.bare_head.unify, whole.tables(batch.sparse)
    choice, keep = torch.tensor(CHOICE), torch.tensor([True, True, True, False])
    in_place, batched = unify(pooled, choice, keep), unify(pooled.stack(), choice, keep)
    assert not in_place[:, 2:].any() and in_place[:, :2].any()
    torch.testing.assert_close(in_place, batched, rtol=1e-4, atol=1e-5)
    if transform == "identity":
        assert not in_place[:, 1, 2:].any()  # behind a norm too
    alone = subnet([6, 2, 0, 3], f"model.transform={transform}", f"model.norm={norm}")
    pooled, mixed = alone.tables(batch.sparse), alone.bare_head.unify
    if isinstance(mixed, MixedUnify):
        torch.testing.assert_close(mixed.in_place(pooled), mixed.batched(pooled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "field"])
@pytest.mark.parametrize("first_order", FIRST_ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_scores_are_those_of_the_supernet(transform: str, scheme: str, first_order: str, norm: str) -> None:
    settings = [f"model.transform={transform}", f"model.first_order={first_order}", f"model.norm={norm}"]
    whole, batch = supernet(scheme, *settings), random_batch(SCHEMA, 60)
    if norm == "field":  # moments of the sample, as the scorer takes them
        unify, pooled = whole.bare_head.unify, whole.tables(batch.sparse).stack()
        for j in range(1, len(CANDIDATES)):
            u = unify.mapped(pooled, torch.full((4,), j))
            unify.norm.mean[:, j], unify.norm.variance[:, j] = u.mean(1), u.var(1, unbiased=False)
    scorer = SubnetScorer(whole, [batch], one_rank())
    choices = torch.tensor([CHOICE, [1, 1, 1, 1], [0, 0, 0, 3], [2, 0, 3, 1]])
    with torch.no_grad():
        expected = [whole(batch, c, torch.ones(4, dtype=torch.bool))[0] for c in choices]
    torch.testing.assert_close(scorer.logits(choices), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first_order", FIRST_ORDERS)
@pytest.mark.parametrize("backbone", ["deepfm", "wide_deep", "fm", "mlp"])
def test_identity_is_a_model_of_embeddings_filled_up_with_zeros(backbone: str, first_order: str) -> None:
    widths = [6, 2, 0, 3]
    model = subnet(widths, f"model.backbone={backbone}", f"model.first_order={first_order}")
    batch = random_batch(SCHEMA)
    tables, ids, part = whole_tables(model.sharded), ids_of(batch, SCHEMA), model.bare_head.backbone
    rows = {n: tables[n][ids[n]] for n in model.tables.names}
    kept = [(n, w) for n, w in zip(SCHEMA.names, widths, strict=True) if w]
    x = torch.cat([*(rows[n][:, :w] for n, w in kept), batch.dense], 1)
    if first_order == "value" and backbone != "mlp":
        expected = part.linear(batch.dense)[:, 0] + sum(rows[n][:, w] for n, w in kept)
    else:
        expected = part.linear(x)[:, 0]
    if backbone in ("deepfm", "fm"):
        filled = [pad(rows[n][:, :w], (0, 6 - w)) for n, w in kept]
        expected = expected + sum((a * b).sum(1) for a, b in itertools.combinations(filled, 2))
    if backbone != "fm":
        assert part.first.in_features == 6 + 2 + 3 + 1  # none for what would be zero
        expected = expected + part.rest[1:](relu(part.first(x)))[:, 0]
    torch.testing.assert_close(model(batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_uniform_widths_under_identity_are_the_model_without_a_transform() -> None:
    identity, none = subnet([5, 5, 0, 5]), subnet([5, 5, 0, 5], "model.transform=width", "model.unify=mixed")
    assert isinstance(identity.bare_head.unify, NoUnify)
    assert identity.bare_head.state_dict().keys() == none.bare_head.state_dict().keys()
    assert torch.equal(identity(random_batch(SCHEMA))[0], none(random_batch(SCHEMA))[0])


@pytest.mark.parametrize("transform", ["width", "field", "mlp"])
def test_a_learned_transform_begins_as_none(transform: str) -> None:
    config = small_config("no-data", "no-run", "model.init_std=0.5", f"model.transform={transform}")
    model = SubnetModel(config, Allocation.uniform(SCHEMA, 6), one_rank())
    pooled = model.tables(random_batch(SCHEMA).sparse)
    expected = pad(pooled.stack().transpose(0, 1), (0, 2))
    assert torch.equal(model.bare_head.unify(pooled), expected)


@pytest.mark.parametrize("first_order", FIRST_ORDERS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backbone", ["wide_deep", "mlp"])
def test_folding_changes_nothing_and_takes_linear_maps_alone(backbone: str, transform: str, first_order: str) -> None:
    settings = [f"model.backbone={backbone}", f"model.transform={transform}", f"model.first_order={first_order}"]
    model, batch = subnet([6, 2, 0, 3], *settings).eval(), random_batch(SCHEMA)
    head = model.bare_head
    assert can_fold(head.unify, head.backbone) == (transform != "mlp")
    with torch.no_grad():
        plain = model(batch)[0]
        model.fold()
        assert model.folds == (transform != "mlp")
        torch.testing.assert_close(model(batch)[0], plain, rtol=1e-4, atol=1e-4)
