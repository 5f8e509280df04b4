"""Tables of docs/results come from the CSV files beside them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tools.studies import consistency, search_table  # noqa: E402
from tools.studies.budget_tables import COLUMNS  # noqa: E402
from tools.studies.results_tables import filled, pages  # noqa: E402


def write(path: Path, lines: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(lines)


def line(seed: int, method: str, width: int, size: int, auc: float) -> dict[str, object]:
    widths = f"user={width} movie={width}"
    shares = {"parameters": size, "share_of_ues32": size / 3200, "test_auc": auc, "test_logloss": 0.5}
    return {"commit": "abc", "seed": seed, "method": method, "widths": widths, "budget": "50%"} | shares


def test_a_block_is_filled_from_its_file_and_all_else_stays(tmp_path: Path) -> None:
    lines = [line(s, "uniform", 16, 1600, 0.70 + s / 1000) for s in range(2)]
    lines += [line(s, "utilities", 0, 1500, 0.72 + s / 1000) for s in range(2)]
    write(tmp_path / "x.csv", lines)
    text = "before\n<!-- comparison x.csv -->\nold\n<!-- end -->\nafter\n"
    made = filled(text, tmp_path)
    assert made.startswith("before\n<!-- comparison x.csv -->\n")
    assert made.endswith("<!-- end -->\nafter\n")
    assert "old" not in made
    assert "| UES-16 | 1,600 |" in made
    assert "+0.0200 AUC" in made
    assert filled(made, tmp_path) == made


def test_a_missing_file_and_an_empty_one_are_named(tmp_path: Path) -> None:
    text = "<!-- comparison x.csv -->\n<!-- end -->"
    with pytest.raises(SystemExit, match=r"x\.csv: a page names this file"):
        filled(text, tmp_path)
    write(tmp_path / "x.csv", [])
    with pytest.raises(SystemExit, match="no line"):
        filled(text, tmp_path)


def test_a_block_of_columns_shows_those_it_names(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        "commit,command,hardware,p50_ms,rows\nabc,python t.py,CPU,1.5,7\nabc,python t.py,CPU,2.5,8\n"
    )
    text = "<!-- columns x.csv: rows, p50_ms -->\nold\n<!-- end -->\n"
    made = filled(text, tmp_path)
    assert "    python t.py\n\nCommit abc; CPU.\n\n| rows | p50 ms |\n| --- | --- |\n| 7 | 1.5 |\n| 8 | 2.5 |\n" in made
    assert "old" not in made and filled(made, tmp_path) == made
    with open(tmp_path / "x.csv", "a") as f:
        f.write("def,python t.py --more,CPU,3.5,9\n")
    continued = filled(text, tmp_path)
    assert "    python t.py\n    python t.py --more\n\nCommits abc, def; CPU.\n\n| rows" in continued
    with pytest.raises(SystemExit, match="wants column 'more', the file has commit, command"):
        filled(text.replace("rows,", "more,"), tmp_path)


def test_a_block_of_ranks_has_means_over_supernets(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        "setting,seed,subnets,tau_test,tau_validation,regret,ceiling,noise,commit,hardware,command\n"
        "plain,0,40,0.5,0.6,0.001,0.8,0.7,abc,CPU,python c.py\nplain,1,40,0.7,0.6,0.003,0.8,0.7,abc,CPU,python c.py\n"
    )
    made = filled("<!-- consistency x.csv -->\n<!-- end -->\n", tmp_path)
    assert "    python c.py\n\nCommit abc; CPU.\n" in made
    assert "| plain | 0.600 +- 0.141 | 0.75 | 0.600 +- 0.000 | 0.0020 |" in made


def test_one_supernet_and_one_search_have_no_spread() -> None:
    row = {"setting": "plain", "seed": "0", "subnets": "40", "tau_test": "0.5", "tau_validation": "0.6"}
    row |= {"regret": "0.001", "ceiling": "0.8", "noise": "0.7"}
    assert "| plain | 0.500 | 0.62 | 0.600 | 0.0010 |" in consistency.markdown([row])
    one = {"budget": "10%", "search": "sweeps", "regret": "0.002", "scored": "9", "allocations": 20, "table_seeds": 1}
    assert "| sweeps | 9 | 2.00 |" in search_table.markdown([one | {"noise": "0.001"}])


def method_line(seed: int, model: str, auc: float, validation: float) -> str:
    return f"abc,CPU,clicks,{seed},{model},10,2000,{validation},{auc},0.5"


def test_a_block_of_methods_pools_what_is_numbered_and_pairs_seeds(tmp_path: Path) -> None:
    head = "commit,hardware,data,seed,model,dense_parameters,flops_per_sample,validation_logloss,test_auc,test_logloss"
    lines = [method_line(0, "dlrm", 0.70, 0.6), method_line(1, "dlrm", 0.72, 0.6)]
    # By validation the second is chosen with seed 0, the first with seed 1.
    lines += [method_line(0, "found-1", 0.71, 0.60), method_line(0, "found-2", 0.73, 0.59)]
    lines += [method_line(1, "found-1", 0.73, 0.58), method_line(1, "found-2", 0.75, 0.59)]
    (tmp_path / "x.csv").write_text("\n".join([head, *lines, method_line(1, "late", 0.60, 0.9)]) + "\n")
    made = filled("<!-- methods x.csv: dlrm -->\nold\n<!-- end -->\n", tmp_path)
    assert "clicks, seeds 0, 1, commit abc; CPU." in made
    assert "| found: mean of 2 | 0.7300 +- 0.0141 | 0.5000 +- 0.0000 | +0.0200 (s.e. 0.0000) | 10 | 2 |" in made
    assert "| found: by validation | 0.7300 +- 0.0000 | 0.5000 +- 0.0000 | +0.0200 (s.e. 0.0100) | 10 | 2 |" in made
    assert "| dlrm | 0.7100 +- 0.0141 | 0.5000 +- 0.0000 |  | 10 | 2 |" in made
    assert "| late (1 of 2 seeds) | 0.6000 | 0.5000 | -0.1200 (one seed) | 10 | 2 |" in made
    assert made.index("| dlrm |") > made.index("| found: mean")
    with pytest.raises(SystemExit, match="'ues-4'; its file has dlrm"):
        filled("<!-- methods x.csv: ues-4 -->\n<!-- end -->\n", tmp_path)


def test_uniform_widths_are_no_pool(tmp_path: Path) -> None:
    head = "commit,hardware,data,seed,model,dense_parameters,flops_per_sample,validation_logloss,test_auc,test_logloss"
    lines = [method_line(0, "ues-8", 0.70, 0.6), method_line(0, "ues-16", 0.72, 0.6)]
    (tmp_path / "x.csv").write_text("\n".join([head, *lines]) + "\n")
    made = filled("<!-- methods x.csv: ues-8 -->\n<!-- end -->\n", tmp_path)
    assert "| ues-16 | 0.7200 | 0.5000 | +0.0200 (one seed) | 10 | 2 |" in made
    assert "mean of" not in made and "| ues-8 | 0.7000 |" in made


def test_a_league_block_shows_the_parts_that_it_names(tmp_path: Path) -> None:
    more = {"data": "y 0f 9 training rows", "backbone": "deepfm"}
    lines = [line(s, "uniform", 16, 1600, 0.70 + s / 1000) | more | {"budget": ""} for s in range(2)]
    lines += [line(s, "utilities", 8, 1500, 0.72 + s / 1000) | more for s in range(2)]
    write(tmp_path / "x.csv", lines)
    text = "<!-- league my=x.csv: quality, stability -->\nold\n<!-- end -->\n"
    made = filled(text, tmp_path)
    assert "### my, deepfm" in made and "### Stability over seeds" in made
    assert "Ranks" not in made and "old" not in made
    assert "| utilities 50% | 2 | 1,500 | 47% |" in made and filled(made, tmp_path) == made
    with pytest.raises(SystemExit, match="a league has no part 'speed'"):
        filled(text.replace("stability", "speed"), tmp_path)


def test_the_pages_of_this_repository_are_up_to_date() -> None:
    assert {"search.md", "league.md"} <= {page.name for page in pages()}
    for page in pages():
        assert filled(page.read_text(), page.parent) == page.read_text(), (
            f"{page.name}: run python tools/studies/results_tables.py"
        )
