"""The tables of a league from made-up lines with known answers."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embsearch_dist.errors import UserError
from tools.league.choices import choices
from tools.league.pictures import Point, draw_all, draw_quality, looks, window
from tools.league.published import Order, pairs_of, read_orders
from tools.league.rows import Group, blocks_by_budget, blocks_by_data, groups_of, read_rows, widths_in, write_rows
from tools.league.tables import page, quality, ranks, winners

VALUES = 110  # of both fields: user 100, movie 10


@pytest.fixture
def tool() -> ModuleType:
    return importlib.import_module("tools.studies.league")


def line(method: str, budget: str, seed: int, widths: tuple[int, int], auc: float, **more: Any) -> dict[str, Any]:
    size = 100 * widths[0] + 10 * widths[1]
    row = {"data_set": "x", "backbone": "deepfm", "data": "x 0f 90 training rows", "seed": str(seed), "commit": "abc"}
    row |= {"method": method, "budget": budget, "widths": f"user={widths[0]} movie id={widths[1]}", "parameters": size}
    row |= {"share_of_ues32": size / (32 * VALUES), "test_auc": auc, "test_logloss": 1 - auc, "hardware": "CPU"}
    return row | {"served_int8_bytes": 2 * size} | more


def uniform(width: int, seed: int, auc: float, **more: Any) -> dict[str, Any]:
    return line("uniform", "", seed, (width, width), auc, **more)


def small(name: str = "x", better: str = "a") -> list[dict[str, Any]]:
    """Two seeds; methods a and b at two budgets, UES-3, 16 and 32."""
    rows = []
    for seed in (0, 1):
        rows += [uniform(3, seed, 0.70), uniform(16, seed, 0.74 + 0.002 * seed), uniform(32, seed, 0.73)]
        for method in ("a", "b"):
            gain = 0.01 * (method == better)
            cost = {"search_cost": 1.5 + seed, "cost_reference": "UES-32"} if method == "a" else {}
            rows.append(line(method, "10%", seed, (3, 0 if method == "a" else 4 * seed), 0.71 + gain, **cost))
            rows.append(line(method, "50%", seed, (15, 16), 0.745 + gain + 0.004 * seed, **cost))
    return [row | {"data_set": name} for row in rows]


def group(rows: list[dict[str, Any]]) -> Group:
    (found,) = groups_of(rows)
    return found


def test_each_model_stands_against_the_best_uniform_width_and_that_of_its_budget() -> None:
    lines = {text.split(" | ")[0]: text for text in quality(group(small())) if text.startswith("| ")}
    assert "| 2 | 1,810 | 51% | 3,620 | 0.7570 +- 0.0028 |" not in lines["| a 50%"]
    assert "| a 50% | 2 | 1,660 | 47% | 3,320 | 0.7570 +- 0.0028 | 0.2430 +- 0.0028 |" in lines["| a 50%"]
    # Paired by seed: 0.755 - 0.74 and 0.759 - 0.742.
    assert lines["| a 50%"].endswith("| +0.0160 (s.e. 0.0010) UES-16 | +0.0160 (s.e. 0.0010) UES-16 |")
    assert lines["| a 10%"].endswith("| -0.0210 (s.e. 0.0010) UES-16 | +0.0200 (s.e. 0.0000) UES-3 |")
    assert lines["| UES-16"].endswith("| - | - |")


def test_one_seed_is_called_one_seed_and_a_budget_without_a_uniform_width_has_a_dash() -> None:
    rows = [r for r in small() if r["seed"] == "0" and not (r["method"] == "uniform" and r["parameters"] == 330)]
    text = "\n".join(quality(group(rows)))
    assert "+0.0150 (one seed) UES-16 | +0.0150 (one seed) UES-16 |" in text
    assert "-0.0200 (one seed) UES-16 | - |" in text


def test_a_block_is_a_data_set_and_a_budget_and_counts_the_seeds_that_all_have() -> None:
    rows = [r for r in small() if not (r["method"] == "b" and r["budget"] == "50%" and r["seed"] == "1")]
    blocks = blocks_by_budget([group(rows)], "test_auc")
    assert list(blocks) == ["x, deepfm, 10%", "x, deepfm, 50%"]
    assert blocks["x, deepfm, 50%"] == pytest.approx({"a": 0.755, "b": 0.745, "uniform": 0.74})  # seed 0 alone
    assert blocks["x, deepfm, 10%"] == pytest.approx({"a": 0.72, "b": 0.71, "uniform": 0.70})
    whole = blocks_by_data([group(rows)], "test_auc")
    assert whole["x, deepfm"] == pytest.approx({"a": 0.7375, "b": 0.7275, "uniform": 0.72})


def test_budgets_whose_methods_share_no_seed_are_named() -> None:
    """Seeds that ran for one method alone, as a failed chain or --first-seed leaves them."""
    rows = [r for r in small() if (r["method"], r["budget"], r["seed"]) not in {("a", "50%", "0"), ("b", "50%", "1")}]
    for section in (winners, choices, ranks):
        text = "\n".join(section([group(rows)]))
        assert "Left out, because there is no seed that all methods have: x, deepfm, 50%." in text
        assert "Left out" not in "\n".join(section([group(small())]))


def test_a_choice_counts_the_seeds_that_all_methods_have() -> None:
    """Method b has a lucky seed that a lacks: neither the best method nor the choice is one of it."""
    rows = [row | {"validation_auc": row["test_auc"], "validation_logloss": row["test_logloss"]} for row in small()]
    luck = {"validation_auc": 0.9, "validation_logloss": 0.1}
    rows.append(line("b", "50%", 2, (15, 16), 0.9, **luck))
    text = next(x for x in choices([group(rows)]) if "| 50% | validation AUC |" in x)
    assert "| 0.7570 +- 0.0028 | +0.0000 (s.e. 0.0000) a | a 2x |" in text


def test_ranks_name_who_is_left_out_and_what_the_tests_say() -> None:
    rows = [*small("x"), *small("y"), *small("z", better="b"), line("c", "10%", 0, (3, 3), 0.8)]
    text = "\n".join(ranks(groups_of(rows)))
    assert "By test AUC, mean over seeds; a block is a data set and a budget: 6 blocks; Friedman chi2" in text
    assert "c is left out: not in x, deepfm, 50%; y, deepfm, 10%;" in text
    # a is first in four blocks of six and second in two; uniform is last in all.
    assert "| a | 1.33 | no |" in text and "| b | 1.67 | no |" in text and "| uniform | 3.00 | yes |" in text
    assert "a block is a data set: 3 blocks;" in text
    alone = "\n".join(ranks(groups_of(small())))
    assert (
        "a block is a data set: 1 block, 3 methods: not enough for Friedman's test, so nothing is told apart." in alone
    )


def test_rounded_shares_put_no_uniform_width_outside_of_its_own_budget() -> None:
    """Half of UES-32 is UES-16, though the first line's share, as written, makes UES-32 too small by 50 parameters."""
    rows = [uniform(16, 0, 0.7, parameters=192_608, share_of_ues32="0.500000")]
    rows = [line("a", "50%", 0, (1, 1), 0.7, parameters=3_800, share_of_ues32="0.009866"), *rows]
    assert group(rows).within("50%") == "16" and group(rows).reference == 385_216
    assert group(rows).within("49.9%") == ""


