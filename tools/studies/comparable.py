"""What may be compared at equal budgets, and how the two rules of ``truncation`` stand among it."""

from __future__ import annotations

import dataclasses
from typing import Any

from embsearch_dist.methods import METHODS
from embsearch_dist.methods.widest import WidestStage

USUAL = ("adass", "utilities", "fdo", "magnitude")
RULES = ("fdo", "magnitude")  # of the method truncation


def comparable() -> list[str]:
    """What may be compared: methods that find allocations for budgets, truncation by its rules."""
    fields = {n: {f.name for f in dataclasses.fields(m.config)} for n, m in METHODS.items()}
    found = [n for n, own in fields.items() if {"name", "budget", "pareto"} <= own and n != "truncation"]
    return [*USUAL, *(n for n in found if n not in USUAL)]


def cuts_widest(method: str) -> bool:
    """Whether its search begins with the widest model, which such searches can share."""
    return any(isinstance(s, WidestStage) for s in METHODS["truncation" if method in RULES else method]().stages())


def rule_section(rule: str, width: int) -> dict[str, Any]:
    """The ``search`` section of a rule of ``truncation``. A row of a table counts as often as it is looked up where
    that makes the stronger baseline."""
    return {"rule": rule, "width": width, "weighted": rule == "magnitude"}
