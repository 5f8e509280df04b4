"""Pooled embeddings where they lie, and the maps that read them there, against slices and autograd."""

from __future__ import annotations

import torch
from torchrec import KeyedTensor

from embsearch_dist.models.pooled import Move, Pooled, Span, field_linear, moved


def test_fields_are_found_by_name_whatever_the_key_order() -> None:
    values = torch.randn(5, 12)
    ordered = Pooled.of(KeyedTensor(["a", "b", "c"], [4, 4, 4], values), ["a", "b", "c"], [4, 4, 4])
    shuffled = KeyedTensor(["c", "a", "b"], [4, 4, 4], torch.cat([values[:, 8:], values[:, :8]], 1))
    assert torch.equal(Pooled.of(shuffled, ["a", "b", "c"], [4, 4, 4]).stack(), ordered.stack())
    assert torch.equal(ordered.stack()[1], values[:, 4:8])


def test_a_stack_is_a_view_where_it_can_be_one() -> None:
    values = torch.randn(5, 12)
    inside = Pooled(values, (4, 8), (4, 4)).stack()
    assert inside.data_ptr() == values[:, 4:].data_ptr() and inside.shape == (2, 5, 4)
    padded = Pooled(values, (0, 4, 8), (3, 3, 3))
    assert torch.equal(padded.stack()[2], values[:, 8:11])
    mixed = Pooled(values, (0, 2, 6), (2, 4, 2))
    assert torch.equal(mixed.stack([0, 2]), torch.stack([values[:, :2], values[:, 6:8]]))


def test_gradients_of_a_stack_go_back_to_their_columns() -> None:
    for starts, width in (((8, 0, 4), 4), ((0, 4, 8), 3), ((4, 8), 4)):
        values = torch.randn(5, 12).requires_grad_()
        pooled = Pooled(values, starts, (width,) * len(starts))
        weight = torch.randn(len(starts), 5, width)
        (found,) = torch.autograd.grad((pooled.stack() * weight).sum(), values)
        parts = torch.stack([values[:, s : s + width] for s in starts])
        (expected,) = torch.autograd.grad((parts * weight).sum(), values)
        assert torch.equal(pooled.stack(), parts) and torch.equal(found, expected)


def test_used_columns_leave_padding_out() -> None:
    values = torch.arange(12.0).repeat(2, 1)
    whole = Pooled(values, (8, 0, 4), (4, 4, 4)).used()
    assert len(whole) == 1 and torch.equal(whole[0], values)
    parts = Pooled(values, (8, 0, 4), (4, 2, 4)).used()
    assert [p[0].tolist() for p in parts] == [[0.0, 1.0], list(map(float, range(4, 12)))]


def test_the_maps_equal_slices_under_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    spans = [Span(6, 0, 0, 2), None, Span(0, 1, 1, 3), Span(3, 1, 0, 3)]

    def leaves() -> list[torch.Tensor]:
        generator.manual_seed(1)
        shapes = [(7, 9), (2, 5), (2, 4), (4, 4)]
        shapes[1] = (2, 4)
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    values, bias, *weights = leaves()
    out = field_linear(values, spans, weights, bias)
    plain_values, plain_bias, *plain = leaves()
    parts = []
    for s in spans:
        if s is None:
            parts.append(torch.zeros(7, 4))
        else:
            x = plain_values[:, s.column : s.column + s.width]
            parts.append(x @ plain[s.map][s.row : s.row + s.width] + plain_bias[s.map])
    expected = torch.stack(parts, 1)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    weight = torch.randn(expected.shape, generator=generator)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip([values, bias, *weights], [plain_values, plain_bias, *plain], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert values.grad is not None and not values.grad[:, 8].any()  # no map reads it


def test_moved_columns_are_slices_with_zeros_between_forward_and_backward() -> None:
    values = torch.randn(3, 9, requires_grad=True)
    moves = [Move(6, 1, 2), Move(0, 5, 3)]  # columns 3 to 5 and 8 go nowhere
    out = moved(values, moves, 10)
    expected = torch.zeros(3, 10)
    expected[:, 1:3], expected[:, 5:8] = values[:, 6:8].detach(), values[:, :3].detach()
    assert torch.equal(out, expected)
    weight = torch.randn(3, 10)
    (out * weight).sum().backward()
    gradient = torch.zeros(3, 9)
    gradient[:, 6:8], gradient[:, :3] = weight[:, 1:3], weight[:, 5:8]
    assert torch.equal(values.grad, gradient)


def test_first_order_weights_are_read_where_they_lie_and_count_as_used() -> None:
    values = torch.arange(20.0).view(2, 10)
    pooled = Pooled(values, (6, 0), (2, 3), (8, 3))  # fields of width 2 and 3, a weight behind each, padding
    assert pooled.first_order().tolist() == [[8, 3], [18, 13]]
    assert [u[0].tolist() for u in pooled.used()] == [[0, 1, 2, 3], [6, 7, 8]]
