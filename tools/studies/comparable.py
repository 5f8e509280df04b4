"""What may be compared at equal budgets, and how the two rules of ``truncation`` stand among it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embsearch_dist.config.read import written
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.widest import WidestStage

USUAL = ("adass", "utilities", "fdo", "magnitude")
RULES = ("fdo", "magnitude")  # of the method truncation
AUTO = "auto"
WIDEST = 32  # of the model that utilities and baselines cut down, unless a candidate is wider


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


def section_of(config: Path, body: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Keys of a method's ``search`` section that are not its defaults, in a comparison by the recipe of a config.

    Args:
        body: what ``config`` says.
    """
    candidates = body.get("search", {}).get("candidates", [0, 2, 4, 8, 16, 32])
    width = max(WIDEST, *candidates)
    if method in ("utilities", AUTO):
        return {"candidates": candidates, "width": width}
    if method in RULES:
        return rule_section(method, width)
    search = dict(neighbour(config, body, method).get("search", {}))
    options = {f.name for f in dataclasses.fields(METHODS[method].config)}
    if "training" in options:
        # As long as the training of what is found, unless the method's own config says otherwise.
        recipe = body.get("train", {})
        usual = {k: recipe[k] for k in ("batch_size", "epochs") if k in recipe}
        search["training"] = {**usual, "patience": 0, **search.get("training", {})}
    return search | ({"width": width} if cuts_widest(method) else {})


def neighbour(config: Path, body: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What the config of a method in the folder of ``config`` says; nothing where there is none."""
    bodies = [written(p) for p in sorted(config.parent.glob(f"{method}_*.yaml"))]
    bodies = [b for b in bodies if b.get("method") == method]
    backbone = body.get("model", {}).get("backbone")
    alike = [b for b in bodies if b.get("model", {}).get("backbone") == backbone]
    return (alike or bodies or [{}])[0]
