"""Every method that says so finds planted widths: under one budget its model is better than those of random widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.planted.synthetic import TRUTH, Pair, Plan, make_synthetic
from embsearch_dist.methods import METHODS
from embsearch_dist.rundir import release
from tests.factories import one_rank
from tests.method_contract import PLANTED, PlantedCase

PLAN = Plan(
    pairs=(Pair(1, (80, 30), 0.6), Pair(2, (30, 60), 1.0), Pair(8, (40, 30), 2.4)),
    idle=(50, 120),
    main_effects=("p0_a",),
    main_variance=0.05,
    zipf=0.5,
    intercept=-0.5,
)
MARGIN = 0.03  # AUC above the best of three random allocations; between those there are 0.06
CLAIMING = [name for name, method in sorted(METHODS.items()) if method.planted is not None]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "data"
    make_synthetic(folder, 60_000, plan=PLAN, quiet=True)
    return folder


@pytest.fixture(scope="module")
def by_chance(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """AUC of random widths under the budget, of three seeds."""
    return [
        tried("random", planted, tmp_path_factory.mktemp("random") / "run", f"run.seed={seed}")[1] for seed in range(3)
    ]


def tried(name: str, data: Path, directory: Path, *words: str) -> tuple[dict[str, int], float]:
    """Widths that a method finds, and the test AUC of their model."""
    case = PlantedCase(name, str(data))
    try:
        run = case.search(directory, one_rank(), *words)
        figures = case.retrain(run.dir, one_rank())
        return Allocation.load(run.dir / "allocation.json", run.schema).widths, next(iter(figures.values()))["auc"]
    finally:
        release()


@pytest.mark.slow  # of each, a smaller case is in its own file
@pytest.mark.parametrize("name", CLAIMING)
def test_planted_widths_are_found(name: str, planted: Path, by_chance: list[float], tmp_path: Path) -> None:
    widths, auc = tried(name, planted, tmp_path / "run")
    assert auc > max(by_chance) + MARGIN, f"{widths} have {auc:.4f}, random ones {by_chance}"
    truth = json.loads((planted / TRUTH).read_text())
    assert auc < truth["bayes_auc"] + 0.01, "nothing can be that good: the clicks of the test rows were seen"
    strongest = [widths[n] for n, rank in truth["rank"].items() if rank == 8]
    weakest = [widths[n] for n, rank in truth["rank"].items() if rank == 1]
    assert sum(strongest) > sum(weakest)


def test_the_budget_of_the_trial_binds() -> None:
    schema_rows = {"p0": (80, 30), "p1": (30, 60), "p2": (40, 30), "idle": (50, 120)}
    everything = sum(n for pair in schema_rows.values() for n in pair) * 8
    allowed = float(PLANTED["search.budget"].rstrip("%")) / 100 * everything * 4
    assert sum(schema_rows["p2"]) * 8 < allowed < everything / 1.5
