"""What searches that end with widths have in common: the stage that spends their budgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from embsearch_dist.allocation import Allocation
from embsearch_dist.files import write_sealed
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.found import Point, budget_told, budgets, describe, write_allocations, write_points
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


@dataclass(frozen=True)
class Chosen:
    """What a method has found for one budget.

    Attributes:
        widths: per field, in schema order.
        told: what the allocation's provenance says beside method, name, seed and budget.
        metrics: ``auc`` and ``logloss`` that the search has measured for these widths; none where it measures nothing.
        mask: of a method that prunes entries or values: what its mask keeps, left in ``search/mask-NAME.json``.
        values: of a method that keeps single values: those of each field of which not all are kept.
    """

    widths: Sequence[int]
    told: dict[str, object] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    mask: dict[str, object] = field(default_factory=dict)
    values: dict[str, KeptValues] = field(default_factory=dict)


Finder = Callable[[Budget | None], Chosen]
"""Widths for a budget, or without one."""


class AllocateStage(Stage):
    """Widths for ``search.budget`` and each of ``search.pareto``: ``allocations/NAME.json`` and ``allocation.json``."""

    name = "allocate"
    repeatable = True

    @abstractmethod
    def finder(self, run: Run, monitor: Monitor) -> Finder:
        """Read what the stages before have left. Called, as what it returns, on every rank."""

    def run(self, run: Run) -> None:
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.resume_at(-1)
            find = self.finder(run, monitor)
            wanted = budgets_of(run)
            chosen = [find(budget) for _, budget in wanted]
            points = [_point(run, name, budget, c) for (name, budget), c in zip(wanted, chosen, strict=True)]

            def write() -> None:
                for point, c in zip(points, chosen, strict=True):
                    if c.mask:
                        write_sealed(run.dir / "search" / f"mask-{point.name}.json", c.mask)
                (write_points if points[0].metrics else write_allocations)(run.dir, points)

            run.context.first("writing the allocations", write)
            monitor.say(describe(points[0], run.dir))


def budgets_of(run: Run) -> list[tuple[str, Budget | None]]:
    """(allocation name, budget) of every search of a run whose section is :class:`BudgetOptions`.

    Raises:
        UserError: a budget that no allocation of the candidates can obey.
    """
    search = run.config.search
    return budgets(search, search.name or run.config.method, run.schema, run.config.model.extra)


def _point(run: Run, name: str, budget: Budget | None, chosen: Chosen) -> Point:
    told: dict[str, object] = {"method": run.config.method, "name": name, "seed": run.config.run.seed, **chosen.told}
    told |= budget_told(budget, run.config.search.precision)
    told |= {f"searched_{k}": chosen.metrics[k] for k in ("auc", "logloss") if k in chosen.metrics}
    # Ranks may round equal sums otherwise: rank 0 decides.
    widths = dict(zip(run.schema.names, run.context.share(list(chosen.widths)), strict=True))
    allocation = Allocation(run.schema, widths, told, run.config.model.extra, values=chosen.values)
    scored = [(allocation.total("parameters"), chosen.metrics["auc"])] if chosen.metrics else []
    return Point(name, allocation, chosen.metrics, budget.limit if budget else None, scored)
