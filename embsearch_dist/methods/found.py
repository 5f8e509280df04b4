"""What a search that ends with an allocation leaves in its run directory, budget by budget."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from embsearch_dist.allocation import REFERENCE_WIDTH, Allocation
from embsearch_dist.errors import UserError, script
from embsearch_dist.files import copy_sealed, read_sealed, write_sealed
from embsearch_dist.methods.budget import Budget, check_feasible, parse_budget
from embsearch_dist.precision import MIXED, PRECISIONS
from embsearch_dist.schema import Schema
from embsearch_dist.train.metrics import shown

SCORED_POINTS = 4000  # dots of the Pareto picture


@dataclass(frozen=True)
class Point:
    """One found allocation with the metrics that the search saw for it.

    Attributes:
        metrics: ``auc`` and ``logloss`` on the search's rows; empty where the search measures nothing.
        budget: limit it was found under, None without one.
        scored: (parameters, AUC) of everything that was measured on the way.
    """

    name: str
    allocation: Allocation
    metrics: dict[str, float]
    budget: int | None
    scored: list[tuple[int, float]] = field(default_factory=list)


class Budgeted(Protocol):
    """The settings of a search that has budgets."""

    budget: str
    pareto: list[str]
    precision: str

    @property
    def candidates(self) -> list[int]:
        """Widths that a field may get."""


def budgets(
    config: Budgeted, name: str, schema: Schema, extra: int, precisions: bool = False
) -> list[tuple[str, Budget | None]]:
    """(allocation name, budget) of every search of a stage, the main one first; all checked.

    Args:
        extra: columns of a kept field's table beside its width (``ModelConfig.extra``).
        precisions: with ``precision: mixed`` the search chooses that of each field.

    Raises:
        UserError: a budget that no allocation of the candidates can obey.
    """
    texts = [(name, config.budget, "search.budget")]
    texts += [(f"{name}-{text.strip()}", text, "search.pareto") for text in config.pareto]
    found: list[tuple[str, Budget | None]] = []
    for called, text, key in texts:
        parsed = parse_budget(text, schema, key, extra, config.precision) if text else None
        if parsed:
            check_feasible(parsed, schema, config.candidates, key, extra, precisions=precisions)
        found.append((called.replace("%", "pct").replace(" ", ""), parsed))
    return found


def budget_told(budget: Budget | None, precision: str) -> dict[str, object]:
    """What an allocation's provenance says of the budget it was found under; see :func:`budget_of`."""
    told: dict[str, object] = {"budget": budget.text} if budget else {}
    return told | ({"precision": precision} if budget and precision else {})


def budget_of(found: Allocation) -> Budget:
    """The budget that an allocation was found under; what it takes itself where it names none."""
    text, precision = found.provenance.get("budget"), found.provenance.get("precision", "")
    if not isinstance(text, str):
        return Budget("parameters", found.total("parameters"), "")
    known = str(precision) if precision in (*PRECISIONS, MIXED) else ""
    return parse_budget(text, found.schema, "budget of the allocation", found.extra, known)


def write_allocations(directory: Path, points: Sequence[Point]) -> None:
    """``allocations/NAME.json`` of each, and ``allocation.json`` of the first. Rank 0 calls this."""
    for point in points:
        point.allocation.save(directory / "allocations" / f"{point.name}.json")
    copy_sealed(directory / "allocations" / f"{points[0].name}.json", directory / "allocation.json")


def write_points(directory: Path, points: Sequence[Point]) -> None:
    """What :func:`write_allocations` writes, and ``search/pareto.json``.

    Rank 0 calls this. Points of earlier searches in this directory stay in the picture.
    """
    path = directory / "search" / "pareto.json"
    bodies = [_body(point, chosen=k == 0) for k, point in enumerate(points)]
    bodies += earlier_points(path, {point.name for point in points})
    scored = list(dict.fromkeys((size, round(auc, 6)) for point in points for size, auc in point.scored))
    every = [list(pair) for pair in scored[:: max(1, len(scored) // SCORED_POINTS)]]
    write_sealed(path, {"resource": "parameters", "points": bodies, "scored": every})
    write_allocations(directory, points)


def earlier_points(path: Path, names: Set[str]) -> list[dict[str, Any]]:
    """What ``search/pareto.json`` holds of earlier searches, those called otherwise than ``names``.

    A damaged file must not cost the search that has just ended: it is told, and its points are left out."""
    if not path.exists() and not path.is_symlink():
        return []
    try:
        return [{**p, "chosen": False} for p in read_sealed(path)["points"] if p["name"] not in names]
    except (UserError, KeyError, TypeError) as e:
        print(f"{e}: the points of earlier searches are left out of the picture", flush=True)
        if path.is_dir() and not path.is_symlink():
            raise
        return []


def _body(point: Point, chosen: bool) -> dict[str, Any]:
    return {
        "name": point.name,
        "widths": point.allocation.widths,
        "parameters": point.allocation.total("parameters"),
        "bytes": point.allocation.total("bytes"),
        "auc": point.metrics["auc"],
        "logloss": point.metrics["logloss"],
        "budget": point.budget,
        "chosen": chosen,
    }


def describe(point: Point, directory: Path) -> str:
    """The found widths and the next command, for the terminal."""
    allocation = point.allocation
    widths = "  ".join(f"{n}={w}" for n, w in allocation.widths.items())
    size = allocation.total("parameters")
    reference = (REFERENCE_WIDTH + allocation.extra) * sum(allocation.schema.cardinalities)
    measured = f", auc {shown(point.metrics['auc'])} with the weights of the search" if point.metrics else ""
    return (
        f"found: {widths}\n"
        f"embedding parameters {size:,} ({size / reference:.1%} of UES-{REFERENCE_WIDTH}){measured}\n"
        f"next: {script('retrain')} --run {directory}"
    )
