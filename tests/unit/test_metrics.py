"""Exact AUC and logloss, against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from embsearch_dist.train import metrics
from embsearch_dist.train.metrics import (
    BINS,
    Predictions,
    area_of,
    auc,
    binned_auc,
    binned_counts,
    evaluate,
    figures,
    logloss,
    score,
    score_many,
)
from tests.factories import one_rank, random_batch, small_schema


@pytest.mark.parametrize("decimals", [0, 1, 3, 7])
@pytest.mark.parametrize("rows", [2, 17, 5000])
def test_auc_equals_scikit_learn_with_any_number_of_ties(decimals: int, rows: int) -> None:
    rng = np.random.default_rng(rows + decimals)
    for _ in range(10):
        scores = rng.normal(0, 2, rows).round(decimals).astype(np.float32)
        labels = rng.integers(0, 2, rows).astype(np.float32)
        labels[:2] = 0, 1
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_orders_negative_and_extreme_scores() -> None:
    scores = np.array([-1e38, -3.0, -1e-45, 0.0, 1e-45, 2.0, 1e38, np.inf, -np.inf], np.float32)
    labels = np.array([0, 1, 0, 1, 0, 1, 1, 1, 0], np.float32)
    finite = np.clip(scores.astype(np.float64), -1e300, 1e300)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, finite), abs=1e-12)


def test_auc_counts_negative_zero_as_zero() -> None:
    scores = np.array([-0.0, 0.0, -0.0, 0.0], np.float32)
    assert auc(scores, np.array([1, 0, 0, 1], np.float32)) == 0.5


def test_auc_of_constant_scores_is_one_half() -> None:
    assert auc(np.full(10, -1.5, np.float32), np.arange(10) % 2) == 0.5


def test_auc_of_perfect_and_reversed_order() -> None:
    labels = np.array([0, 0, 1, 1], np.float32)
    assert auc(np.array([-2, -1, 0, 1], np.float32), labels) == 1
    assert auc(np.array([1, 0, -1, -2], np.float32), labels) == 0


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_auc_of_one_class_is_nan(label: float) -> None:
    assert math.isnan(auc(np.arange(5, dtype=np.float32), np.full(5, label, np.float32)))


def test_a_score_that_is_no_number_has_no_order() -> None:
    """Behind infinity it would be the surest click."""
    logits, labels = torch.tensor([math.nan, math.nan, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert math.isnan(auc(logits.numpy(), labels.numpy())) and math.isnan(binned_auc(logits.numpy(), labels.numpy()))
    assert math.isnan(float(score_many(logits[None], labels)[0, 0]))
    found = figures(Predictions(logits, labels, torch.tensor([1, 2, 1, 2]), None))
    assert math.isnan(found["auc"]) and math.isnan(found["group_auc"]) and math.isnan(found["logloss"])
    told = area_of(found, "test")
    assert told == {"auc": None, "auc_undefined": "a prediction of the test split is not a finite number"}
    sane = figures(Predictions(logits.nan_to_num(1), labels, torch.tensor([1, 2, 1, 2]), None))
    assert (sane["auc"], sane["group_auc"]) == (1, 1)


def test_auc_does_not_change_its_input() -> None:
    scores = np.array([2.0, -0.0, 1.0], np.float32)
    auc(scores, np.array([1, 0, 0], np.float32))
    assert scores.tolist() == [2.0, 0.0, 1.0]
    assert np.signbit(scores[1])


@pytest.mark.parametrize("spread", [0.3, 2.0, 8.0])
def test_the_binned_auc_is_close_to_the_exact_one(spread: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, spread, 100_000).astype(np.float32)
    labels = (rng.random(100_000) < 1 / (1 + np.exp(-logits / spread))).astype(np.float32)
    assert binned_auc(logits, labels) == pytest.approx(auc(logits, labels), abs=1e-5)


def test_the_binned_auc_knows_ties_order_and_one_class() -> None:
    labels = np.array([0, 0, 1, 1], np.float32)
    assert binned_auc(np.array([-2, -1, 0, 1], np.float32), labels) == 1
    assert binned_auc(np.array([1e30, 1, -1, -1e30], np.float32), labels) == 0
    assert binned_auc(np.zeros(4, np.float32), labels) == 0.5
    assert math.isnan(binned_auc(np.zeros(4, np.float32), np.ones(4, np.float32)))


def test_logloss_and_accuracy_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, 500).astype(np.float32), rng.integers(0, 2, 500).astype(np.float32)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    found = score(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found["logloss"] == pytest.approx(log_loss(labels, p), rel=1e-6)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, p > 0.5))
    assert found["rows"] == 500


def test_logloss_of_a_confident_mistake_stays_finite() -> None:
    assert logloss(torch.tensor([-200.0]), torch.tensor([1.0])) == pytest.approx(200.0)


def models_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of five models on 3,001 rows, among them ties, values past the last bin and edges between two bins."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3001, generator=generator) * torch.tensor([0.01, 1.0, 4.0, 30.0, 1.0])[:, None]
    logits[4] = (logits[4] * 1024).round() / 1024
    logits[1, :5] = torch.tensor([-100.0, 100.0, -32.0, 32.0, -0.0])
    return logits, torch.randint(2, (3001,), generator=generator).float()


def test_counts_by_bin_are_those_of_numpy() -> None:
    logits, labels = models_and_labels()
    logits[1, 5:7] = torch.tensor([float("inf"), -1e30])
    for row, found in zip(logits.numpy(), binned_counts(logits, labels), strict=True):
        place = np.clip(row * np.float32(1024) + np.float32(BINS / 2), 0, BINS - 1).astype(np.int64)
        for side in (0, 1):
            assert np.array_equal(found[side].numpy(), np.bincount(place[labels.numpy() == side], minlength=BINS))


@pytest.mark.parametrize("at_a_time", [1, 2 * 3001, 1 << 24])
def test_many_models_score_together_as_each_does_alone(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(metrics, "SCORED_AT_A_TIME", at_a_time)
    logits, labels = models_and_labels()
    for row, (area, loss, accuracy) in zip(logits, score_many(logits, labels).tolist(), strict=True):
        alone = score(row, labels, binned_auc)
        assert (area, accuracy) == (alone["auc"], alone["accuracy"])
        assert loss == pytest.approx(alone["logloss"], rel=1e-12)


def test_many_models_on_one_class_have_no_auc() -> None:
    assert math.isnan(float(score_many(torch.zeros(1, 4), torch.ones(4))[0, 0]))


def test_no_model_scored_together_waits_for_the_device() -> None:
    """Tensors without values: whatever has to know one (a copy to the host, bincount) fails on them."""
    found = score_many(torch.empty(3, 100, device="meta"), torch.empty(100, device="meta"))
    assert found.shape == (3, 3) and found.dtype == torch.float64


def test_evaluation_joins_batches_of_different_sizes() -> None:
    schema = small_schema(5)
    batches = [random_batch(schema, rows, rows) for rows in (7, 20, 3)]
    found = evaluate(lambda b: b.dense[:, 0], iter(batches), one_rank())
    logits = torch.cat([b.dense[:, 0] for b in batches])
    assert score(logits, torch.cat([b.label for b in batches])).items() <= found.items()
    assert found["rows"] == 30


@pytest.mark.parametrize("piece", [1, 10, 1000])
def test_predictions_leave_the_device_in_pieces_of_many_batches(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schema, context = small_schema(5), one_rank()
    batches = [random_batch(schema, rows, rows) for rows in (7, 20, 3, 5)]
    expected = evaluate(lambda b: b.dense[:, 0], iter(batches), context)
    monkeypatch.setattr(metrics, "PIECE_ROWS", piece)
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copied.append(t) or t)
    assert evaluate(lambda b: b.dense[:, 0], iter(batches), context) == expected
    assert len(copied) == {1: 4, 10: 2, 1000: 1}[piece]
