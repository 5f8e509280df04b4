"""MDE: the power rule by hand, and the largest base under a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods.columns import cost_of
from embsearch_dist.methods.mde.config import MDEConfig
from embsearch_dist.methods.mde.method import MDE, largest_base, popularities, thresholds, widths_of
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.schema import Field, Schema
from tests.factories import one_rank, open_run, prepared, small_config, small_schema

SCHEMA = small_schema(4, 16, 64)


def rule(schema: Schema, base: float, alpha: float, width: int = 16, rounding: str = "integer") -> list[int]:
    candidates = MDEConfig(width=width, rounding=rounding).candidates
    steps = [thresholds(p, alpha, candidates, rounding) for p in popularities(schema)]
    return widths_of(base, steps, candidates)


def test_the_power_rule_by_hand() -> None:
    """Popularities 1/4, 1/16 and 1/64: at alpha 1/2 widths of base 16 are 8, 4 and 2, at alpha 1 4, 1 and 1/4."""
    assert rule(SCHEMA, 16, 0.5) == [8, 4, 2]
    assert rule(SCHEMA, 16, 1.0) == [4, 1, 1]  # at least 1
    assert rule(SCHEMA, 16, 0.0) == [16, 16, 16]
    assert rule(SCHEMA, 40, 0.5) == [16, 10, 5]  # 20 is cut
    assert rule(SCHEMA, 22, 0.5) == [11, 6, 3]  # 5.5 and 2.75 round up
    assert rule(SCHEMA, 22, 0.5, rounding="power2") == [8, 4, 2]  # 11, 5.5 and 2.75 = 2^3.46, 2^2.46 and 2^1.46
    assert rule(SCHEMA, 24, 0.5, rounding="power2") == [16, 8, 4]  # 2^3.58, 2^2.58, 2^1.58


def test_ids_of_a_list_make_its_values_more_popular() -> None:
    """As often as the field of a quarter of its values, which has one id a row."""
    schema = Schema("lists", (Field("one", 16), Field("list", 64, "sum", mean_length=4.0)))
    assert popularities(schema) == [1 / 16, 1 / 16]


@pytest.mark.parametrize("resource", ["parameters", "bytes", "served_int8"])
@pytest.mark.parametrize("rounding", ["integer", "power2"])
def test_no_larger_base_holds_the_budget(resource: str, rounding: str) -> None:
    candidates, cost = MDEConfig(width=16, rounding=rounding).candidates, cost_of(SCHEMA, resource, 0)
    steps = [thresholds(p, 0.5, candidates, rounding) for p in popularities(SCHEMA)]
    least, most = cost([1, 1, 1]), cost([16, 16, 16])
    for share in (0.0, 0.1, 0.37, 0.8, 1.0):
        limit = least + share * (most - least)
        base = largest_base(steps, candidates, cost, limit)
        assert cost(widths_of(base, steps, candidates)) <= limit
        tried = [widths_of(k / 100, steps, candidates) for k in range(20_000)]
        assert widths_of(base, steps, candidates) == [w for w in tried if cost(w) <= limit][-1]
    with pytest.raises(ValueError, match="not even the least"):
        largest_base(steps, candidates, cost, least - 1)


def test_a_search_writes_the_rule_for_each_budget(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    words = ["search.budget=30%", "search.pareto=[10%, 6MB]"]
    run = open_run(small_config(prepared(tmp_path_factory), tmp_path, *words, method="mde"), one_rank())
    check_stages(MDE(), run)
    run_stages(MDE(), run)
    found = {p.stem: Allocation.load(p, run.schema) for p in (tmp_path / "allocations").glob("*.json")}
    assert found.keys() == {"mde", "mde-10pct", "mde-6MB"}
    assert list(found["mde-6MB"].widths.values()) == [32] * 4  # the budget holds them all
    most = Allocation.uniform(run.schema, 32).total("parameters")
    widths = found["mde-10pct"].widths
    assert 0.25 < found["mde"].total("parameters") / most <= 0.3
    assert widths["right"] > widths["idle"] > widths["big"]  # 8, 41 and some thousand values
    other = open_run(small_config(prepared(tmp_path_factory), tmp_path, "search.budget=1%", method="mde"), one_rank())
    with pytest.raises(UserError, match="narrowest allocation"):
        check_stages(MDE(), other)
