"""The supernet of random prefixes, the scores that evolution asks of it, and both as a method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from embsearch_dist.allocation import cost as cost_of_table
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.columns import Cost, cost_of
from embsearch_dist.methods.masked import MaskedModel, MaskedStage, MaskedTask
from embsearch_dist.methods.noise import uniform_noise
from embsearch_dist.methods.optembed.config import OptEmbedConfig
from embsearch_dist.methods.optembed.evolution import Evolution, Widths
from embsearch_dist.methods.optembed.rows import RowThreshold, kept_rows
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import PLANTED_TRAINING, TRAINING
from embsearch_dist.methods.values import cost_of_values, mask_told, paying_values, values_of
from embsearch_dist.methods.widest import Sample, logits_of, sample_of, unified
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.metrics import score
from embsearch_dist.train.monitor import Monitor

PIECE_ROWS = 8192


class Prefix(nn.Module):
    """Closes the columns of ``[B, F, d]`` behind ``widths [B, F]`` (or ``[F]``); all are open while it is None.

    ``rows``: closes whole rows first, by their size over all columns.
    """

    def __init__(self, rows: RowThreshold | None = None) -> None:
        super().__init__()
        self.rows = rows
        self.widths: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.rows is None else self.rows(x)
        return x if self.widths is None else closed(x, self.widths)

    @contextmanager
    def cut(self, widths: torch.Tensor) -> Iterator[None]:
        """Inside, columns behind ``widths`` are closed."""
        self.widths = widths
        try:
            yield
        finally:
            self.widths = None


def closed(x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """``x [..., d]`` with zeros from column ``widths [...]`` on."""
    return x * (torch.arange(x.shape[-1], device=x.device) < widths[..., None])


class PrefixTask(MaskedTask):
    """Every row and field draws a width in every step: the same for any number of ranks on CPU."""

    mask: Prefix

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        with self.mask.cut(self.drawn(batch.size, step)):
            loss = super().loss(batch, step)
        return loss if self.mask.rows is None else loss + self.run.config.search.alpha * self.mask.rows.push()

    def after_step(self, step: int, monitor: Monitor) -> None:
        search = self.run.config.search
        if self.mask.rows is not None and step % search.training.log_every == 0:
            monitor.scalars(step, {"threshold": float(self.mask.rows.t.detach().mean())})

    def drawn(self, rows: int, step: int) -> torch.Tensor:
        """Widths ``[rows, F]`` of this rank's rows of a step, uniform on the candidates."""
        search, context, fields = self.run.config.search, self.run.context, len(self.run.schema.fields)
        first = context.rank * search.training.batch_size // context.world_size
        even = fields + fields % 2
        uniform = uniform_noise(self.run.config.run.seed, step, first, (rows, even), context.device)[:, :fields]
        least, most = search.candidates[0], search.width
        return (least + (uniform * (most - least + 1)).floor()).clamp(max=most)


class PrefixStage(MaskedStage):
    """Trains the supernet under ``checkpoints/prefixes``; figures shown are those of all columns."""

    name = "prefixes"
    own = ("drop",)

    def settings(self, run: Run) -> dict[str, Any]:
        search: OptEmbedConfig = run.config.search
        rows = {"search.threshold_lr": search.threshold_lr, "search.alpha": search.alpha, "search.thresholds": True}
        return super().settings(run) | (rows if search.thresholds else {})

    def task(self, run: Run) -> PrefixTask:
        search: OptEmbedConfig = run.config.search
        rows = RowThreshold(len(run.schema.fields)) if search.thresholds else None
        return PrefixTask(run, Prefix(rows), self.settings(run), search.threshold_lr)


@torch.no_grad()
def measured(model: MaskedModel, sample: Sample, widths: Widths, context: Context) -> dict[str, float]:
    """AUC and logloss of the supernet's weights with field f cut to ``widths[f]``, over the rows of all ranks.

    What the values of a dropped field weigh by themselves (``model.first_order value``) is dropped with it.
    """
    kept, parts, head = torch.tensor(widths, device=context.device), [], model.bare_head
    mask = model.mask
    assert isinstance(mask, Prefix)
    with mask.cut(kept):
        for piece in sample.pieces(PIECE_ROWS):
            values = piece.values * (kept > 0) if piece.values.shape[1] else piece.values
            parts.append(logits_of(head, unified(head, piece.x), piece.dense, values).float())
    logits, labels = context.gather(torch.cat(parts)), context.gather(sample.label)
    return score(logits.cpu(), labels.cpu())


def cost_of_kept(schema: Schema, values: Mapping[str, KeptValues], resource: str, extra: int) -> Cost:
    """The cost of widths for tables that have rows for some values alone; see :func:`paying_values`: never more than
    with all rows, so a budget that holds the narrowest whole tables holds these."""
    if not values:
        return cost_of(schema, resource, extra)

    def cost(widths: Sequence[int]) -> float:
        found = 0
        for f, width in zip(schema.fields, widths, strict=True):
            whole = cost_of_table(resource, f.cardinality, width, extra)
            kept = values.get(f.name)
            found += whole if kept is None else min(whole, cost_of_values(kept, width, resource, extra))
        return float(found)

    return cost


class EvolveStage(AllocateStage):
    """An evolution for each budget."""

    name = "evolution"

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: OptEmbedConfig = run.config.search
        task, fields = PrefixStage().trained(run), len(run.schema.fields)
        assert isinstance(task, PrefixTask)
        model, extra, rows = task.model, run.config.model.extra, task.mask.rows
        sample = sample_of(run, model, "validation", search.rows)
        values = values_of(run.schema, kept_rows(model, run.schema, rows, search.width)) if rows is not None else {}

        def fitness(widths: Widths) -> float:
            found = measured(model, sample, widths, run.context)
            # Rows of one class have no AUC. Ranks gather the same figures; rank 0 decides all the same.
            value = -found["logloss"] if math.isnan(found["auc"]) else found["auc"]
            return float(run.context.share(value))

        def find(budget: Budget | None) -> Chosen:
            resource = budget.resource if budget else "parameters"
            cost = cost_of_kept(run.schema, values, resource, extra)
            limit = budget.limit if budget else math.inf
            seed = [run.config.run.seed, budget.limit if budget else 0]
            least = search.candidates[0]
            evolution = Evolution(search.evolution, fields, least, search.width, cost, limit, fitness, seed)
            best = evolution.run()
            told: dict[str, object] = {"candidates_scored": len(evolution.scored)}
            paying = paying_values(run.schema, best, values, resource, extra)
            mask = mask_told(run.schema, best, paying, extra) if rows is not None else {}
            return Chosen(best, told, measured(model, sample, best, run.context), mask, paying)

        return find


class OptEmbed(Method):
    """OptEmbed (Lyu et al. 2022): widths, and where asked for the values that keep a row."""

    config = OptEmbedConfig
    planted = {
        "search": {
            "width": 8,
            "rows": 6000,
            "training": PLANTED_TRAINING,
            "evolution": {"generations": 6, "mutations": 10, "crossovers": 10, "keep": 5},
        }
    }
    trial = {
        "search": {
            "width": 4,
            "pareto": ["60%"],
            "rows": 300,
            "thresholds": True,
            "threshold_lr": 0.05,
            "training": TRAINING,
            "evolution": {"generations": 2, "mutations": 3, "crossovers": 3, "keep": 3},
        }
    }

    def stages(self) -> list[Stage]:
        return [PrefixStage(), EvolveStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)
