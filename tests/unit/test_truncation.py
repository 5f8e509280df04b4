"""FDO and magnitude pruning: the published rules, and the most that fits a budget."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.columns import best_columns, best_columns_under
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.methods.truncation.rules import fdo_under, fdo_widths
from tests.factories import one_rank, open_run, prepared, small_config

VARIANCES = torch.tensor([[6.0, 3.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
SQUARES = torch.tensor([[9.0, 0.5, 0.4], [3.0, 2.0, 1.0]], dtype=torch.float64)
ROWS = [10, 100, 1]


def cost(widths: list[int]) -> float:
    return float(sum(n * w for n, w in zip(ROWS, widths, strict=False)))


def test_fdo_keeps_the_fewest_components_of_a_share_of_the_variance() -> None:
    assert fdo_widths(VARIANCES, 0.6) == [1, 3, 1]
    assert fdo_widths(VARIANCES, 0.61) == [2, 3, 1]
    assert fdo_widths(VARIANCES, 1.0) == [3, 4, 1]
    assert fdo_widths(VARIANCES, 0.01) == [1, 1, 1]


def test_fdo_under_a_budget_keeps_the_largest_share_that_fits() -> None:
    shares = [k / 100 for k in range(101)]
    for limit in (111, 211, 321, 431):
        widths, keep = fdo_under(VARIANCES, cost, limit)
        assert cost(widths) <= limit
        assert widths == fdo_widths(VARIANCES, keep)
        fitting = [fdo_widths(VARIANCES, s) for s in shares if cost(fdo_widths(VARIANCES, s)) <= limit]
        assert widths == fitting[-1]
    with pytest.raises(ValueError, match="not even the least"):
        fdo_under(VARIANCES, cost, 110)


def test_magnitude_keeps_the_largest_columns_of_all_tables() -> None:
    assert best_columns(SQUARES, 9 / 15.9) == [1, 0]
    assert best_columns(SQUARES, 14 / 15.9) == [1, 2]
    assert best_columns(SQUARES, 1.0) == [3, 3]
    assert best_columns_under(SQUARES, cost, 10)[0] == [1, 0]
    assert best_columns_under(SQUARES, cost, 209)[0] == [
        1,
        1,
    ]  # the cheap columns behind the second are not taken instead
    widths, kept = best_columns_under(SQUARES, cost, 210)
    assert widths == [1, 2]
    assert kept == pytest.approx(14 / 15.9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def search(data: Path, folder: Path, *overrides: str) -> Allocation:
    config = small_config(data, folder, "search.width=8", *overrides, method="truncation")
    run = open_run(config, one_rank())
    check_stages(METHODS["truncation"](), run)
    run_stages(METHODS["truncation"](), run)
    return Allocation.load(folder / "allocation.json", run.schema)


def test_both_rules_share_one_trained_model_and_hold_every_budget(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = None
    for rule in ("fdo", "magnitude"):
        for weighted in ("true", "false"):
            budgets = ["search.budget=8%", "search.pareto=[15%,100KB]"]
            found = search(data, tmp_path, f"search.rule={rule}", f"search.weighted={weighted}", *budgets)
            whole = whole or 32 * sum(found.schema.cardinalities)
            assert found.provenance["method"] == found.provenance["name"] == rule
            assert found.total("parameters") <= 0.08 * whole
            wider = Allocation.load(tmp_path / "allocations" / f"{rule}-15pct.json", found.schema)
            assert found.total("parameters") < wider.total("parameters") <= 0.15 * whole
            in_bytes = Allocation.load(tmp_path / "allocations" / f"{rule}-100KB.json", found.schema)
            assert in_bytes.total("bytes") <= 100_000
    told = capsys.readouterr()
    assert told.out.count("stage widest: done before, skipped") == 3
    assert len(re.findall(r"truncation  100%  ([\d,]+)/\1 rows of the longest table  .*done in", told.err)) == 4
    points = json.loads((tmp_path / "search" / "pareto.json").read_text())["points"]
    assert [p["chosen"] for p in points].count(True) == 1
    assert len(points) == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.budget=1%"], "narrowest allocation"),
        (["search.rule=magnitude", "search.budget=500"], "does not hold one column of the largest field"),
    ],
)
def test_a_budget_below_one_column_is_refused_before_training(
    data: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        search(data, tmp_path, *overrides)
    assert not (tmp_path / "widest").exists()
