"""Uniform widths beside found ones, and the choice between two trained models."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.metrics import log_loss, roc_auc_score

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods.fallback import (
    Trained,
    bracket,
    choose,
    choose_of,
    compare,
    paired_auc,
    paired_logloss,
    widest_within,
)
from tests.factories import small_schema

SCHEMA = small_schema(60, 30, 10)


def test_the_bracket_is_the_two_uniform_widths_around_a_size() -> None:
    def around(*widths: int, extra: int = 0) -> list[int]:
        return bracket(Allocation(SCHEMA, dict(zip(SCHEMA.names, widths, strict=True)), extra=extra))

    assert around(8, 8, 2) == [7, 8]
    assert around(8, 8, 8) == around(8, 8, 8, extra=1) == [8]
    assert around(8, 8, 2, extra=1) == [7, 8]
    assert around(1, 0, 0) == [1]


def test_the_uniform_width_of_a_budget_is_the_widest_that_it_holds() -> None:
    def within(**provenance: str) -> int:
        return widest_within(Allocation(SCHEMA, {"f0": 8, "f1": 2, "f2": 0}, dict(provenance)))

    assert within() == 5  # 540 parameters
    assert within(budget="25%") == 8
    assert within(budget="799") == 7
    assert within(budget="99") == 0
    assert within(budget="3KB") == 4  # 5 would be stored as 8: 3,200 bytes
    assert within(budget="3200B") == 8
    assert within(budget="1600B", precision="int8") == 12  # 100 rows of 16 bytes
    assert within(budget="1599B", precision="int8") == 0
    assert within(budget="ues-13", precision="int8") == 28


def test_a_bracket_in_served_bytes_is_of_the_widest_widths_of_a_cost() -> None:
    told = {"budget": "ues-28", "precision": "int8"}
    mixed = Allocation(SCHEMA, {"f0": 28, "f1": 2, "f2": 0}, dict(told))  # 60 rows of 32 bytes, 30 of 16
    assert bracket(mixed) == [12, 28]
    assert bracket(Allocation(SCHEMA, {"f0": 8, "f1": 2, "f2": 12}, dict(told))) == [12]


def drawn(rows: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits that made them, and the same with noise added."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return labels, logits.astype(np.float32), (logits + noise * rng.standard_normal(rows)).astype(np.float32)


@pytest.mark.parametrize("paired", [paired_auc, paired_logloss])
def test_differences_and_their_errors_are_those_of_repeated_samples(paired: object) -> None:
    found = [paired(a, b, y) for y, a, b in (drawn(500, 0.5, seed) for seed in range(300))]  # type: ignore[operator]
    gains, errors = np.array(found).T
    assert errors.mean() == pytest.approx(gains.std(), rel=0.15)
    labels, a, b = drawn(500, 0.5, 0)
    if paired is paired_auc:
        expected = roc_auc_score(labels, a) - roc_auc_score(labels, b)
    else:
        expected = log_loss(labels, 1 / (1 + np.exp(-b))) - log_loss(labels, 1 / (1 + np.exp(-a)))
    assert gains[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", ["auc", "logloss"])
def test_the_better_model_is_kept_and_of_level_ones_the_smaller(metric: str) -> None:
    labels, good, poor = drawn(4000, 1.0, 1)
    found, uniform = Trained("adass", 700, good), Trained("ues-8", 800, poor)
    kept = choose(found, uniform, labels, metric)
    assert (kept["name"], kept["fallback"]) == ("adass", False)
    assert "the found widths are better" in kept["reason"]
    worse = choose(Trained("adass", 700, poor), Trained("ues-8", 800, good), labels, metric)
    assert (worse["name"], worse["fallback"]) == ("ues-8", True)
    assert "the uniform width takes their place" in worse["reason"]
    assert worse["difference"] == pytest.approx(-kept["difference"])
    assert abs(worse["difference"]) > 2 * worse["standard_error"] > 0
    level = choose(found, Trained("ues-6", 600, good), labels, metric)
    assert (level["name"], level["fallback"]) == ("ues-6", True)
    assert "level, so the smaller one" in level["reason"]


def test_of_one_width_begun_in_two_ways_the_reason_is_the_beginning() -> None:
    labels, good, poor = drawn(4000, 1.0, 1)
    for found, uniform, began in ((good, poor, "the widest model"), (poor, good, "fresh weights")):
        final = choose(Trained("auto", 700, found), Trained("ues-8", 700, uniform), labels, "auc", alike=True)
        assert f"both have the uniform width of the budget, which is better begun with {began}" in final["reason"]
        assert final["fallback"] == (final["name"] == "ues-8") == (began == "fresh weights")


def test_of_models_that_rank_alike_the_better_calibrated_one_is_kept_whatever_its_size() -> None:
    labels, good, _ = drawn(4000, 1.0, 1)
    sure = 3 * good  # the same order, so the same AUC
    for found, uniform, fallback in ((sure, good, True), (good, sure, False)):
        final = choose(Trained("auto", 700, found), Trained("ues-8", 600 + 200 * fallback, uniform), labels, "auc")
        assert final["fallback"] == fallback and final["metric"] == "logloss"
        assert abs(final["difference"]) > final["standard_error"]
        assert "+0.00000 validation AUC, standard error 0.00000; level, " in final["reason"]


def test_of_models_of_one_logloss_the_one_that_ranks_better_is_kept() -> None:
    labels, good, _ = drawn(4000, 1.0, 1)
    flat = np.zeros_like(good)
    # So much too sure of itself that it has the logloss of a model that knows nothing.
    factor = brentq(lambda k: paired_logloss((k * good).astype(np.float32), flat, labels)[0], 1.5, 50)
    result = compare(Trained("a", 700, flat), Trained("b", 800, (factor * good).astype(np.float32)), labels, "logloss")
    assert result.metrics == ("logloss", "auc") and not result.first
    assert abs(result.gains[0]) < result.errors[0] and result.gains[1] < -0.1


def test_models_that_are_the_same_are_level_and_the_first_is_kept() -> None:
    labels, good, _ = drawn(400, 1.0, 1)
    result = compare(Trained("a", 700, good), Trained("b", 700, good), labels, "auc")
    assert result.size and result.first and result.gains == (0.0, 0.0)
    one_class = compare(Trained("a", 700, good), Trained("b", 600, good), np.ones(400, np.float32), "auc")
    assert one_class.metrics == ("logloss",) and not one_class.first


@pytest.mark.parametrize("of_clicks", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_few_rows_of_a_class_do_not_tell_which_model_ranks_better(rows: int, of_clicks: bool) -> None:
    """With one click the variance over clicks is unknown, not 0; of two models that know nothing one would win by AUC
    nearly always."""
    rng = np.random.default_rng(rows)
    labels = np.full(2000, not of_clicks, np.float32)
    labels[:rows] = of_clicks
    for _ in range(20):
        a, b = rng.normal(size=(2, 2000)).astype(np.float32)
        if rows:
            gain, error = paired_auc(a, b, labels)
            assert abs(gain) < 1 and error == float("inf")
        for margin in (1.0, 2.0):
            found = compare(Trained("a", 700, a), Trained("b", 600, b), labels, "auc", margin)
            assert found.metrics == ("logloss",) and found.few == rows and np.isfinite(found.errors).all()
    final = choose(Trained("a", 700, a), Trained("b", 600, b), labels, "auc")
    assert final["metric"] == "logloss"
    assert f"(AUC needs 10 rows of each class, the rarer one has {rows})" in final["reason"]


def test_models_that_know_nothing_are_told_apart_by_auc_about_as_often_as_chance_has_it() -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros(600, np.float32)
    labels[:10] = 1
    found = [paired_auc(*rng.normal(size=(2, 600)).astype(np.float32), labels) for _ in range(400)]
    share = np.mean([abs(gain) > error for gain, error in found])
    assert 0.27 < share < 0.42  # 0.32 of a normal distribution, 0.34 of Student's with 9 degrees of freedom
    assert compare(Trained("a", 7, labels), Trained("b", 6, -labels), labels, "auc").metrics == ("auc",)


def test_of_several_uniform_models_the_best_stands_against_what_was_found() -> None:
    labels, good, poor = drawn(4000, 1.0, 1)
    found, uniform = Trained("auto", 700, poor), [Trained("ues-8", 800, poor), Trained("ues-8-finetuned", 800, good)]
    for metric in ("auc", "logloss"):
        final = choose_of(found, uniform, labels, metric)
        assert final["name"] == "ues-8-finetuned" and final["fallback"]
        assert final["size"] == {"auto": 700, "ues-8-finetuned": 800}


@pytest.mark.parametrize("metric", ["auc", "logloss"])
def test_a_model_that_has_diverged_is_never_kept(metric: str) -> None:
    labels, good, poor = drawn(4000, 1.0, 1)
    broken = good.copy()
    broken[17] = np.nan
    lost = [Trained("ues-8", 600, broken), Trained("ues-8-finetuned", 600, np.array([np.nan]))]
    final = choose_of(Trained("auto", 700, poor), lost, labels, metric)
    assert (final["name"], final["fallback"]) == ("auto", False) and "ues-8" in final["reason"]
    assert "difference" not in final and "diverged. auto is the final model" in final["reason"]
    final = choose_of(Trained("auto", 700, broken), [lost[0], Trained("ues-8-finetuned", 800, poor)], labels, metric)
    assert (final["name"], final["fallback"]) == ("ues-8-finetuned", True)
    with pytest.raises(UserError, match="auto and ues-8-finetuned have both diverged"):
        choose_of(Trained("auto", 700, broken), lost, labels, metric)


def test_models_are_level_within_the_margin() -> None:
    labels, good, poor = drawn(4000, 1.0, 1)
    clear = compare(Trained("a", 800, good), Trained("b", 700, poor), labels, "auc")
    assert clear.first and not clear.size
    wide = compare(Trained("a", 800, good), Trained("b", 700, poor), labels, "auc", 1000.0)
    assert wide.size and not wide.first and wide.metrics == ("auc", "logloss")
