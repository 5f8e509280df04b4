"""The values that a budget holds by their gates, as an allocation, and both as a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from embsearch_dist.allocation import cost
from embsearch_dist.errors import UserError
from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.masked import MaskedStage
from embsearch_dist.methods.optfs.config import OptFSConfig
from embsearch_dist.methods.optfs.gates import ValueGateTask
from embsearch_dist.methods.optfs.rewinding import rewind
from embsearch_dist.methods.retraining import Results, Retraining
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.methods.values import mask_told, values_of
from embsearch_dist.precision import SERVED
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor


class ValueGateStage(MaskedStage):
    """Trains the gates under ``checkpoints/gates``."""

    name = "gates"
    own = ("lr", "penalty", "tau", "rewind")

    def task(self, run: Run) -> ValueGateTask:
        return ValueGateTask(run, self.settings(run))


class Ranking:
    """All values but ids 0, by their w, the largest first; of equal ones the earlier field and the lower id.

    Args:
        w: of each field ``[cardinality]``, in schema order.
    """

    def __init__(self, w: Sequence[torch.Tensor]) -> None:
        self.sizes = [len(own) for own in w]
        flat = torch.cat([own[1:] for own in w])
        self.order = flat.argsort(descending=True, stable=True)
        self.learned = int((flat > 0).sum())
        self.field = torch.repeat_interleave(torch.arange(len(w)), torch.tensor([n - 1 for n in self.sizes]))

    def counts(self, kept: int) -> list[int]:
        """Rows of each field's table for the first ``kept`` values: these and row 0; none where it has none of them."""
        found = torch.bincount(self.field[self.order[:kept]], minlength=len(self.sizes))
        return [n + 1 if n else 0 for n in found.tolist()]

    def masks(self, kept: int) -> list[torch.Tensor]:
        """Of each field ``[cardinality]`` bool: the first ``kept`` values; ids 0 are not among them."""
        flat = torch.zeros(len(self.order), dtype=torch.bool)
        flat[self.order[:kept]] = True
        parts = flat.split([n - 1 for n in self.sizes])
        return [torch.cat([part.new_zeros(1), part]) for part in parts]


def cost_of_rows(schema: Schema, rows: Sequence[int], width: int, resource: str, extra: int) -> int:
    """What tables of so many rows and one width cost in one of ``allocation.RESOURCES``; bytes as served with a bit for
    each value of a field of which some but not all have rows."""
    found = 0
    for f, n in zip(schema.fields, rows, strict=True):
        found += cost(resource, n, width if n else 0, extra)
        found += -(-f.cardinality // 8) if resource in SERVED and 0 < n < f.cardinality else 0
    return found


def chosen_under(schema: Schema, ranking: Ranking, width: int, budget: Budget | None, extra: int) -> int:
    """How many values are kept: those with ``w > 0``, or of them as many as a budget holds; at least one, which
    :func:`check_one_value` has found room for."""
    most = max(ranking.learned, 1)
    if budget is None:
        return most
    return int((costs_of(schema, ranking, most, width, budget.resource, extra) <= budget.limit).nonzero()[-1])


def costs_of(schema: Schema, ranking: Ranking, most: int, width: int, resource: str, extra: int) -> torch.Tensor:
    """:func:`cost_of_rows` of the first 0, 1, ... ``most`` values, ``[most + 1]`` int64.

    As served it may fall: the last value of a field makes its bits needless. So no search by halves may look for the
    most that a budget holds.
    """
    field = ranking.field[ranking.order[:most]]
    by_field = field.argsort(stable=True)
    counts = torch.bincount(field, minlength=len(ranking.sizes))
    number = torch.empty_like(field)  # of each value among those of its field, from 1 on
    number[by_field] = torch.arange(1, most + 1) - (counts.cumsum(0) - counts)[field[by_field]]
    row, values = cost(resource, 1, width, extra), torch.tensor(ranking.sizes)
    bits = ((values + 7) // 8 if resource in SERVED else torch.zeros_like(values))[field]
    first, last = number == 1, number == values[field] - 1
    added = row + row * first + bits * first.int() - bits * last.int()  # the first one brings row 0 along
    return torch.cat([added.new_zeros(1), added.cumsum(0)])


def check_one_value(found: Sequence[tuple[str, Budget | None]], schema: Schema, width: int, extra: int) -> None:
    """Refuse budgets that may hold nothing: the best value may be any field's.

    Raises:
        UserError: a budget that does not hold one value of some field, its row 0 and its bits.
    """
    for budget in (b for _, b in found if b):
        for f in (f for f in schema.fields if f.cardinality > 1):
            alone = [2 * (g is f) for g in schema.fields]
            if cost_of_rows(schema, alone, width, budget.resource, extra) > budget.limit:
                raise UserError(
                    f"config key search.budget: {budget.text!r} does not hold a single value of field {f.name!r} "
                    f"({f.cardinality:,} values) at search.width {width}. Raise it, or lower the width"
                )


class ValuesStage(AllocateStage):
    """For each budget the values that it holds."""

    name = "values"

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: OptFSConfig = run.config.search
        task = ValueGateStage().trained(run)
        assert isinstance(task, ValueGateTask)
        w = task.model.weights_of_all()
        ranking, extra = Ranking([w[n] for n in run.schema.names]), run.config.model.extra
        total = len(ranking.order)

        def find(budget: Budget | None) -> Chosen:
            kept = chosen_under(run.schema, ranking, search.width, budget, extra)
            masks = ranking.masks(kept)
            widths = [search.width if bool(m.any()) else 0 for m in masks]
            values = {n: own for n, own in values_of(run.schema, masks).items() if own.rows > 1}
            told: dict[str, object] = {"kept_share": kept / total, "learned_share": ranking.learned / total}
            mask = told | mask_told(run.schema, widths, values, extra)
            return Chosen(widths, told, mask=mask, values=values)

        return find


class OptFS(Method):
    """OptFS (Lyu et al. 2023)."""

    config = OptFSConfig
    trial = {"search": {"width": 32, "pareto": ["30%"], "rewind": 1, "training": {**TRAINING, "epochs": 2}}}

    def stages(self) -> list[Stage]:
        return [ValueGateStage(), ValuesStage()]

    def check(self, run: Run) -> None:
        check_one_value(budgets_of(run), run.schema, run.config.search.width, run.config.model.extra)

    def retrain(self, job: Retraining) -> Results:
        own = job.found.provenance.get("method") == "optfs"
        if own and job.run.config.search.rewind and job.start is None:
            job = replace(job, begin=partial(rewind, job.run, job.run_dir))
        return super().retrain(job)
