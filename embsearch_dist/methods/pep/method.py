"""Learned thresholds, the entries and the columns that they leave under a budget, and both as a method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.methods.allocating import AllocateStage, BudgetOptions, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import COLUMN_BYTES, Budget
from embsearch_dist.methods.columns import best_columns, best_columns_under, check_one_column, cost_of
from embsearch_dist.methods.masked import MaskedStage, MaskedTask
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.methods.widest import blocks_of
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor

GRANULARITIES = ("field_dim", "field", "dim", "global")
REACH, BIN = 40.0, 0.01  # of the shift c that meets a budget


@dataclass
class PEPConfig(BudgetOptions):
    """PEP: thresholds on single entries, learned with the tables."""

    width: int = option(32, "width of every field of the model that is pruned", low=1)
    granularity: str = option(
        "field_dim", "a threshold for each: field_dim (field and column) | field | dim | global", choices=GRANULARITIES
    )
    start: float = option(-7.0, "s at the start; the threshold is sigmoid(s). -15 as published for MovieLens")
    lr: float = option(1e-2, "learning rate of s", above=0)
    keep: float = option(0.9, "without a budget: share of the summed column shares that is kept", above=0, high=1)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))

    @property
    def candidates(self) -> list[int]:
        """All widths that a choice of columns can give."""
        return list(range(self.width + 1))


class SoftThreshold(nn.Module):
    """``sign(v) * relu(|v| - sigmoid(s))`` of ``v [B, F, w]``."""

    def __init__(self, fields: int, width: int, granularity: str, start: float) -> None:
        super().__init__()
        rows, columns = "field" in granularity, "dim" in granularity
        self.s = nn.Parameter(torch.full((fields if rows else 1, width if columns else 1), start))
        self.shape = (fields, width)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return v.sign() * torch.relu(v.abs() - self.s.sigmoid())

    def per_entry(self) -> torch.Tensor:
        """s ``[F, w]``."""
        return self.s.detach().expand(self.shape)


class ThresholdTask(MaskedTask):
    """Trains tables, head and thresholds together; their mean is logged."""

    mask: SoftThreshold

    def after_step(self, step: int, monitor: Monitor) -> None:
        if step % self.run.config.search.training.log_every == 0:
            monitor.scalars(step, {"threshold": float(self.mask.s.detach().sigmoid().mean())})


class ThresholdStage(MaskedStage):
    """Trains the thresholds under ``checkpoints/thresholds``."""

    name = "thresholds"
    own = ("granularity", "start", "lr")

    def task(self, run: Run) -> MaskedTask:
        search: PEPConfig = run.config.search
        mask = SoftThreshold(len(run.schema.fields), search.width, search.granularity, search.start)
        return ThresholdTask(run, mask, self.settings(run), search.lr)


class Margins:
    """How many entries of each column stay when c is added to all s, for c in steps of :data:`BIN`.

    An entry stays while ``|v| > sigmoid(s + c)``, so while c is below its margin ``logit(|v|) - s``.
    """

    def __init__(self, schema: Schema, width: int) -> None:
        self.bins, self.schema = round(2 * REACH / BIN), schema
        self.counts = torch.zeros(len(schema.fields), width, self.bins, dtype=torch.float64)

    def add(self, v: torch.Tensor, s: torch.Tensor, counted: torch.Tensor) -> None:
        """Rows ``v [F, n, w]`` with ``s [F, w]``; ``counted [F, n]``: 0 for a row that is none."""
        size = v.abs().double().clamp(1e-30, 1 - 1e-15)
        margin = size.logit() - s.double()[:, None]
        place = ((margin + REACH) / BIN).floor().clamp(0, self.bins - 1).long().transpose(1, 2)
        weight = counted.double()[:, None].expand_as(place)
        self.counts.scatter_add_(2, place.cpu(), weight.cpu().contiguous())

    def kept(self, edge: int) -> torch.Tensor:
        """``[F, w]``: entries that stay at ``c = edge * BIN - REACH``, but for those of a margin in that very bin."""
        return self.counts[..., edge + 1 :].sum(2)

    def edge_of(self, c: float) -> int:
        return round((c + REACH) / BIN)

    def edge_under(self, most: float) -> int:
        """The lowest edge at which at most ``most`` entries stay; at least one does, where one can."""
        above = self.counts.sum((0, 1)).flip(0).cumsum(0).flip(0)  # [bins]: entries in this bin or a later one
        stays = torch.cat([above[1:], above.new_zeros(1)])
        fits = (stays <= most).nonzero()
        some = (stays > 0).nonzero()
        edge = int(fits[0]) if len(fits) else self.bins - 1
        return min(edge, int(some[-1])) if len(some) else edge


def entries_under(budget: Budget, schema: Schema, width: int, extra: int) -> float:
    """How many entries a budget holds: of parameters itself, of bytes what a bit for each entry leaves.

    ``extra``: columns of every table that no mask closes.
    """
    rows = sum(schema.cardinalities)
    each = COLUMN_BYTES.get(budget.resource)
    if each is None:
        return max(budget.limit - extra * rows, 1)
    return max((budget.limit - rows * math.ceil(width / 8)) / each - extra * rows, 1)


class ColumnStage(AllocateStage):
    """For each budget the mask that it holds, and the columns of which most is left."""

    name = "columns"

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: PEPConfig = run.config.search
        margins, extra = measure(run), run.config.model.extra
        rows = torch.tensor(run.schema.cardinalities, dtype=torch.float64)[:, None]
        learned = margins.edge_of(0.0)

        def find(budget: Budget | None) -> Chosen:
            most = entries_under(budget, run.schema, search.width, extra) if budget else math.inf
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
    for v, inside, _ in blocks_of(task.model, run.schema, run.context):
        found.add(v, s, inside)
    counts = found.counts.to(run.context.device)
    found.counts = run.context.sum(counts).cpu()
    return found


class PEP(Method):
    """PEP (Liu et al. 2021)."""

    config = PEPConfig
    planted = {
        "search": {"width": 8, "training": {"batch_size": 512, "eval_batch_size": 6000, "epochs": 6, "patience": 0}}
    }
    trial = {"search": {"width": 4, "pareto": ["60%"], "training": TRAINING}}

    def stages(self) -> list[Stage]:
        return [ThresholdStage(), ColumnStage()]

    def check(self, run: Run) -> None:
        check_one_column(budgets_of(run), run.schema, run.config.model.extra)
