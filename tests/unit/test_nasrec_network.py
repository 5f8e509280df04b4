"""Slices of a NASRec supernet: equal to the masked supernet and to networks of their own, and trained alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from embsearch_dist.methods.nasrec.model import Blocks, SliceAdagrad, SliceAdam, SlicedNetwork
from embsearch_dist.networks.canonical import canonical, prune
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.networks.pieces import LINE
from embsearch_dist.networks.sampling import SCHEMES, draw, training_architecture
from embsearch_dist.networks.slices import Layout, Slice, merged, slices_of
from embsearch_dist.networks.space import Space, full
from tools.bench.masked import MaskedNetwork

SPACE = Space(blocks=4, dense_widths=(8, 16, 24), sparse_widths=(4, 6, 8), tokens=3)
ROWS, COLUMNS, FIELDS = 32, 5, 7


def network(columns: int = COLUMNS, seed: int = 0) -> SlicedNetwork:
    """With biases and LayerNorms that are not all alike, so that a wrong slice of them shows."""
    torch.manual_seed(seed)
    found = SlicedNetwork(Layout(SPACE, max(1, columns), FIELDS))
    for p in found.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.3, 0.5)
    return found


def inputs(columns: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(ROWS, columns, generator=generator), torch.randn(ROWS, FIELDS, SPACE.width, generator=generator)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_slices_are_the_masked_supernet(scheme: str) -> None:
    """Values and gradients, from the whole supernet through mixed states to single architectures."""
    sliced = network()
    masked, (dense, u) = MaskedNetwork(sliced), inputs()
    for step in range(20):
        blocks = prune(training_architecture(SPACE, scheme, 3, step, warmup_steps=15))
        logits, expected = sliced(blocks, dense, u), masked(blocks, dense, u)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        logits.square().sum().backward()
        sliced.zero_grad(set_to_none=True)
        expected.square().sum().backward()
        assert sliced.live is not None
        used, gradients = sliced.live.pieces.slices, sliced.live.pieces.named(sliced.live.gradient())
        for name, part in used.items():
            whole = sliced.weights[name].grad
            assert whole is not None, name
            torch.testing.assert_close(gradients[name], part.take(whole), rtol=1e-3, atol=1e-3)
            part.put(whole, torch.zeros(part.shape))
            # What is not in the slice has no influence on the loss.
            assert not whole.any(), name
        left = [n for n, w in sliced.weights.items() if n not in used and w.grad is not None and w.grad.any()]
        assert not left


@pytest.mark.parametrize("columns", [COLUMNS, 0])
def test_a_network_of_its_own_computes_what_its_slices_do(columns: int) -> None:
    sliced, (dense, u) = network(columns), inputs(columns)
    for seed in range(20):
        architecture = draw(SPACE, SCHEMES[0], np.random.default_rng(seed))
        blocks = canonical(architecture).blocks
        alone = ArchitectureNetwork(architecture, SPACE, FIELDS, columns)
        taken = sliced.copies(blocks)
        assert {n: w.shape for n, w in alone.weights.items()} == {n: w.shape for n, w in taken.items()}
        for name, w in alone.weights.items():
            w.data.copy_(taken[name])
        torch.testing.assert_close(alone(u, dense), sliced(blocks, dense, u))


def test_every_weight_of_a_network_is_trained() -> None:
    dense, u = inputs()
    for seed in range(20):
        architecture = draw(SPACE, SCHEMES[2], np.random.default_rng(seed))
        alone = ArchitectureNetwork(architecture, SPACE, FIELDS, COLUMNS)
        alone(u, dense).sum().backward()
        assert all(p.grad is not None for p in alone.parameters())


def test_costs_are_those_of_the_network() -> None:
    """Parameters to the last one; FLOPs against torch's own counter of matrix products."""
    dense, u = inputs()
    for seed in range(30):
        architecture = draw(SPACE, SCHEMES[seed % 3], np.random.default_rng(seed))
        alone = ArchitectureNetwork(architecture, SPACE, FIELDS, COLUMNS)
        parts = network_cost(architecture, SPACE, COLUMNS, FIELDS)
        cost = parts.total
        assert cost.parameters == sum(p.numel() for p in alone.parameters())
        without = ArchitectureNetwork(architecture, SPACE, FIELDS, COLUMNS, "attention")
        left = network_cost(architecture, SPACE, COLUMNS, FIELDS, "attention").total
        assert left.parameters == sum(p.numel() for p in without.parameters()) < cost.parameters
        assert left.flops == cost.flops == without.flops
        plain = sdpa_kernel(SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain, pytest.MonkeyPatch.context() as patch:
            # The counter knows torch's products of matrices, so neither oneDNN's, nor a fused or our own attention, nor
            # the head's, which is one of a matrix and a vector.
            patch.setattr("embsearch_dist.kernels.linear.ONEDNN", False)
            patch.setattr("embsearch_dist.kernels.attention.kernel", lambda: None)
            alone(u, dense)
        assert counter.get_total_flops() == ROWS * (cost.flops - parts.head.flops)
        assert alone.flops == cost.flops


def step_both(
    ours: SliceAdagrad | SliceAdam, reference: torch.optim.Optimizer, masked: MaskedNetwork, blocks: Blocks
) -> None:
    """A step of the sliced supernet, and the same one of the masked one."""
    sliced, (dense, u) = ours.network, inputs()
    sliced(blocks, dense, u).square().mean().backward()
    ours.step()
    assert not sliced.live
    reference.zero_grad()
    masked(blocks, dense, u).square().mean().backward()
    reference.step()


def test_adagrad_on_slices_is_adagrad_on_the_whole() -> None:
    """Steps of different architectures, against torch's Adagrad on the masked supernet."""
    sliced, other = network(), network()
    masked = MaskedNetwork(other)
    ours = SliceAdagrad(sliced, 0.05, 1e-2)
    reference = torch.optim.Adagrad(other.parameters(), lr=0.05, eps=1e-2)
    for step in range(15):
        blocks = prune(training_architecture(SPACE, SCHEMES[0], 5, step, warmup_steps=5))
        step_both(ours, reference, masked, blocks)
    for name, w in sliced.weights.items():
        torch.testing.assert_close(w, other.weights[name], rtol=1e-3, atol=2e-4, msg=name)
        sums = [o.state[n.weights[name]]["sum"] for o, n in ((ours, sliced), (reference, other))]
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-2, atol=1e-3, msg=name)


