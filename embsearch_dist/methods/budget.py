"""Hard budgets: what a user writes, and the allocation that obeys it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from embsearch_dist.allocation import REFERENCE_WIDTH, Allocation, cost
from embsearch_dist.errors import UserError
from embsearch_dist.precision import MIXED, SERVED, served
from embsearch_dist.schema import Schema

RETRIES = 20  # of the knapsack's solver, whose tolerance may let a choice pass that is a little too expensive
SMALL = 1e-2  # scores below it are made larger for the solver
COLUMN_BYTES = dict(zip(SERVED, (4, 2, 1, 0.5, 1), strict=True)) | {"bytes": 4}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """At most ``limit`` of ``resource`` (parameters, physical bytes, or bytes as served) in all tables together."""

    resource: str
    limit: int
    text: str


def parse_budget(text: str, schema: Schema, key: str = "search.budget", extra: int = 0, precision: str = "") -> Budget:
    """``'200000'`` parameters, ``'1.5MB'`` of tables, ``'80%'`` of UES-32, ``'ues-12'``: what that width takes.

    Args:
        extra: columns of every table beside its width, those of uniform widths too.
        precision: all forms but the first count bytes of tables that are served at it; empty: percents and uniform
            widths count parameters, and bytes are those of training.

    Raises:
        UserError: not of one of these forms, or not above 0.
    """
    unit_of = served(precision) if precision else "parameters"
    uniform = re.fullmatch(r"\s*ues-([1-9][0-9]{0,5})\s*", text, re.IGNORECASE)
    if uniform:
        return Budget(unit_of, Allocation.uniform(schema, int(uniform.group(1))).counted(extra).total(unit_of), text)
    match = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*(?:e[0-9]{1,2})?)\s*([A-Za-z%]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    if match is None or (unit not in UNITS and unit not in ("", "%")):
        forms = "200000 (parameters), 1.5MB, 80% (of UES-32) or ues-12 (as much as that width takes)"
        raise UserError(f"config key {key}: {text!r} is not a budget; write {forms}")
    # In floats 29% of 800 parameters are 231.99..., and a budget that just holds a result would refuse it.
    number = Fraction(match.group(1).replace("_", ""))
    if number <= 0:
        raise UserError(f"config key {key}: a budget must be above 0, got {text!r}")
    if unit == "%":
        reference = Allocation.uniform(schema, REFERENCE_WIDTH).counted(extra)
        return Budget(unit_of, int(number / 100 * reference.total(unit_of)), text)
    if unit:
        return Budget(unit_of if precision else "bytes", int(number * UNITS[unit]), text)
    return Budget("parameters", int(number), text)


def cost_table(schema: Schema, candidates: Sequence[int], resource: str, extra: int = 0) -> torch.Tensor:
    """``[F, T]`` float64: cost of each candidate of each field, with ``extra`` columns beside a width above 0."""
    rows = [[cost(resource, f.cardinality, d, extra) for d in candidates] for f in schema.fields]
    return torch.tensor(rows, dtype=torch.float64)


def total_cost(choice: Sequence[int], costs: torch.Tensor) -> float:
    """Cost of one subnet under ``costs [F, T]``."""
    return float(costs.gather(1, torch.as_tensor(choice).view(-1, 1)).sum(dtype=torch.float64))


def relative_costs(schema: Schema, candidates: Sequence[int], resource: str, extra: int = 0) -> torch.Tensor:
    """Costs for Eq. 9 on the scale of the printed widths: divided by what one column of a field of mean
    cardinality costs, so that lambda_r keeps its meaning whatever the resource."""
    costs = cost_table(schema, candidates, resource, extra)
    if resource == "widths":
        return costs.float()
    per_column = sum(schema.cardinalities) / len(schema.fields) * COLUMN_BYTES.get(resource, 1)
    return (costs / per_column).float()


def check_feasible(
    budget: Budget,
    schema: Schema,
    candidates: Sequence[int],
    key: str = "search.budget",
    extra: int = 0,
    groups: int = 1,
    precisions: bool = False,
) -> None:
    """Raise ``UserError`` when even the narrowest allocation is too large, of each of ``groups`` of rows that have
    tables of their own.

    ``precisions``: the search may give a field int4. Others leave all tables at int8 where the budget counts mixed
    precisions.
    """
    costs = cost_table(schema, candidates, budget.resource, extra)
    if precisions and budget.resource == served(MIXED):
        costs = costs.minimum(cost_table(schema, candidates, served("int4"), extra))
    least = int(costs.min(1).values.sum())
    if not any(candidates[:1]):
        # All-dropped is no model: the cheapest field must get its narrowest real width.
        least += int(costs[:, 1].min())
    least *= groups
    if least > budget.limit:
        told = f"{groups} groups of rows" if groups > 1 else "this data set"
        raise UserError(
            f"config key {key}: {budget.text!r} is {budget.limit:,} {budget.resource}, but the narrowest allocation "
            f"of {told} needs {least:,} {budget.resource}. Raise the budget to at least that, "
            f"or give search.candidates a narrower first width (0 drops fields)"
        )


def knapsack(scores: torch.Tensor, costs: torch.Tensor, limit: float, groups: int = 1) -> list[int]:
    """Exact multiple-choice knapsack: one candidate per field, cost at most ``limit``, highest score sum.

    Args:
        scores: ``[F, T]``, e.g. log-probabilities of the policy; -inf for a candidate that must not be chosen.
        costs: ``[F, T]``.
        groups: of several, F counts the fields of each, group by group, and each keeps a field that costs something;
            of one alone that is not asked.

    Raises:
        ValueError: no choice fits.
    """
    # Half a second to load, which every start of every script would pay.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    fields, candidates = scores.shape
    variables = fields * candidates
    open_ = torch.isfinite(scores).numpy().ravel()
    scores = scores.double().nan_to_num(neginf=0.0)
    largest = float(scores.abs().max())
    if 0 < largest < SMALL:  # the solver stops within 1e-6 of the best sum, which would be no choice at all
        scores = scores / largest
    scale = max(float(costs.max()), 1.0)  # the solver's tolerances are absolute
    of_field = np.repeat(np.arange(fields), candidates)
    one_each = csr_array((np.ones(variables), (of_field, np.arange(variables))), shape=(fields, variables))
    weight = costs.numpy().reshape(1, -1) / scale
    # Half a unit more lets no choice of whole costs pass, and keeps one that costs just the limit from being lost to
    # rounding.
    whole = math.isfinite(limit) and bool((costs == costs.round()).all())
    room = math.floor(limit) + 0.5 if whole else limit
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(weight, -np.inf, room / scale)]
    if groups > 1:
        of_group = np.repeat(np.arange(groups), variables // groups)
        constraints.append(LinearConstraint((of_group == np.arange(groups)[:, None]) * (weight > 0), 1, np.inf))
    for _ in range(RETRIES):
        result = milp(
            -scores.numpy().ravel(),
            constraints=constraints,
            bounds=Bounds(0, open_.astype(float)),
            integrality=np.ones(variables),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise ValueError(f"no choice costs at most {limit}")
        choice = result.x.reshape(fields, candidates).argmax(1).tolist()
        if total_cost(choice, costs) <= limit:
            break
        # Too expensive by less than the solver's tolerance: forbid just this choice.
        taken = np.zeros((1, variables))
        taken[0, np.arange(fields) * candidates + choice] = 1
        constraints.append(LinearConstraint(taken, -np.inf, fields - 1))
    return _repair(choice, scores, costs, limit, open_.reshape(fields, candidates))


def _repair(choice: list[int], scores: torch.Tensor, costs: torch.Tensor, limit: float, open_: np.ndarray) -> list[int]:
    """The solver works in floating point; the budget holds in exact integers all the same."""
    while total_cost(choice, costs) > limit:
        moves = [
            (float(scores[f, j] - scores[f, k]), f, k)
            for f, j in enumerate(choice)
            for k in range(scores.shape[1])
            if open_[f, k] and costs[f, k] < costs[f, j]
        ]
        if not moves:
            raise ValueError(f"no choice costs at most {limit}")
        _, field, candidate = min(moves)
        choice[field] = candidate
    return choice
