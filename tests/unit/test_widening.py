"""Wider allocations than the found one: what the budget holds, when the ladder ends, and what of it is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import Diverged
from embsearch_dist.files import read_sealed
from embsearch_dist.methods import retraining
from embsearch_dist.methods.fallback import Trained
from embsearch_dist.methods.widening import climb, next_wider, widened
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema
from tests.factories import one_rank, prepared
from tests.method_contract import Case

SCHEMA = Schema("any", (Field("small", 10), Field("large", 100), Field("idle", 50)))
CANDIDATES = [0, 2, 4, 8, 16]


def found(budget: str | None, small: int = 4, large: int = 2) -> Allocation:
    told = {"name": "found"} | ({"budget": budget} if budget else {})
    return Allocation(SCHEMA, {"small": small, "large": large, "idle": 0}, told)


@pytest.mark.parametrize(
    ("width", "candidates", "wider"),
    [(2, CANDIDATES, 4), (16, CANDIDATES, 16), (3, [0, 3, 12], 12), (4, [2, 4, 5, 7, 8, 9], 8), (5, [5], 5)],
)
def test_the_next_width_is_at_most_twice_where_there_is_one(width: int, candidates: list[int], wider: int) -> None:
    assert next_wider(width, candidates) == wider


def test_kept_fields_are_widened_as_far_as_the_budget_holds() -> None:
    whole = widened(found("480"), CANDIDATES, 2)
    assert whole is not None and whole.widths == {"small": 8, "large": 4, "idle": 0}
    assert whole.provenance == {"name": "found", "budget": "480", "widened": 2}
    # 10 * 8 + 100 * 4 = 480: one less, and the large table stays as it is. The small one alone is not worth a training,
    # 280 against 240, unless it is a larger part of the whole.
    assert widened(found("479"), CANDIDATES, 2) is None
    part = widened(found("479", small=8), CANDIDATES, 2)
    assert part is not None and part.widths == {"small": 16, "large": 2, "idle": 0}
    assert widened(found(None), CANDIDATES, 2) is None, "without a budget there is nothing to spend"
    assert widened(found("100000", small=16, large=16), CANDIDATES, 2) is None


def test_budgets_of_served_bytes_and_first_order_columns_count() -> None:
    served = replace(found("2.5KB"), provenance={"budget": "2.5KB", "precision": "int8"})
    # A row of 2 to 12 columns takes 16 bytes at int8, one of 16 columns takes 32: (10 + 100) * 16 = 1,760.
    assert widened(served, CANDIDATES, 2) is None, "it costs the same: no step is worth a training"
    counted = found("590").counted(1)
    assert (whole := widened(counted, CANDIDATES, 2)) is not None and whole.total("parameters") == 10 * 9 + 100 * 5
    assert widened(found("589").counted(1), CANDIDATES, 2) is None


class Ladder:
    """Models whose logits tell the labels better, the higher their worth."""

    def __init__(self, worth: dict[str, float]) -> None:
        rng = np.random.default_rng(0)
        self.labels = (rng.random(4000) < 0.4).astype(np.float32)
        self.noise, self.worth = rng.normal(size=4000), worth
        self.asked: list[tuple[str, int, bool]] = []

    def model(self, name: str, size: int) -> Trained:
        logits = self.worth[name] * (self.labels - 0.5) + self.noise
        return Trained(name, size, logits.astype(np.float32))

    def train(self, name: str, allocation: Allocation, fresh: bool) -> Trained:
        self.asked.append((name, allocation.widths["large"], fresh))
        return self.model(name, allocation.total("parameters"))

    def climb(self, start: Allocation, fresh: bool) -> str:
        first = self.model("a", start.total("parameters"))
        self.asked.clear()
        return climb("a", first, start, CANDIDATES, self.train, self.labels, "auc", fresh, bool).name


def test_the_ladder_ends_with_the_first_model_that_is_not_better() -> None:
    ladder = Ladder({"a": 1.0, "a-x2": 1.5, "a-x4": 1.5, "a-x2-fresh": 1.4})
    assert ladder.climb(found("100%"), fresh=True) == "a-x2"
    assert ladder.asked == [("a-x2", 4, False), ("a-x4", 8, False), ("a-x2-fresh", 4, True)]
    assert ladder.climb(found("100%"), fresh=False) == "a-x2"
    assert [name for name, _, _ in ladder.asked] == ["a-x2", "a-x4"]
    ladder.worth["a-x2-fresh"] = 1.6
    assert ladder.climb(found("100%"), fresh=True) == "a-x2-fresh"


def test_the_ladder_ends_where_the_budget_does_and_is_one_training_where_width_is_worth_nothing() -> None:
    ladder = Ladder({"a": 1.0, "a-x2": 1.5, "a-x4": 2.0, "a-x8": 2.5})
    assert ladder.climb(found("100%"), fresh=False) == "a-x8" and len(ladder.asked) == 3
    assert ladder.climb(found("480"), fresh=False) == "a-x2" and len(ladder.asked) == 1
    level = Ladder({"a": 1.0, "a-x2": 1.0})
    assert level.climb(found("100%"), fresh=True) == "a" and len(level.asked) == 1
    assert level.climb(found(None), fresh=True) == "a" and not level.asked


def test_auto_trains_what_is_wider_inside_its_budget_and_chooses(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a model is better is decided here: a thousand rows cannot tell."""
    monkeypatch.setattr("embsearch_dist.methods.widening.compare", lambda *_: SimpleNamespace(first=True))
    case = Case("auto", str(prepared(tmp_path_factory)), more=("search.candidates=[1,2,4]", "search.evidence=100"))
    run = case.search(tmp_path / "run", one_rank(), "search.budget=80%")
    untouched = shutil.copytree(run.dir, tmp_path / "untouched")
    figures = case.retrain(run.dir, one_rank())
    final = read_sealed(run.dir / "final.json")
    assert {"auto", "auto-x2", "auto-x4", "auto-x4-fresh"} <= set(figures) == set(final["size"])
    sizes = [figures[name]["embedding_parameters"] for name in ("auto", "auto-x2", "auto-x4")]
    limit = 0.8 * 32 * sum(run.schema.cardinalities)
    assert sizes == [sizes[0], 2 * sizes[0], 4 * sizes[0]] and sizes[-1] <= limit
    assert "start" in figures["auto-x4"] and "start" not in figures["auto-x4-fresh"]
    again = case.retrain(run.dir, one_rank())
    assert {k: v["auc"] for k, v in again.items()} == {k: v["auc"] for k, v in figures.items()}
    without = replace(case, more=(*case.more, "search.widen=false"))
    diverging = shutil.copytree(untouched, tmp_path / "diverging")
    original = retraining.retrain_one

    def poor(run: Run, *more: Any) -> tuple[Any, Any]:
        if not run.dir.name.startswith("ues-"):
            raise Diverged("loss is not finite at step 3")
        return original(run, *more)

    with monkeypatch.context() as patch:
        patch.setattr(retraining, "retrain_one", poor)
        assert all(n.startswith("ues-") for n in without.retrain(diverging, one_rank()))
        final = read_sealed(diverging / "final.json")
        assert final["fallback"] and final["reason"].startswith("auto (") and "auto diverged. ues-" in final["reason"]
        with pytest.raises(Diverged):
            case.retrain(diverging, one_rank(), allocation=str(diverging / "allocation.json"), name="alone")
    assert sorted(without.retrain(untouched, one_rank())) == sorted(n for n in figures if "-x" not in n)


class Kept:
    first = False
