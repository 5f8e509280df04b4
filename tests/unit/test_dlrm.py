"""DLRM against its formula written out."""

from __future__ import annotations

import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.models.backbones.dlrm import DLRM

ROWS, FIELDS, WIDTH = 7, 4, 3


def inputs(dense: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, FIELDS, WIDTH), torch.randn(ROWS, dense)


@pytest.mark.parametrize("dense", [0, 5])
def test_the_logit_is_the_formula(dense: int) -> None:
    model, (u, x) = DLRM(FIELDS, WIDTH, dense, [6], [8]), inputs(dense)
    vectors, first = [u[:, f] for f in range(FIELDS)], []
    if model.bottom is not None:
        inner = torch.relu(x @ model.bottom[0].weight.T + model.bottom[0].bias)
        first = [torch.relu(inner @ model.bottom[3].weight.T + model.bottom[3].bias)]
    vectors = [*first, *vectors]
    pairs = [(vectors[i] * vectors[j]).sum(1, keepdim=True) for i in range(len(vectors)) for j in range(i)]
    hidden = torch.relu(torch.cat([*first, *pairs], 1) @ model.top[0].weight.T + model.top[0].bias)
    expected = (hidden @ model.top[3].weight.T + model.top[3].bias).squeeze(1)
    torch.testing.assert_close(model(u, x), expected, rtol=1e-4, atol=1e-5)
    assert model.flops == 2 * len(vectors) ** 2 * WIDTH


def test_without_hidden_layers_the_pairs_are_added_up_linearly() -> None:
    model, (u, x) = DLRM(2, WIDTH, 0, [], []), (torch.randn(ROWS, 2, WIDTH), torch.zeros(ROWS, 0))
    product = (u[:, 0] * u[:, 1]).sum(1)
    torch.testing.assert_close(model(u, x), product * model.top[0].weight[0, 0] + model.top[0].bias)


def test_every_parameter_and_every_input_counts() -> None:
    model, (u, x) = DLRM(FIELDS, WIDTH, 5, [16], [16]), inputs(5)
    u.requires_grad_(), x.requires_grad_()
    model(u, x).sum().backward()
    assert u.grad is not None and (u.grad.abs().sum((0, 2)) > 0).all()
    assert x.grad is not None and (x.grad.abs().sum(0) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_one_field_alone_has_no_pair() -> None:
    with pytest.raises(
        UserError, match=r"dlrm needs two vectors .* one field whose width is above 0, and no dense column"
    ):
        DLRM(1, WIDTH, 0, [], [8])
    assert DLRM(1, WIDTH, 2, [], [8])(torch.randn(ROWS, 1, WIDTH), torch.randn(ROWS, 2)).shape == (ROWS,)
