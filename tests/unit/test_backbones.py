"""Backbones against their textbook formulas, and the additive form that the search relies on."""

from __future__ import annotations

import pytest
import torch

from embsearch_dist.models.backbones.additive import Backbone, make_backbone

FIELDS, WIDTH, ROWS = 5, 6, 9
KINDS = ["wide_deep", "deepfm", "fm"]


def inputs(dense: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(ROWS, FIELDS, WIDTH, generator=generator),
        torch.randn(ROWS, dense, generator=generator),
    )


def backbone(kind: str, dense: int, hidden: tuple[int, ...] = (8, 4)) -> Backbone:
    torch.manual_seed(0)
    return make_backbone(kind, FIELDS, WIDTH, dense, hidden).eval()


def sum_of_terms(model: Backbone, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    logit, first = model.dense_terms(x)
    for f in range(FIELDS):
        part = model.field_terms(f, u[:, f])
        assert part[1].shape == (ROWS, model.first_width)
        logit, first = logit + part[0], first + part[1]
    if model.fm:
        logit = logit + (u @ u.transpose(1, 2)).triu(1).sum((1, 2))
    return logit + model.rest(first).squeeze(1) if model.deep else logit


@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_equals_the_finished_sum_of_terms(kind: str, dense: int) -> None:
    model, (u, x) = backbone(kind, dense), inputs(dense)
    torch.testing.assert_close(sum_of_terms(model, u, x), model(u, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [(8,), (8, 4, 2)])
def test_any_number_of_hidden_layers_is_additive_too(hidden: tuple[int, ...]) -> None:
    model, (u, x) = backbone("deepfm", 1, hidden), inputs(1)
    assert [layer.in_features for layer in model.later_layers] == list(hidden)
    torch.testing.assert_close(sum_of_terms(model, u, x), model(u, x), rtol=1e-4, atol=1e-5)


def test_the_fm_term_equals_the_double_loop() -> None:
    model, (u, x) = backbone("fm", 2), inputs(2)
    pairs = sum((u[:, f] * u[:, g]).sum(1) for f in range(FIELDS) for g in range(f + 1, FIELDS))
    linear = torch.cat([u.flatten(1), x], 1) @ model.linear.weight[0] + model.linear.bias
    torch.testing.assert_close(model(u, x), linear + pairs, rtol=1e-4, atol=1e-4)


def test_deepfm_is_wide_and_deep_plus_the_fm_term() -> None:
    deepfm, wide_deep, (u, x) = backbone("deepfm", 2), backbone("wide_deep", 2), inputs(2)
    pairs = sum((u[:, f] * u[:, g]).sum(1) for f in range(FIELDS) for g in range(f + 1, FIELDS))
    torch.testing.assert_close(deepfm(u, x), wide_deep(u, x) + pairs, rtol=1e-4, atol=1e-4)


def test_wide_and_deep_is_a_linear_part_and_an_mlp() -> None:
    model, (u, x) = backbone("wide_deep", 2), inputs(2)
    flat = torch.cat([u.flatten(1), x], 1)
    hidden = torch.relu(model.first(flat))
    hidden = torch.relu(model.rest[2](hidden))
    torch.testing.assert_close(model(u, x), (model.linear(flat) + model.rest[-1](hidden)).squeeze(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_one_value_a_row_and_dense_columns_count(kind: str) -> None:
    model, (u, x) = backbone(kind, 3), inputs(3)
    out = model(u, x)
    assert out.shape == (ROWS,)
    assert (model(u, x + 1) != out).all()


def test_fm_has_no_mlp() -> None:
    assert backbone("fm", 1).first_width == 0 and backbone("fm", 1).later_layers == []
    assert sum(p.numel() for p in backbone("fm", 1).parameters()) == FIELDS * WIDTH + 1 + 1


def test_dropout_acts_in_training_only() -> None:
    model = make_backbone("wide_deep", FIELDS, WIDTH, 0, (64,), 0.5)
    u, x = inputs(0)
    assert not torch.equal(model(u, x), model(u, x))
    model.eval()
    assert torch.equal(model(u, x), model(u, x))
