"""The dense part's own backward passes against autograd's."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional

from embsearch_dist.allocation import Allocation
from embsearch_dist.kernels import linear as kernel
from embsearch_dist.kernels.bfloat16 import INSTRUCTIONS
from embsearch_dist.kernels.linear import Linear, fm, linear, pair_products, pairs
from embsearch_dist.models.backbones.additive import make_backbone
from embsearch_dist.models.model import SubnetModel
from tests.factories import one_rank, small_config, small_schema


def values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("outputs", [1, 2, 16, 33, 400])  # narrow and wide weights
def test_a_linear_layer_equals_torchs(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ONEDNN", kernel.HAS_ONEDNN)  # on a CPU that would not choose it, too
    found = []
    for f in (linear, functional.linear):
        x, weight, bias = values(9, 24, seed=0), values(outputs, 24, seed=1), values(outputs, seed=2)
        y = f(x[:, ::2], weight[:, ::2], bias)
        y.square().sum().backward()
        found.append([y, x.grad, weight.grad, bias.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_inputs_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ONEDNN", kernel.HAS_ONEDNN)
    x, layer = torch.randn(5, 3), Linear(3, 4)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None


def test_fm_equals_the_pairs_and_their_gradients() -> None:
    u = values(6, 4, 3, seed=0)
    written = sum((u[:, f] * u[:, g]).sum(1) for f in range(4) for g in range(f + 1, 4))
    weight = torch.arange(1.0, 7.0)
    (expected,) = torch.autograd.grad((written * weight).sum(), u)
    torch.testing.assert_close(fm(u), written, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad((fm(u) * weight).sum(), u)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 5])
def test_pairs_of_tokens_and_their_sums_equal_those_written_out(tokens: int) -> None:
    z = values(6, 3, tokens, seed=0)
    both = [(z[:, :, i], z[:, :, j]) for i in range(tokens) for j in range(i)]  # row by row below the diagonal
    written = [torch.stack([(a * b).sum(1) for a, b in both], 1), 2 * torch.stack([a * b for a, b in both]).sum(0)]
    for found, expected in zip([pairs(z), pair_products(z)], written, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        weight = torch.arange(1.0, found.numel() + 1).view_as(found)
        ours, theirs = (torch.autograd.grad((x * weight).sum(), z, retain_graph=True)[0] for x in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


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


@pytest.mark.parametrize("able", [False, True])
def test_a_model_says_that_bfloat16_is_slow_where_no_instruction_does_it(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    for name in INSTRUCTIONS:
        monkeypatch.setattr(torch.cpu, name, lambda: able, raising=False)
    config = small_config("no-data", "no-run", "model.precision=bfloat16", method="ues")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SubnetModel(config, Allocation.uniform(small_schema(11, 7), 4), one_rank())
    told = [str(w.message) for w in caught if "model.precision" in str(w.message)]
    assert len(told) == (0 if able else 1) and all("float32 is several times faster" in text for text in told)


def make_backbone_like(other: torch.nn.Module) -> torch.nn.Module:
    twin = make_backbone("fm", 5, 8, 2, ())
    twin.load_state_dict(other.state_dict())
    return twin
