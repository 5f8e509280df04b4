"""The entries and the columns that thresholds leave under a budget, and PEP as a method."""

from __future__ import annotations

import math

import torch

from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import COLUMN_BYTES, Budget
from embsearch_dist.methods.columns import best_columns, best_columns_under, check_one_column, cost_of
from embsearch_dist.methods.pep.config import PEPConfig
from embsearch_dist.methods.pep.margins import BIN, REACH, Margins, edge_of
from embsearch_dist.methods.pep.thresholds import ThresholdStage, ThresholdTask
from embsearch_dist.methods.pep.tickets import TicketStage
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import PLANTED_TRAINING, TRAINING
from embsearch_dist.methods.widest import blocks_of
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor


def entries_under(budget: Budget, schema: Schema, width: int, extra: int) -> float:
    """How many entries a budget holds: of parameters itself, of bytes what a bit for each entry leaves. Below 1 where
    no mask obeys it.

    ``extra``: columns of every table that no mask closes.
    """
    rows = sum(schema.cardinalities)
    each = COLUMN_BYTES.get(budget.resource)
    if each is None:
        return budget.limit - extra * rows
    return (budget.limit - rows * math.ceil(width / 8)) / each - extra * rows


class ColumnStage(AllocateStage):
    """For each budget the mask that it holds, and the columns of which most is left."""

    name = "columns"

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: PEPConfig = run.config.search
        margins, extra = measure(run), run.config.model.extra
        rows = torch.tensor(run.schema.cardinalities, dtype=torch.float64)[:, None]
        learned = edge_of(0.0)

        def find(budget: Budget | None) -> Chosen:
            most = entries_under(budget, run.schema, search.width, extra) if budget else math.inf
            over = most < 1
            if budget and over:
                # Widths have neither bits nor closed columns: they are read off as many entries as the budget has
                # room for, since those of a mask of next to nothing would be chance.
                most = max(budget.limit / COLUMN_BYTES.get(budget.resource, 1), 1)
                monitor.say(
                    f"note: what no mask closes, or a bit for each entry, takes more than {budget.text} by itself; "
                    "the mask of this budget breaks it, the widths hold it"
                )
            edge = margins.edge_under(most) if budget else learned
            kept = margins.kept(edge)
            share = kept / rows
            if budget:
                widths, _ = best_columns_under(share, cost_of(run.schema, budget.resource, extra), budget.limit)
            else:
                widths = best_columns(share, search.keep)
            own = [min(w, int((column > 0).sum())) for w, column in zip(widths, share, strict=True)]
            told: dict[str, object] = {
                "mask_share": float(kept.sum() / (rows.sum() * search.width)),
                "learned_share": float(margins.kept(learned).sum() / (rows.sum() * search.width)),
            }
            if over:
                told["mask_over_budget"] = True
            mask = told | mask_told(run.schema, kept) | {"shift": round(edge * BIN - REACH, 4)}
            return Chosen(own if any(own) else widths, told, mask=mask)

        return find


def mask_told(schema: Schema, kept: torch.Tensor) -> dict[str, object]:
    """How many entries a mask keeps, ``kept [F, w]`` of each column, and the bytes of a bit an entry and its values."""
    count, width = int(kept.sum()), kept.shape[1]
    bits = sum(schema.cardinalities) * math.ceil(width / 8)
    return {
        "entries": count,
        "of": sum(schema.cardinalities) * width,
        "by_column": {n: [int(k) for k in row] for n, row in zip(schema.names, kept.tolist(), strict=True)},
        "served_bytes": {"fp32": bits + 4 * count, "fp16": bits + 2 * count},
    }


def measure(run: Run) -> Margins:
    """The margins of all rows of all tables of the finished training, the same on every rank."""
    task = ThresholdStage().trained(run)
    assert isinstance(task, ThresholdTask)
    found, s = Margins(run.schema, run.config.search.width), task.mask.per_entry()
    for v, inside, _, _ in blocks_of(task.model.tables, run.schema, run.context):
        found.add(v, s, inside)
    counts = found.counts.to(run.context.device)
    found.counts = run.context.sum(counts).cpu()
    return found


class PEP(Method):
    """PEP (Liu et al. 2021)."""

    config = PEPConfig
    planted = {"search": {"width": 8, "training": PLANTED_TRAINING}}
    trial = {"search": {"width": 4, "tickets": True, "training": TRAINING}}

    def stages(self) -> list[Stage]:
        return [ThresholdStage(), ColumnStage(), TicketStage()]

    def check(self, run: Run) -> None:
        check_one_column(budgets_of(run), run.schema, run.config.model.extra)
