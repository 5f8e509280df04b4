"""Ranks, Friedman, Nemenyi and stability against figures that are published or easy to count."""

from __future__ import annotations

import math

import pytest

from tools.league.ranks import Ranking, complete, critical_difference, iman_davenport, rank, stability

# Ranks of four classifiers on 14 data sets: Demšar (2006), Table 6. Its text has mean ranks 3.143, 2.000, 2.893 and
# 1.964, chi2 9.28 (without the correction for ties), F 3.69 and a critical difference of 1.25.
DEMSAR = """4 3 2 1|1 2 3 4|4 1 2 3|4 1 3 2|4 2 3 1|1 2.5 4 2.5|3 2 4 1|2.5 2.5 4 1|4 3 2 1|2.5 2.5 2.5 2.5
|4 2.5 1 2.5|3 2 4 1|4 1 2 3|3 1 4 2"""
CLASSIFIERS = ["plain", "m", "cf", "m+cf"]


def demsar() -> dict[str, dict[str, float]]:
    lines = DEMSAR.replace("\n", "").split("|")
    return {f"d{k}": dict(zip(CLASSIFIERS, map(float, x.split()), strict=True)) for k, x in enumerate(lines)}


def test_the_published_example_comes_out() -> None:
    found = rank(demsar(), CLASSIFIERS, higher=False)
    assert found.methods == ("m+cf", "m", "cf", "plain") and found.blocks == 14
    assert found.ranks == pytest.approx((1.964, 2.0, 2.893, 3.143), abs=5e-4)
    ties = 60 + 3 * 6  # one line of four that are equal, three of two
    plain = found.chi2 * (1 - ties / (14 * 4 * 15))
    assert plain == pytest.approx(9.28, abs=0.01)
    assert iman_davenport(plain, 14, 4)[0] == pytest.approx(3.69, abs=0.01)
    assert found.distance == pytest.approx(1.25, abs=0.01)
    assert found.p < 0.05 and found.p_f < 0.05


def test_higher_is_better_unless_told_and_ties_share_their_mean_rank() -> None:
    scores = {"x": {"a": 0.7, "b": 0.8, "c": 0.7}, "y": {"a": 0.1, "b": 0.2, "c": 0.3}}
    assert dict(zip(*named(rank(scores, ["a", "b", "c"])), strict=True)) == {"b": 1.5, "c": 1.75, "a": 2.75}
    assert dict(zip(*named(rank(scores, ["a", "b", "c"], higher=False)), strict=True)) == {
        "a": 1.25,
        "c": 2.25,
        "b": 2.5,
    }


def named(found: Ranking) -> tuple[tuple[str, ...], tuple[float, ...]]:
    return found.methods, found.ranks


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (8, 3.031), (10, 3.164)])
def test_critical_differences_follow_the_published_table(methods: int, q: float) -> None:
    """Demšar's Table 5 (a), for a level of 0.05."""
    assert critical_difference(methods, 10) == pytest.approx(q * math.sqrt(methods * (methods + 1) / 60), rel=5e-4)


def test_five_methods_in_ten_blocks() -> None:
    assert critical_difference(5, 10) == pytest.approx(1.929, abs=1e-3)
    assert critical_difference(5, 10, alpha=0.1) == pytest.approx(2.459 * math.sqrt(0.5), abs=1e-3)


def test_blocks_that_all_agree_make_f_infinite_and_equal_scores_make_no_statistic() -> None:
    order = {str(k): {"a": 3.0, "b": 2.0, "c": 1.0} for k in range(4)}
    found = rank(order, ["a", "b", "c"])
    assert (found.ranks, found.chi2, found.f, found.p_f) == ((1.0, 2.0, 3.0), 8.0, math.inf, 0.0)
    level = rank({str(k): dict.fromkeys("abc", 0.5) for k in range(4)}, ["a", "b", "c"])
    assert level.ranks == (2.0, 2.0, 2.0) and math.isnan(level.chi2)
    assert math.isnan(rank({"x": {"a": 1.0, "b": 0.0}}, ["a", "b"]).chi2)


def test_bars_join_what_is_not_told_apart_and_no_bar_lies_in_another() -> None:
    def bars(ranks: tuple[float, ...], distance: float, p: float = 0.01) -> list[tuple[int, int]]:
        return Ranking(tuple("abcde"[: len(ranks)]), ranks, 9, 9.0, p, 9.0, p, distance, 0.05).cliques()

    assert bars((1.0, 2.0, 3.0, 4.5), 1.0) == [(0, 1), (1, 2)]
    assert bars((1.0, 1.5, 2.0, 4.5), 1.0) == [(0, 2)]
    assert bars((1.0, 3.0, 5.0), 1.0) == []
    assert bars((1.0, 3.0, 5.0), 1.0, p=0.2) == [(0, 2)]  # Friedman's test comes first


def test_only_methods_of_every_block_are_ranked_and_the_others_are_named() -> None:
    scores = {"x": {"a": 1.0, "b": 2.0}, "y": {"b": 1.0, "c": 3.0}, "z": {"b": 1.0, "a": 1.0}}
    assert complete(scores) == (["b"], {"a": ["y"], "c": ["x", "z"]})


def test_stability_of_widths_over_seeds() -> None:
    one, same, other = {"u": 8, "v": 4, "w": 2}, {"w": 2, "v": 4, "u": 8}, {"u": 2, "v": 4, "w": 8}
    assert (stability([one, same]).agreement, stability([one, same]).correlation) == (1.0, 1.0)
    found = stability([one, other])  # v alone agrees, the order is turned round
    assert found.agreement == pytest.approx(1 / 3) and found.correlation == pytest.approx(-1.0)
    three = stability([one, same, other])  # pairs 1, 1/3 and 1/3
    assert three.seeds == 3 and three.agreement == pytest.approx(5 / 9)
    assert three.correlation == pytest.approx(-1 / 3)
    assert math.isnan(stability([one]).agreement)
    uniform = stability([one, dict.fromkeys(one, 4)])
    assert uniform.agreement == pytest.approx(1 / 3) and math.isnan(uniform.correlation)
    assert stability([dict.fromkeys(one, 4)] * 2).correlation == 1.0
