"""The table of allocations that were trained alone: what it answers, what it refuses, and searches in it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Field, Schema
from embsearch_dist.width_table import Space, WidthTable
from tests.factories import CONFIGS
from tools.studies.jobs import ROOT
from tools.studies.search_table import SEARCHES, Task, compare, markdown
from tools.studies.width_table import missing

SPACE = """
config: any.yaml
groups:
  a: {fields: [big], widths: [0, 2, 4]}
  b: {fields: [left, right], widths: [2, 4]}
"""
ROWS = {"big": 100, "left": 10, "right": 30}
GAIN = {"a": {0: 0.0, 2: 0.02, 4: 0.03}, "b": {2: 0.10, 4: 0.13}}


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "space.yaml").write_text(SPACE)
    return Space.load(tmp_path / "space.yaml")


def line(a: int, b: int, seed: int) -> dict[str, str]:
    """An additive truth; seed 1 has 0.002 more everywhere."""
    auc = 0.6 + GAIN["a"][a] + GAIN["b"][b] + 0.002 * seed
    size = ROWS["big"] * a + (ROWS["left"] + ROWS["right"]) * b
    figures = {"validation_auc": auc, "validation_logloss": 1 - auc, "test_auc": auc - 0.01, "test_logloss": 1.01 - auc}
    return {k: str(v) for k, v in ({"a": a, "b": b, "seed": seed, "parameters": size} | figures).items()}


@pytest.fixture
def table(space: Space) -> WidthTable:
    return WidthTable(space, [line(a, b, s) for a, b in space.every for s in (0, 1)])


def test_a_space_names_each_field_once(space: Space) -> None:
    assert len(space.every) == 6
    assert space.widths((4, 2)) == {"big": 4, "left": 2, "right": 2}
    space.check(Schema("any", tuple(Field(n, r) for n, r in ROWS.items())))
    with pytest.raises(UserError, match="'more'"):
        space.check(Schema("any", tuple(Field(n, 3) for n in (*ROWS, "more"))))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("config: x", "config and groups"),
        (SPACE.replace("widths: [2, 4]", "widths: [4, 2]"), "groups.b.widths"),
        (SPACE.replace("fields: [big], ", ""), "groups.a"),
    ],
)
def test_a_wrong_space_is_told_by_its_key(tmp_path: Path, wrong: str, says: str) -> None:
    (tmp_path / "space.yaml").write_text(wrong)
    with pytest.raises(UserError, match=says):
        Space.load(tmp_path / "space.yaml")


def test_sizes_scores_and_regret(table: WidthTable) -> None:
    assert table.candidates == [0, 2, 4] and table.seeds == [0, 1]
    assert table.costs.tolist() == [[0, 200, 400], [0, 80, 160]]
    assert table.allowed.tolist() == [[True, True, True], [False, True, True]]
    choice = table.choice((2, 4))
    assert table.size(choice) == 360
    scored = table.score(1)(torch.tensor([choice, table.choice((0, 2))]))
    assert [round(s["auc"], 6) for s in scored] == [0.752, 0.702]
    assert table.truth(choice) == pytest.approx(0.741)
    # Within 400 parameters, (0, 4), (2, 4) and so on: the best is (2, 4) itself.
    assert table.regret(choice, 400) == 0
    assert table.regret(table.choice((2, 2)), 400) == pytest.approx(0.03)
    assert table.noise() == pytest.approx(0.002 / 2**0.5)


def test_a_table_with_a_hole_is_refused(space: Space) -> None:
    lines = [line(a, b, 0) for a, b in space.every]
    with pytest.raises(UserError, match=r"1 of 6 allocations are missing, first \(2, 4\)"):
        WidthTable(space, [x for x in lines if (x["a"], x["b"]) != ("2", "4")])
    with pytest.raises(UserError, match="lacks or spoils"):
        WidthTable(space, [{**x, "seed": "none"} for x in lines])


def test_only_what_a_table_lacks_is_trained(space: Space, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    everything = missing(space, out, 2)
    assert {s for s, _ in everything[:6]} == {0} and len(everything) == 12
    out.write_text("a,b,seed\n" + "".join(f"{a},{b},{s}\n" for s, (a, b) in everything[:5]))
    assert missing(space, out, 2) == everything[5:]


def test_every_search_obeys_the_budget_and_the_thorough_ones_find_the_best(table: WidthTable) -> None:
    rows = compare(table, [60.0, 100.0], repeats=1)
    limits = {"60%": 0.6 * 560, "100%": 560}
    assert {r["search"] for r in rows} == set(SEARCHES)
    assert all(r["parameters"] <= limits[r["budget"]] for r in rows)
    quick = {"uniform", "policy"}
    assert {r["regret"] for r in rows if r["search"] not in quick} == {0}
    assert next(r["regret"] for r in rows if r["search"] == "uniform") == pytest.approx(0.01)
    same = {"allocations": 6, "table_seeds": 2, "noise": table.noise()}
    text = markdown([row | same for row in rows])
    assert text.count("\n| ") == len(SEARCHES) + 2 and "6 allocations, 2 seeds" in text


def test_uniform_is_clipped_to_what_a_group_may_have(table: WidthTable) -> None:
    found = [table.widths(SEARCHES["uniform"](Task(table, table.score(0), limit, 0))) for limit in (0.6 * 560, 560.0)]
    assert [tuple(widths) for widths in found] == [(2, 2), (4, 4)]


def test_costs_are_linear_in_width(table: WidthTable) -> None:
    for choice in itertools.product(range(3), range(3)):
        if all(bool(table.allowed[g, j]) for g, j in enumerate(choice)):
            a, b = table.widths(choice)
            assert table.size(choice) == int(line(a, b, 0)["parameters"])


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "tables").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_space_names_a_config_and_some_hundred_allocations(path: Path) -> None:
    space = Space.load(path)
    overrides = [f"{key}={value}" for key, value in space.overrides.items()]
    assert load_config(CONFIGS, ROOT / space.config, overrides).method == "adass"
    assert 300 <= len(space.every) <= 500


@pytest.mark.parametrize("percent", [10, 25, 50, 80])
@pytest.mark.parametrize("name", ["movielens_100k", "planted"])
def test_in_the_tables_of_this_repository_the_additive_knapsack_is_above_uniform_widths(
    name: str, percent: int
) -> None:
    tables = ROOT / "tools" / "tables"
    whole = WidthTable.load(tables / f"{name}.csv", Space.load(tables / f"{name}.yaml"))
    limit = percent / 100 * float(whole.costs.max(1).values.sum())
    for seed in whole.seeds:
        task = Task(whole, whole.score(seed), limit, 0)
        found, plain = SEARCHES["additive"](task), SEARCHES["uniform"](task)
        assert whole.size(found) <= limit and whole.regret(found, limit) < whole.regret(plain, limit)
        climbed, best = SEARCHES["additive + local"](task), SEARCHES["every allocation"](task)
        assert task.value(found) <= task.value(climbed) <= task.value(best)


def test_the_best_planted_allocation_is_the_planted_one_without_idle_fields() -> None:
    """Ranks 0 and 1, 2, and 4 to 16: the widths that hold them, or the next candidates."""
    tables = ROOT / "tools" / "tables"
    whole = WidthTable.load(tables / "planted.csv", Space.load(tables / "planted.yaml"))
    best = max(whole.within(math.inf), key=whole.truth)
    assert whole.widths(best)[0] == 0 and whole.widths(best)[-1] == 16
    wide = whole.choice((8, 16, 16, 16))
    assert whole.truth(best) > whole.truth(wide) + 0.05
