"""Bernoulli gates: sampling, the straight-through gradient, Eq. 5 and the threshold of a row's histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embsearch_dist.config.sections import LARGEST_SEED
from embsearch_dist.methods.ihas.gates import (
    BernoulliGates,
    deterministic,
    regulariser,
    sampled,
    straight_through,
    thresholds,
)
from embsearch_dist.methods.noise import stream_seed, uniform_noise

CPU = torch.device("cpu")


def slow_threshold(p: np.ndarray, bins: int, fallback: float) -> float:
    """The first local minimum of one row's histogram, spelled out."""
    counts = [0] * bins
    for value in p:
        counts[min(int(np.float32(value) * np.float32(bins)), bins - 1)] += 1
    for k in range(1, bins - 1):
        if counts[k] >= counts[k - 1]:
            continue
        after = next((c for c in counts[k + 1 :] if c != counts[k]), None)
        if after is not None and after > counts[k]:
            return k / bins
    return fallback


@pytest.mark.parametrize("bins", [3, 10, 20])
def test_thresholds_are_those_of_a_slow_scan(bins: int) -> None:
    rng = np.random.default_rng(bins)
    low, high = rng.beta(1, 8, (40, 60)), rng.beta(8, 2, (40, 30))
    two_peaks = np.concatenate([low, high], 1).astype(np.float32)
    others = rng.random((40, 90), dtype=np.float32)
    for p in (two_peaks, others, np.sort(others, 1) ** 3):
        found = thresholds(torch.from_numpy(p), bins, 0.5)
        np.testing.assert_allclose(found, [slow_threshold(row, bins, 0.5) for row in p], rtol=1e-6)
    assert len(set(found.tolist())) > 1


def test_the_threshold_lies_at_the_lower_edge_of_the_valley() -> None:
    #            bins of 0.1:  0 0 0   1 1  (2..7 empty)  8    9 9
    p = torch.tensor([[0.01, 0.02, 0.03, 0.11, 0.12, 0.85, 0.95, 0.96]])
    assert thresholds(p, 10, 0.5).item() == pytest.approx(0.2)
    logits = torch.logit(p)
    assert deterministic(logits, 10, 0.5).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(("value", "open_"), [(0.3, 0.0), (0.7, 1.0), (1.0, 1.0), (0.0, 0.0)])
def test_equal_probabilities_have_no_minimum(value: float, open_: float) -> None:
    p = torch.full((3, 12), value)
    assert thresholds(p, 20, 0.5).tolist() == [0.5] * 3
    assert deterministic(torch.logit(p), 20, 0.5).unique().tolist() == [open_]


def test_a_histogram_that_only_falls_or_only_rises_has_no_minimum() -> None:
    falling = torch.tensor([[0.05] * 4 + [0.45] * 2 + [0.95]])
    assert thresholds(falling, 2, 0.25).item() == 0.25
    rising = torch.tensor([[0.1, 0.4, 0.45, 0.7, 0.8, 0.9]])
    assert thresholds(rising, 3, 0.25).item() == 0.25


def test_smoothing_passes_over_a_dent() -> None:
    # A dent in the left peak, then the real valley.
    counts = [9, 8, 7, 8, 7, 4, 1, 0, 1, 5, 9, 9]
    p = torch.tensor([[(k + 0.5) / 12 for k, n in enumerate(counts) for _ in range(n)]])
    assert thresholds(p, 12, 0.5).item() == pytest.approx(2 / 12)
    assert thresholds(p, 12, 0.5, smooth=1).item() == pytest.approx(7 / 12)


def test_sampling_opens_gates_with_their_probability() -> None:
    logits = torch.logit(torch.tensor([0.02, 0.3, 0.9])).expand(40_000, 3)
    noise = uniform_noise(1, 2, 0, (40_000, 4), CPU)[:, :3]
    mask = sampled(logits, noise)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mask.mean(0), torch.tensor([0.02, 0.3, 0.9]), atol=0.01, rtol=0)
    torch.testing.assert_close(straight_through(logits, noise, 0.1), mask)


def test_the_gradient_is_that_of_the_relaxed_mask() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    uniform, weight, tau = torch.rand(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64), 0.1
    (straight_through(logits, uniform, tau) * weight).sum().backward()
    # Eq. 2 as printed: a softmax over two classes, each with a Gumbel variable of its own.
    other = logits.detach().clone().requires_grad_()
    p, logistic = torch.sigmoid(other), torch.logit(uniform)
    second = -torch.log(-torch.log(torch.rand(5, 6, dtype=torch.float64)))
    pair = torch.stack([p.log() + logistic + second, (1 - p).log() + second]) / tau
    (torch.softmax(pair, 0)[0] * weight).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad)
    assert logits.grad is not None and logits.grad.abs().max() > 0


def test_regulariser_is_equation_5_per_row_and_column() -> None:
    p = torch.rand(4, 7)
    expected = sum(0.3 * p[i, j] - 2 * abs(p[i, j] - p[i].mean()) for i in range(4) for j in range(7)) / 28
    torch.testing.assert_close(regulariser(p, 0.3, 2.0), expected)
    torch.testing.assert_close(regulariser(p, 0.3, 0.0), 0.3 * p.mean())


def test_generators_take_the_stream_of_any_seed_that_a_config_may_have() -> None:
    for seed in (0, 20261129, LARGEST_SEED):
        torch.Generator().manual_seed(stream_seed(seed, 10**7, 10**6))
    assert stream_seed(3, 2, 1) == 3_000_011 * 1_000_033 + 1  # as it always was


def test_noise_of_a_row_does_not_depend_on_who_draws_it() -> None:
    whole = uniform_noise(3, 11, 0, (101, 6), CPU)
    for first, rows in ((0, 50), (50, 51), (33, 7)):
        assert torch.equal(uniform_noise(3, 11, first, (rows, 6), CPU), whole[first : first + rows])
    assert whole.min() > 0 and whole.max() < 1
    assert not torch.equal(uniform_noise(3, 12, 0, (101, 6), CPU), whole)
    assert not torch.equal(uniform_noise(4, 11, 0, (101, 6), CPU), whole)
    big = uniform_noise(0, 0, 0, (4000, 50), CPU)
    assert abs(big.mean() - 0.5) < 0.005 and abs(big.var() - 1 / 12) < 0.002


def test_shared_gates_are_one_vector() -> None:
    gates = BernoulliGates(6, shared=True, bias=0.5)
    out = gates(torch.randn(3, 6))
    assert out.shape == (3, 6) and out.unique().tolist() == [0.5]
    assert [p.numel() for p in gates.parameters()] == [6]
    by_row = BernoulliGates(6, shared=False, bias=0.5)
    assert sum(p.numel() for p in by_row.parameters()) == 42
    torch.testing.assert_close(by_row(torch.zeros(1, 6)), torch.full((1, 6), 0.5))
