"""Bootstrap intervals: weights, weighted figures against scikit-learn, and how often a planted difference is inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from embsearch_dist.errors import UserError
from embsearch_dist.methods.fallback import paired_auc
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.bootstrap import FIGURES, Sample, as_told, resampled, row_weights
from embsearch_dist.train.figures import Wanted, _intervals, resamples_of
from embsearch_dist.train.measures import areas_by_group, normalised_entropy, probabilities
from embsearch_dist.train.metrics import Predictions
from tests.factories import one_rank


def clicks(seed: int, rows: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """True logits and the clicks drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.5, rows).astype(np.float32)
    return logits, (rng.random(rows) < probabilities(logits)).astype(np.float32)


def test_weights_are_poisson_numbers_of_mean_one_and_seeded() -> None:
    weights = row_weights(0, 1, 200_000)
    shares = np.bincount(weights, minlength=5)[:5] / len(weights)
    np.testing.assert_allclose(shares, np.exp(-1) / np.array([1, 1, 2, 6, 24]), atol=0.004)
    assert np.array_equal(weights, row_weights(0, 1, 200_000))
    assert not np.array_equal(weights, row_weights(0, 2, 200_000))
    assert not np.array_equal(weights, row_weights(1, 1, 200_000))


def test_rows_of_a_group_have_one_weight_but_for_those_without_an_id() -> None:
    groups = np.arange(3000) % 30
    weights = row_weights(0, 0, 3000, groups)
    assert all(len(np.unique(weights[groups == g])) == 1 for g in range(1, 30))
    assert len(np.unique(weights[groups == 0])) > 2
    assert len(np.unique(weights[groups > 0])) > 2


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_weighted_figures_equal_scikit_learn(decimals: int) -> None:
    logits, labels = clicks(decimals)
    logits, labels = logits.round(decimals), labels.astype(float)
    weights = row_weights(0, 5, len(logits))
    area, loss, entropy, calibration, by_group = Sample(logits, labels).figures(weights)
    p = probabilities(logits)
    assert area == pytest.approx(roc_auc_score(labels, logits, sample_weight=weights), abs=1e-12)
    assert loss == pytest.approx(log_loss(labels, p, sample_weight=weights), rel=1e-6)
    assert entropy == pytest.approx(normalised_entropy(loss, np.average(labels, weights=weights)), rel=1e-12)
    assert calibration == pytest.approx((weights @ p) / (weights @ labels), rel=1e-6)
    assert np.isnan(by_group)


def test_a_weighted_auc_by_group_is_that_of_the_groups_as_often_as_drawn() -> None:
    logits, labels = clicks(2)
    groups = np.random.default_rng(0).integers(0, 40, len(logits))
    weights = row_weights(3, 7, len(logits), groups)
    drawn = np.repeat(np.arange(len(logits)), weights)
    copies = np.concatenate([np.arange(w) for w in weights])
    again = areas_by_group(logits[drawn], labels[drawn], groups[drawn] * 10 + copies)  # ids 0 to 9 are of group 0
    inside = again.groups >= 10
    expected = np.average(again.areas[inside], weights=again.rows[inside])
    found = Sample(logits, labels, groups).figures(weights)[FIGURES.index("group_auc")]
    assert found == pytest.approx(expected, abs=1e-12)


def test_resamples_of_one_class_do_not_count() -> None:
    logits, labels = np.arange(4, dtype=np.float32), np.array([0, 0, 0, 1], np.float32)
    sample = Sample(logits, labels)
    spread = resampled([sample], 0, range(60))
    assert 0 < np.isnan(spread[:, 0]).sum() < 60
    told = as_told(sample.figures(np.ones(4, np.uint8)), spread)
    assert told["auc"]["value"] == told["auc"]["low"] == told["auc"]["high"] == 1
    assert "group_auc" not in told
    none = Sample(logits, np.zeros(4, np.float32))
    assert set(as_told(none.figures(np.ones(4, np.uint8)), resampled([none], 0, range(5)))) == {"logloss"}


def test_a_difference_is_surer_than_what_it_is_the_difference_of() -> None:
    logits, labels = clicks(0)
    worse = logits + np.random.default_rng(1).normal(0, 0.3, len(logits)).astype(np.float32)
    one, other = Sample(logits, labels), Sample(worse, labels)
    alone = resampled([one], 0, range(60)).std(0)
    both = resampled([one, other], 0, range(60)).std(0)
    assert (both[:2] < 0.5 * alone[:2]).all()
    assert not resampled([one, one], 0, range(3))[:, :4].any()


def test_the_standard_error_of_a_difference_is_that_of_delong() -> None:
    logits, labels = clicks(0)
    worse = logits + np.random.default_rng(1).normal(0, 0.5, len(logits)).astype(np.float32)
    gain, error = paired_auc(logits, worse, labels)
    one, other = Sample(logits, labels), Sample(worse, labels)
    ones = np.ones(len(labels), np.uint8)
    told = as_told(one.figures(ones) - other.figures(ones), resampled([one, other], 0, range(200)))["auc"]
    assert told["value"] == pytest.approx(gain, abs=1e-12)
    assert told["standard_error"] == pytest.approx(error, rel=0.2)
    assert told["low"] < gain - error < gain + error < told["high"]


def test_the_interval_of_a_planted_difference_covers_it_as_often_as_it_says() -> None:
    """The truth is the same difference on a million rows; of 60 intervals at 95% three should miss it."""
    rng = np.random.default_rng(9)

    def two(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits = rng.normal(-1, 1.5, rows).astype(np.float32)
        labels = (rng.random(rows) < probabilities(logits)).astype(np.float32)
        return logits, (logits + rng.normal(0, 0.8, rows)).astype(np.float32), labels

    good, bad, labels = two(1_000_000)
    ones = np.ones(len(labels), np.uint8)
    truth = (Sample(good, labels).figures(ones) - Sample(bad, labels).figures(ones))[:2]
    assert truth[0] > 0.02
    covered = np.zeros(2)
    for trial in range(60):
        good, bad, labels = two(1000)
        spread = resampled([Sample(good, labels), Sample(bad, labels)], trial, range(80))[:, :2]
        low, high = np.quantile(spread, [0.025, 0.975], axis=0)
        covered += (low <= truth) & (truth <= high)
    assert (covered >= 51).all()  # the chance of fewer is 1 in 1000
    assert (covered < 60).any()


def test_more_ranks_than_resamples_draw_the_same_ones() -> None:
    logits, labels = clicks(3)
    found = Predictions(torch.from_numpy(logits), torch.from_numpy(labels), None, None)

    class Many(Context):
        def every(self, own: list[list[float]]) -> list[list[list[float]]]:
            drawn = [resampled([Sample(logits, labels)], 0, range(r, 40, self.world_size)) for r in range(1, 64)]
            return [own, *(part.tolist() for part in drawn)]

    wanted = Wanted(resamples=40)
    assert _intervals(found, wanted, Many(0, 64, torch.device("cpu"))) == _intervals(found, wanted, one_rank())


def test_the_number_of_resamples() -> None:
    assert [resamples_of(x) for x in (None, "true", "400")] == [0, 200, 400]
    for text in ("10", "-50", "many", "²"):
        with pytest.raises(UserError, match="--intervals"):
            resamples_of(text)