def test_adam_on_slices_is_adam_of_one_architecture() -> None:
    """The same one in all steps, against torch's Adam on the masked supernet; a large eps, as the bias of attention's
    keys has gradients of rounding errors alone."""
    sliced, other = network(), network()
    masked = MaskedNetwork(other)
    blocks = prune(training_architecture(SPACE, SCHEMES[0], 5, 0))
    ours = SliceAdam(sliced, 0.01)
    reference = torch.optim.Adam(other.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-3)
    ours.param_groups[0]["eps"] = 1e-3
    for _ in range(10):
        step_both(ours, reference, masked, blocks)
    for name, part in slices_of(blocks, sliced.layout).items():
        used = part.take(sliced.weights[name])
        torch.testing.assert_close(used, part.take(other.weights[name]), rtol=1e-3, atol=1e-4, msg=name)
        assert not torch.equal(used, part.take(network().weights[name])), name


def test_adam_leaves_what_a_step_does_not_use() -> None:
    """Weights and moments, those that earlier steps have filled included."""
    sliced, (dense, u) = network(), inputs()
    ours = SliceAdam(sliced, 0.01)
    for step in range(12):
        blocks = prune(training_architecture(SPACE, SCHEMES[0], 5, step, warmup_steps=4))
        before = {n: [x.clone() for x in (w, *ours.state[w].values())] for n, w in sliced.weights.items()}
        sliced(blocks, dense, u).square().mean().backward()
        assert sliced.live is not None
        used = sliced.live.pieces.slices
        ours.step()
        for name, w in sliced.weights.items():
            for old, new in zip(before[name], (w.detach(), *ours.state[w].values()), strict=True):
                if name in used and new.ndim:
                    used[name].put(old, used[name].take(new))
                assert torch.equal(old, new) != (name in used and not new.ndim), name


def test_merged_slices_hold_their_parts() -> None:
    whole = torch.arange(200.0).view(10, 20)
    parts = [Slice((0, 4), ((0, 3), (10, 12))), Slice((0, 6), ((2, 5), (15, 20)))]
    union = merged(parts)
    assert union == Slice((0, 6), ((0, 5), (10, 12), (15, 20)))
    for part in parts:
        target = torch.zeros(union.shape)
        inner = part.within(union)
        inner.put(target, part.take(whole))
        back = torch.zeros_like(whole)
        union.put(back, target)
        assert torch.equal(part.take(back), part.take(whole))
        assert back.count_nonzero() == part.take(whole).count_nonzero()
    assert merged([Slice((0, 3)), Slice((0, 5))]) == Slice((0, 5))


def test_a_network_is_cut_out_of_the_vector_of_all_weights_and_put_back() -> None:
    """Slice by slice, and number by number, as a GPU does it."""
    sliced = network()
    for seed in range(10):
        blocks = prune(draw(SPACE, SCHEMES[seed % 3], np.random.default_rng(seed)))
        pieces = sliced.pieces(blocks)
        taken = pieces.take(sliced.vector)
        for name, w in pieces.named(taken).items():
            assert torch.equal(w, pieces.slices[name].take(sliced.weights[name])), name
        assert torch.equal(taken, sliced.vector[pieces.numbers(taken.device)])
        before, values = sliced.vector.clone(), torch.randn(pieces.size)
        pieces.put(before, values)
        expected = sliced.vector.detach().clone()
        expected[pieces.numbers(taken.device)] = values
        assert torch.equal(before, expected)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda n: n.to(torch.float64).to(torch.float32)])
def test_weights_stay_one_vector(change: Callable[[SlicedNetwork], SlicedNetwork]) -> None:
    """After a copy and a move: what is written into a weight is what a network reads."""
    found, blocks = change(network()), full(SPACE).blocks
    with torch.no_grad():
        for k, w in enumerate(found.weights.values()):
            w.fill_(k)
    copied = found.copies(blocks)
    assert all(torch.equal(copied[n], w) for n, w in found.weights.items())
    assert not torch.equal(found.vector, network().vector)


def test_a_networks_weights_begin_where_products_read_them_fast() -> None:
    """All whose size allows it, in a space of the published widths."""
    layout = Layout(Space(blocks=3), 13, 26)
    sliced = SlicedNetwork(layout)
    for seed in range(5):
        pieces = sliced.pieces(prune(draw(layout.space, SCHEMES[0], np.random.default_rng(seed))))
        even = [n for n, s in pieces.slices.items() if s.size % LINE == 0]
        assert len(even) > 0.7 * len(pieces.slices)
        assert all(pieces.places[n].start % LINE == 0 for n in even)


def test_the_whole_supernet_is_all_of_its_weights() -> None:
    sliced = network()
    parts = slices_of(full(SPACE).blocks, sliced.layout)
    assert {n: p.shape for n, p in parts.items()} == {n: tuple(w.shape) for n, w in sliced.weights.items()}
