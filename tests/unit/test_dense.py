"""The dense part's own backward passes against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from embsearch_dist.models.backbones import make_backbone
from embsearch_dist.models.dense import Linear, fm, linear


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("outputs", [1, 2, 16, 33, 400])  # narrow and wide weights
def test_a_linear_layer_equals_torchs(outputs: int) -> None:
    found = []
    for f in (linear, functional.linear):
        x, weight, bias = values(9, 24, seed=0), values(outputs, 24, seed=1), values(outputs, seed=2)
        y = f(x[:, ::2], weight[:, ::2], bias)
        y.square().sum().backward()
        found.append([y, x.grad, weight.grad, bias.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_inputs_get_no_gradient() -> None:
    x, layer = torch.randn(5, 3), Linear(3, 4)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None


def test_fm_equals_the_pairs_and_their_gradients() -> None:
    u = values(6, 4, 3, seed=0)
    pairs = sum((u[:, f] * u[:, g]).sum(1) for f in range(4) for g in range(f + 1, 4))
    weight = torch.arange(1.0, 7.0)
    (expected,) = torch.autograd.grad((pairs * weight).sum(), u)
    torch.testing.assert_close(fm(u), pairs, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad((fm(u) * weight).sum(), u)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_for_hidden_products_only() -> None:
    torch.manual_seed(0)
    exact = make_backbone("deepfm", 5, 8, 2, (32, 16))
    coarse = make_backbone("deepfm", 5, 8, 2, (32, 16), precision="bfloat16")
    coarse.load_state_dict(exact.state_dict())
    u, dense = values(64, 5, 8, seed=1), values(64, 2, seed=2)
    a, b = exact(u, dense), coarse(u, dense)
    assert b.dtype == torch.float32 and all(p.dtype == torch.float32 for p in coarse.parameters())
    assert 0 < (a - b).abs().max() < 0.02
    (g,), (h,) = torch.autograd.grad(a.sum(), u), torch.autograd.grad(b.sum(), u)
    torch.testing.assert_close(g, h, rtol=0.05, atol=0.02)
    flat = make_backbone("fm", 5, 8, 2, (), precision="bfloat16")
    torch.testing.assert_close(flat(u, dense), make_backbone_like(flat)(u, dense), rtol=0, atol=0)


def make_backbone_like(other: torch.nn.Module) -> torch.nn.Module:
    twin = make_backbone("fm", 5, 8, 2, ())
    twin.load_state_dict(other.state_dict())
    return twin
