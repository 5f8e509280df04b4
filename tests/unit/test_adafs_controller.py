"""AdaFS: the controller's formula and the choice of fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from embsearch_dist.methods.adafs.controller import Controller, keep_top


def plain_controller(controller: Controller, fields: int, width: int, dropout: float = 0.0) -> nn.Module:
    """The same layers of plain torch, with the same numbers."""
    linear, norm = nn.Linear(fields * width, fields), nn.BatchNorm1d(fields)
    with torch.no_grad():
        linear.weight.copy_(controller.linear.weight)
        linear.bias.normal_()  # which BatchNorm takes out again
        norm.weight.copy_(controller.norm.scale[0])
        norm.bias.copy_(controller.norm.shift[0])
    return nn.Sequential(nn.Flatten(), linear, norm, nn.ReLU(), nn.Dropout(dropout), nn.Softmax(1))


def test_the_controller_is_linear_batchnorm_relu_softmax() -> None:
    torch.manual_seed(0)
    controller = Controller(5, 4, 0.0, synchronise=False)
    with torch.no_grad():
        controller.norm.scale.uniform_(0.5, 2)
        controller.norm.shift.normal_()
    plain = plain_controller(controller, 5, 4)
    start = plain[1].bias.detach().clone()
    for _ in range(4):
        e = torch.randn(64, 5, 4, requires_grad=True)
        twin = e.detach().clone().requires_grad_()
        target = torch.randn(64, 5)
        torch.testing.assert_close(controller(e), plain(twin), rtol=1e-5, atol=1e-6)
        for out in ((controller(e) * target).sum(), (plain(twin) * target).sum()):
            out.backward()
        torch.testing.assert_close(e.grad, twin.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(controller.linear.weight.grad, plain[1].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(controller.norm.scale.grad[0], plain[2].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(controller.norm.variance[0, 0], plain[2].running_var, rtol=1e-5, atol=1e-6)
    controller.eval(), plain.eval()
    # The bias is in the plain one's running mean, less what has faded in from the mean 0 of the start.
    faded = start * (1 - 0.1) ** 8
    with torch.no_grad():
        plain[1].bias.copy_(start - faded)
    torch.testing.assert_close(controller(e), plain(e), rtol=1e-4, atol=1e-5)


def test_dropout_acts_before_the_softmax_and_only_in_training() -> None:
    torch.manual_seed(0)
    controller = Controller(6, 4, 0.5, synchronise=False)
    e = torch.randn(512, 6, 4)
    weights = controller(e)
    torch.testing.assert_close(weights.sum(1), torch.ones(512))
    # ReLU leaves half of the outputs at 0, dropout half of the rest: those share a row's lowest weight, exp(0) / sum.
    lowest = (weights == weights.min(1, keepdim=True).values).float().mean()
    assert 0.68 < float(lowest) < 0.82
    controller.eval()
    assert torch.equal(controller(e), controller(e))


@pytest.mark.parametrize("renormalise", [True, False])
def test_hard_selection_keeps_exactly_k_and_of_equal_weights_the_first(renormalise: bool) -> None:
    rng = np.random.default_rng(0)
    # Few distinct values, so that ties lie across the border in most rows.
    weights = torch.tensor(rng.integers(1, 4, (300, 7)) / 7, dtype=torch.float32)
    for k in range(1, 8):
        found = keep_top(weights, k, renormalise).numpy()
        for row, kept in zip(weights.numpy(), found, strict=True):
            best = sorted(range(7), key=lambda f: (-row[f], f))[:k]
            expected = np.zeros(7, np.float32)
            expected[best] = row[best] / (row[best].sum() if renormalise else 1)
            np.testing.assert_allclose(kept, expected, rtol=1e-6)
            assert np.count_nonzero(kept) == k


def test_the_gradient_of_a_hard_choice_reaches_what_was_kept_alone() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3]], requires_grad=True)
    keep_top(weights, 2, False).square().sum().backward()
    torch.testing.assert_close(weights.grad, torch.tensor([[0.0, 0.8, 0.0, 0.6]]))
