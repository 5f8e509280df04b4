"""The picture of found widths over planted ranks: dots that lie side by side have one label."""

from __future__ import annotations

from embsearch_dist.report.plots import planted
from embsearch_dist.report.style import LIGHT


def labels(ranks: dict[str, float], *widths: dict[str, int]) -> list[str]:
    return [t.get_text() for t in planted(LIGHT, widths, ranks, [0.5]).axes[0].texts if t.get_text()]


def test_dots_side_by_side_share_a_label_and_of_many_names_the_number_is_told() -> None:
    idle = {f"i{k}": 0 for k in range(6)}
    ranks = {**idle, "a": 4, "b": 4, "c": 4}
    assert labels(ranks, {**idle, "a": 8, "b": 8, "c": 2}) == ["i0, i1, i2, i3, +2", "a, b", "c"]


def test_means_of_several_runs_place_the_dots() -> None:
    ranks = {"a": 4, "b": 4}
    assert labels(ranks, {"a": 8, "b": 4}, {"a": 4, "b": 8}) == ["a, b"]
    assert labels(ranks, {"a": 8, "b": 4}, {"a": 8, "b": 8}) == ["a", "b"]
