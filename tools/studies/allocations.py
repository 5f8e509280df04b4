"""The allocations that the searches of a comparison leave, and the budget that each of them was found under.

A file counts for a budget only where its provenance names this budget and the precision that it counts. A name alone
does not tell: earlier versions wrote the first budget of a search, whichever that was, to ``METHOD.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.studies.asked import slug

Tables = tuple[dict[str, int], dict[str, Any]]
CURE = "Delete this folder, or give another --out"


@dataclass(frozen=True)
class Found:
    """What one search of one seed found, or is to find, under one budget.

    Attributes:
        allocation: the file, or the one that the next search will write.
        precision: that its budget counts bytes at; empty where none is asked.
        there: whether the file tells what was found under this budget.
    """

    method: str
    budget: str
    seed: int
    allocation: Path
    precision: str
    there: bool

    @property
    def name(self) -> str:
        return f"{self.method}-{slug(self.budget)}"

    @property
    def tables(self) -> Tables | None:
        """None before there is a result."""
        return tables_of(self.allocation) if self.there else None

    def check(self, place: Path) -> None:
        """Refuse a finished training at ``place`` of tables that are not these.

        Raises:
            SystemExit: names the folder, what its tables were found under, and the cure.
        """
        trained = place / "allocation.json"
        if not trained.exists() or not (place / "evaluation.json").exists():
            return
        check_under(trained, self.budget, self.precision, place)
        if self.tables is not None and self.tables != tables_of(trained):
            raise SystemExit(
                f"{place}: its tables are not those of {self.allocation}, which a later search has written. {CURE}"
            )


def check_under(allocation: Path, budget: str, precision: str, place: Path) -> None:
    """Refuse what is finished in a folder where its allocation was found under another budget or precision.

    Raises:
        SystemExit: names the folder, what its tables were found under, and the cure.
    """
    under, asked = found_under(allocation) if allocation.exists() else None, (slug(budget), precision)
    if under is not None and under != asked:
        raise SystemExit(
            f"{place}: its tables were found under the budget {told_as(*under)}, and {told_as(*asked)} is asked. {CURE}"
        )


def check_precision(place: Path, precision: str) -> None:
    """Refuse a finished training that was not measured at the precision that a comparison judges by.

    Raises:
        SystemExit: names the folder and the cure.
    """
    file = place / "evaluation.json"
    if not precision or not file.exists():
        return
    told = (json.loads(file.read_text()).get("served") or {}).get("precision", "")
    if told != precision:
        at = f"at {told}" if told else "as trained alone"
        raise SystemExit(f"{place}: measured {at}, and --precision {precision} is asked. {CURE}")


def fitting(folder: Path, method: str, budget: str, precision: str) -> Path | None:
    """The file among ``folder`` of what a method found under a budget; None where no file says so."""
    own = f"{stem(method, precision)}-{slug(budget)}.json"
    plain = [folder / own, folder / f"{method}-{slug(budget)}.json", folder / f"{method}.json"]
    # Further budgets of a search have the name of its first one in front.
    every = [*plain, *sorted(folder.glob(f"{method}-*-{slug(budget)}.json"))]
    return next((p for p in every if p.exists() and found_under(p) == (slug(budget), precision)), None)


def names_of(method: str, budgets: Sequence[str], precision: str) -> list[str]:
    """The names that one search under these budgets gives its allocations; the first is ``search.name``."""
    if not budgets:
        return []
    first = f"{stem(method, precision)}-{slug(budgets[0])}"
    return [first, *(f"{first}-{slug(budget)}" for budget in budgets[1:])]


def stem(method: str, precision: str) -> str:
    """``utilities``, ``utilities-int8``: what the names of a method's allocations begin with."""
    return f"{method}-{precision}" if precision else method


def found_under(allocation: Path) -> tuple[str, str] | None:
    """Budget, as names hold it, and precision that an allocation's provenance tells; None where it tells no budget."""
    told = json.loads(allocation.read_text()).get("provenance", {})
    return (slug(str(told["budget"])), str(told.get("precision", ""))) if "budget" in told else None


def told_as(budget: str, precision: str) -> str:
    return f"{budget} at {precision}" if precision else budget


def tables_of(allocation: Path) -> Tables:
    """Widths, and the values that have rows where not all have."""
    body = json.loads(allocation.read_text())
    return body["widths"], body.get("values", {})