def served(row: dict[str, Any], precision: str = "int8") -> dict[str, Any]:
    """The line as ``compare_budgets.py --precision`` leaves it: rows of w + 4 bytes at int8, in steps of 16."""
    size = {w: -(-(w + 4) // 16) * 16 for w in (4, 8, 12, 16, 32)}[widths_in(row)["user"]] * VALUES
    told = {"precision": precision, "served_bytes": size, "served_share_of_ues32": f"{size / (48 * VALUES):.6f}"}
    return row | told | {"served_auc": row["test_auc"], "served_logloss": 0.6}


def test_the_uniform_width_of_a_budget_is_the_widest_in_what_the_budget_counts() -> None:
    """Half of UES-32 is UES-16 by parameters. At int8 that takes 32 bytes of 48 a row, and UES-12, 8 and 4 take 16."""
    rows = [uniform(w, 0, 0.7 + w / 1000) for w in (4, 8, 12, 16, 32)] + [line("a", "50%", 0, (12, 12), 0.75)]
    assert group(rows).within("50%") == "16"
    found = group([served(row) for row in rows])
    assert [found.within(b) for b in ("50%", "33%", "34%", "67%", "100%", "ues-12")] == ["12", "", "12", "16", "32", ""]
    assert found.reference == 32 * VALUES and found.models["uniform", "16"].parameters == 16 * VALUES
    assert any(x.startswith("| a 50% ") and x.endswith("+0.0380 (one seed) UES-12 |") for x in quality(found))
    assert blocks_by_budget([found], "test_auc")["x, deepfm, 50%"]["uniform"] == 0.712


def test_lines_of_two_precisions_are_no_league_of_one_data_set() -> None:
    rows = [uniform(8, 0, 0.7), served(line("a", "50%", 0, (12, 12), 0.75))]
    with pytest.raises(UserError, match=r"x, deepfm: budgets count parameters and bytes at int8, .* \(NAME=FILE\)"):
        groups_of(rows)
    assert [g.name for g in groups_of([rows[0], rows[1] | {"data_set": "y"}])] == ["x", "y"]


def test_the_best_at_each_budget_and_who_is_level_with_it() -> None:
    figures = {"a": (0.76, 0.78, 0.75), "b": (0.75, 0.79, 0.74), "c": (0.75, 0.77, 0.74)}
    rows = [line(m, "50%", s, (4, 4), auc) for m, values in figures.items() for s, auc in enumerate(values)]
    rows.append(line("a", "50%", 3, (4, 4), 0.9))  # a seed that the others lack
    text = "\n".join(winners([group(rows)]))
    # a - b: 0.01, -0.01, 0.01; a - c: 0.01 in each.
    assert "| x, deepfm | 50% | a | 0.7633 +- 0.0153 | b (-0.0033, s.e. 0.0067) |" in text
    one = [r for r in rows if r["seed"] == "0"]
    assert "| x, deepfm | 50% | a | 0.7600 | one seed |" in "\n".join(winners([group(one)]))


def test_a_choice_by_validation_rows_is_told_beside_the_best_method() -> None:
    rows = []
    for seed in (0, 1):
        told = {"validation_auc": 0.72, "validation_logloss": 0.30}
        rows.append(line("good", "50%", seed, (8, 8), 0.75 + 0.01 * seed, **told))
        rows.append(line("lucky", "50%", seed, (8, 8), 0.73, **(told | {"validation_auc": 0.73})))
        rows.append(uniform(16, seed, 0.74, **(told | {"validation_logloss": 0.29 + 0.02 * seed})))
        rows.append(line("auto", "50%", seed, (8, 8), 0.9, validation_auc=0.9, validation_logloss=0.1))
    by_auc, by_logloss = choices([group(rows)])[-3:-1]
    assert by_auc.endswith("| 0.7300 +- 0.0000 | -0.0250 (s.e. 0.0050) good | lucky 2x |"), by_auc
    assert "| 0.7500 +- 0.0141 | -0.0050 (s.e. 0.0050) good | uniform, good |" in by_logloss, by_logloss


def test_search_cost_and_stability_are_told_by_method() -> None:
    text = page(groups_of(small()), [])
    assert "In multiples of one training of UES-32 with the same seed" in text
    assert "| a | 2.00 +- 0.71 |" in text  # of each seed once, though there are two budgets
    assert "| x, deepfm | 10%: same | 10%: rho | 50%: same | 50%: rho |" in text
    assert "| a | 100% | 1.00 | 100% | 1.00 |" in text and "| b | 50% | -1.00 | 100% | 1.00 |" in text
    assert "chooses from" not in text
    assert "No file tells what the searches cost." in page(groups_of([uniform(4, 0, 0.7)]), [])
    # Each budget has a search of its own.
    rows = [
        line("auto", b, 0, (8, 8), 0.7, search_cost=c, cost_reference="UES-32") for b, c in (("10%", 2), ("50%", 5))
    ]
    text = page(groups_of([*small(), *rows]), [])
    assert "| auto | 3.50 |" in text and "`auto` is told for one budget" in text


def test_a_published_order_agrees_disagrees_or_is_not_told_apart() -> None:
    order = Order("P", "D", "deepfm", ["x"], "Note.", auc={"a": 0.9, "uniform": 0.8, "b": 0.7, "none": 0.6})
    found = {(p.better, p.worse): p for p in pairs_of(order, group(small(better="b")), "50%")}
    assert set(found) == {("a", "uniform"), ("a", "b"), ("uniform", "b")}
    assert found["a", "uniform"].word == "agrees" and found["a", "uniform"].ours == pytest.approx(0.017)  # over UES-32
    assert found["a", "b"].word == "disagrees" and found["uniform", "b"].word == "disagrees"
    one = [r for r in small() if r["seed"] == "0"]
    assert {p.word for p in pairs_of(order, group(one), "50%")} == {"not told apart"}
    tiers = Order("P", "D", "mlp", ["x"], "", tiers=[["a"], ["b", "uniform"]])
    assert [(p.better, p.worse) for p in pairs_of(tiers, group(small()), "50%")] == [("a", "b"), ("a", "uniform")]
    text = page(groups_of(small(better="b")), [order, Order("Q", "E", "fm", [], "", tiers=[["a"]])])
    assert "**P**, D, deepfm: a (0.9000) > uniform (0.8000) > b (0.7000) > none (0.6000). Note." in text
    assert "  - disagrees: 2 of 3: a over b (ours -0.0100, s.e. 0.0000); uniform over b" in text
    assert "No data set here stands beside Q: E, fm." in text


def test_the_orders_that_ship_can_be_read_and_are_in_order() -> None:
    orders = read_orders()
    assert {o.paper.split(" (")[0] for o in orders} == {"AdaS&S", "iHAS"}
    assert all(list(o.auc) == o.methods() for o in orders if o.auc)  # written best first, so a slip would show


def test_lines_of_several_files_are_put_together(tool: ModuleType, tmp_path: Path) -> None:
    rows = small()
    for row in rows:
        row["served_int8_bytes"] = ""
    write_rows(tmp_path / "a.csv", rows)
    write_rows(tmp_path / "b.csv", rows[:3])
    write_rows(tmp_path / "c.csv", [{**rows[3], "test_auc": 0.5}])
    assert len(read_rows([("", tmp_path / "a.csv"), ("", tmp_path / "b.csv")])) == len(rows)
    with pytest.raises(UserError, match="c.csv: a 10% seed 0 on x has another test AUC than in .*a.csv"):
        read_rows([("", tmp_path / "a.csv"), ("", tmp_path / "c.csv")])
    renamed = read_rows([("", tmp_path / "a.csv"), ("y", tmp_path / "c.csv")])
    assert len(renamed) == len(rows) + 1 and renamed[-1]["data_set"] == "y"
    assert widths_in(renamed[3]) == {"user": 3, "movie id": 0}
    (tmp_path / "d.csv").write_text("data,seed\nx,0\n")
    with pytest.raises(UserError, match="d.csv: column backbone is missing"):
        read_rows([("", tmp_path / "d.csv")])
    assert tool.named("y=b.csv") == ("y", Path("b.csv"))
    assert tool.main(["tables", str(tmp_path / "none.csv"), "--out", str(tmp_path)]) == 2


def test_every_picture_that_the_lines_are_enough_for_is_drawn(tmp_path: Path) -> None:
    names = [p.name for p in draw_all(groups_of(small()), tmp_path)]
    assert names == ["x-deepfm-parameters.png", "x-deepfm-int8.png", "cost.png", "stability.png", "ranks.png"]
    assert all((tmp_path / n).stat().st_size > 5000 for n in names)
    bare = [
        r | {"served_int8_bytes": "", "search_cost": ""} for r in small() if r["seed"] == "0" and r["budget"] != "50%"
    ]
    assert [p.name for p in draw_all(groups_of(bare), tmp_path / "bare")] == ["x-deepfm-parameters.png"]


def test_a_picture_leaves_out_what_lies_far_on_the_worse_side_and_tells_it() -> None:
    means = [0.70, 0.702, 0.704, 0.706, 0.74]
    points = [Point("10%", 100.0, mean, 0.001) for mean in means]
    assert window("test_auc", points) is None  # a better one is never left out
    low, high = window("test_auc", [*points, Point("10%", 100.0, 0.6, 0.001)]) or (0.0, 0.0)
    assert 0.6 < low < 0.699 and high > 0.741
    low, high = window("test_logloss", [*points, Point("10%", 100.0, 0.6, 0.001)]) or (0.0, 0.0)
    assert low < 0.599 and 0.707 < high < 0.74  # of a logloss more is worse
    assert window("test_auc", points[:3]) is None  # too few to tell
    wide = window("test_auc", [*points, Point("10%", 100.0, 0.6, 0.001), Point("25%", 100.0, 0.704, 0.2)])
    assert wide and wide[0] > 0.6  # a bar of a wide spread does not widen it


def test_figures_outside_of_a_picture_are_written_below_it() -> None:
    from embsearch_dist.report.style import LIGHT

    rows = [uniform(w, seed, 0.7 + w / 1000) for seed in (0, 1) for w in (2, 4, 8)]
    rows += [line("good", b, seed, (2, 2), 0.705) for seed in (0, 1) for b in ("25%", "50%")]
    rows += [line("bad", "25%", seed, (1, 1), 0.55) for seed in (0, 1)]
    note = draw_quality(LIGHT, group(rows), "parameters", looks(LIGHT, ["good", "bad"]))._supxlabel.get_text()
    assert "test AUC not shown: bad 25% 0.5500" in note and "good" not in note


def test_thirty_methods_have_looks_of_their_own() -> None:
    from embsearch_dist.report.style import LIGHT

    assert len(set(looks(LIGHT, [str(k) for k in range(30)]).values())) == 30


def test_the_published_figures_of_this_repository_make_a_page(tmp_path: Path) -> None:
    from tools.studies.results_tables import PAGES

    groups = groups_of(read_rows([("movielens_1m_time", PAGES / "movielens_1m_time_deepfm.csv")]))
    text = page(groups, read_orders())
    assert "| utilities 25% | 5 | 86,960 | 23% |" in text
    assert "-0.0015 (s.e. 0.0016) UES-28 | +0.0010 (s.e. 0.0005) UES-8 |" in text  # as docs/results/search.md has it
    assert "- movielens_1m_time, budget 80%" in text or "no two methods that the paper puts in order" in text
