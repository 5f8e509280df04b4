"""The transform to the common width and its BatchNorm, against torch's own BatchNorm1d."""

from __future__ import annotations

import pytest
import torch

from embsearch_dist.models.norm import UnifyNorm
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.unify import MixedUnify, NoUnify, SupernetUnify, initial_map

FIELDS, ROWS, WIDTH = 4, 20, 6
CHOICE = torch.tensor([2, 0, 1, 2])


def norm_of(kind: str, candidates: int = 3) -> UnifyNorm:
    norm = UnifyNorm(FIELDS, candidates, WIDTH, kind, 0.1, synchronise=False)
    if kind == "none":
        return norm
    with torch.no_grad():
        norm.scale.normal_(generator=torch.Generator().manual_seed(1))
        norm.shift.normal_(generator=torch.Generator().manual_seed(2))
    return norm


def values(seed: int) -> torch.Tensor:
    return torch.randn(FIELDS, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def twin_of(norm: UnifyNorm, candidate: int) -> torch.nn.BatchNorm1d:
    twin = torch.nn.BatchNorm1d(WIDTH, eps=norm.eps, momentum=norm.momentum)
    with torch.no_grad():
        twin.weight.copy_(norm.scale[candidate])
        twin.bias.copy_(norm.shift[candidate])
    return twin


def test_field_statistics_equal_a_batchnorm_of_each_field() -> None:
    norm = norm_of("field")
    twins = [twin_of(norm, int(j)) for j in CHOICE]
    for step in range(3):
        u, v = values(step).requires_grad_(), values(step).requires_grad_()
        out = norm(u, CHOICE)
        expected = torch.stack([twin(v[f]) for f, twin in enumerate(twins)], 1)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(u.grad, v.grad, rtol=1e-3, atol=1e-5)
    for f, twin in enumerate(twins):
        torch.testing.assert_close(norm.mean[f, CHOICE[f]], twin.running_mean)
        torch.testing.assert_close(norm.variance[f, CHOICE[f]], twin.running_var)
        twin.eval()
    norm.eval()
    expected = torch.stack([twin(values(7)[f]) for f, twin in enumerate(twins)], 1)
    torch.testing.assert_close(norm(values(7), CHOICE), expected, rtol=1e-4, atol=1e-5)


def test_width_statistics_equal_a_batchnorm_over_all_fields_of_a_candidate() -> None:
    norm = norm_of("width")
    shared = {j: twin_of(norm, j) for j in (0, 1, 2)}
    for step in range(3):
        u = values(step)
        out = norm(u, CHOICE)
        for j, twin in shared.items():
            fields = torch.nonzero(j == CHOICE).flatten()
            expected = twin(u[fields].reshape(-1, WIDTH)).view(len(fields), ROWS, WIDTH)
            torch.testing.assert_close(out[:, fields].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
    norm.eval()
    for j, twin in shared.items():
        torch.testing.assert_close(norm.mean[0, j], twin.running_mean)
        fields = torch.nonzero(j == CHOICE).flatten()
        expected = twin.eval()(values(8)[fields].reshape(-1, WIDTH)).view(len(fields), ROWS, WIDTH)
        # torch keeps the unbiased variance of fields * rows values, this norm that of the rows.
        torch.testing.assert_close(norm(values(8), CHOICE)[:, fields].transpose(0, 1), expected, rtol=0.02, atol=0.02)


def test_synchronised_statistics_of_one_rank_equal_the_native_kernel() -> None:
    from tests.factories import one_rank

    one_rank()
    native, two_pass = norm_of("field"), norm_of("field")
    two_pass.synchronise = True
    for step in range(2):
        torch.testing.assert_close(native(values(step), CHOICE), two_pass(values(step), CHOICE), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(native.mean, two_pass.mean)
    torch.testing.assert_close(native.variance, two_pass.variance)


@pytest.mark.parametrize("kind", ["field", "width"])
def test_dropped_fields_leave_all_statistics_alone(kind: str) -> None:
    norm, keep = norm_of(kind), torch.tensor([False, True, True, False])
    before = norm.mean.clone(), norm.variance.clone()
    loud = values(0)
    loud[[0, 3]] = 1e6
    out = norm(loud, CHOICE, keep)
    # Candidate 2 was chosen by dropped fields only.
    assert torch.equal(norm.mean[:, 2], before[0][:, 2])
    assert torch.equal(norm.variance[:, 2], before[1][:, 2])
    quiet = norm_of(kind)
    torch.testing.assert_close(out[:, 1:3], quiet(values(0), CHOICE)[:, 1:3])
    assert norm.mean.abs().max() < 10


def test_none_is_no_normalisation() -> None:
    assert torch.equal(norm_of("none")(values(0), CHOICE), values(0).transpose(0, 1))
    assert not list(norm_of("none").state_dict())  # DDP stops at parameters that take no part


def test_running_statistics_do_not_move_in_evaluation() -> None:
    norm = norm_of("field").eval()
    before = norm.mean.clone()
    norm(values(0), CHOICE)
    assert torch.equal(norm.mean, before)


def test_the_initial_map_is_the_identity_up_to_the_smaller_width() -> None:
    assert torch.equal(initial_map(3, 5), torch.eye(3, 5))
    assert torch.equal(initial_map(5, 5), torch.eye(5))
    wide = initial_map(10, 5)  # wraps around, scaled so that the output keeps its size
    assert torch.equal(wide[:5], wide[5:])
    torch.testing.assert_close(wide.square().sum(0), torch.ones(5))


def test_supernet_weights_are_zero_outside_a_candidates_columns() -> None:
    mask = torch.tensor([[0.0] * 4, [1, 1, 0, 0], [0, 1, 1, 1]])
    unify = SupernetUnify(2, mask, 5, "none", 0.1, False)
    assert not (unify.weight * (1 - mask)[..., None]).any()
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        unify.weight.fill_(1.0)  # even weights that have drifted outside are not read
    out = unify(x, torch.tensor([1, 2]), torch.tensor([True, True]))
    torch.testing.assert_close(out[:, 0], x[0, :, :2].sum(1)[:, None].expand(3, 5))
    torch.testing.assert_close(out[:, 1], x[1, :, 1:].sum(1)[:, None].expand(3, 5))


def test_mixed_unify_puts_fields_back_into_schema_order() -> None:
    # Schema order is wide, narrow, wide; the tables lie narrow first, and the narrow one is padded to 4 columns.
    unify = MixedUnify([3, 2, 3], 3, "none", 0.1, False)
    values = torch.randn(4, 10)
    out = unify(Pooled(values, (4, 0, 7), (3, 2, 3)))
    assert out.shape == (4, 3, 3)
    torch.testing.assert_close(out[:, 0], values[:, 4:7] @ unify.weights[1])
    torch.testing.assert_close(out[:, 1], values[:, 0:2] @ unify.weights[0])
    torch.testing.assert_close(out[:, 2], values[:, 7:10] @ unify.weights[1])
    assert unify.choice.tolist() == [1, 0, 1]
    torch.testing.assert_close(unify.batched(Pooled(values, (4, 0, 7), (3, 2, 3))), out)  # what a GPU does


def test_no_unify_passes_the_embeddings_on() -> None:
    x = torch.randn(4, 15)
    assert torch.equal(NoUnify()(Pooled(x, (0, 5, 10), (5, 5, 5))), x.view(4, 3, 5))
    assert torch.equal(NoUnify()(Pooled(x, (5, 10, 0), (5, 5, 5))), x.view(4, 3, 5)[:, [1, 2, 0]])


@pytest.mark.parametrize("norm", ["none", "field", "width"])
@pytest.mark.parametrize("starts", [(0, 4, 8), (8, 0, 4)])
def test_reading_columns_in_place_equals_the_batched_product(norm: str, starts: tuple[int, ...]) -> None:
    mask = torch.tensor([[0.0] * 4, [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    unify = SupernetUnify(3, mask, 5, norm, 0.1, False)
    with torch.no_grad():
        for p in unify.parameters():
            p.normal_()
    choice, keep = torch.tensor([1, 3, 2]), torch.tensor([True, True, False])
    found = []
    for batched in (False, True):
        values = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x = Pooled(values, starts, (4, 4, 4))
        unify.zero_grad()
        u = unify(x.stack() if batched else x, choice, keep)
        (u * torch.arange(1, u.numel() + 1).view(u.shape)).sum().backward()
        found.append([u.detach(), values.grad, *(p.grad for p in unify.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) >= 4
    assert not found[0][0][:, 2].any()
    for a, b in zip(*found, strict=True):
        assert a is not None
        # A sum that cancels keeps the rounding of its largest terms.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
