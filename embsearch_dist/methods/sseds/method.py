"""Saliency of the columns of the widest model, the widths that a budget buys of them, and both as a method."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.errors import UserError
from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.columns import best_columns, best_columns_under, check_one_column, cost_of
from embsearch_dist.methods.directions import columns_by
from embsearch_dist.methods.sseds.config import SSEDSConfig
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.truncated import TruncatedModel
from embsearch_dist.methods.widest import (
    Moments,
    Sample,
    WidestStage,
    first_rows,
    head_gradients,
    load_widest,
    random_rows,
    rows_at_once,
    sample_of,
)
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


def saliencies(model: SubnetModel, samples: Iterable[Sample], context: Context) -> torch.Tensor:
    """``[F, w]`` float64: mean over batches of ``|dL_b / d alpha|``, L_b the mean loss of a batch's rows on all ranks.

    Args:
        samples: this rank's share of each batch; the same number of batches on every rank.
    """
    total, count = torch.zeros(1), 0
    for sample in samples:
        g = head_gradients(model, sample, lambda z, y: binary_cross_entropy_with_logits(z, y, reduction="sum"))
        of_mask = (g * sample.x).sum(1, dtype=torch.float64)
        rows = torch.full((1, 1), float(len(sample.label)), dtype=torch.float64, device=of_mask.device)
        total = total.to(of_mask) + (context.sum(of_mask) / context.sum(rows)).abs()
        count += 1
    return (total / count).cpu()


def check_told(scores: torch.Tensor) -> None:
    """
    Raises:
        UserError: the saliencies ``[F, w]`` say nothing: all are 0, as behind a head whose units are all shut, or one
            is no number.
    """
    if not bool(scores.any()) or not bool(scores.isfinite().all()):
        what = "are all 0" if bool(scores.isfinite().all()) else "are not all numbers"
        raise UserError(
            f"the saliencies of the widest model's columns {what}, so none can be chosen by them. Train it with lower "
            "learning rates (optim.embedding_lr, optim.dense_lr), in another --run.dir",
            everywhere=True,
        )


class SaliencyStage(AllocateStage):
    """Take the gradients, order the columns, and cut for each budget."""

    name = "saliency"

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: SSEDSConfig = run.config.search
        model, context, extra = load_widest(run).model, run.context, run.config.model.extra
        count = search.batch_size * search.batches
        stream = random_rows(run, "train", count, run.config.run.seed * 7919, search.batch_size)
        samples = (Sample.of(model, iter([batch]), context.device) for batch in first_rows(stream, count))
        found = saliencies(model, samples, context)
        check_told(found)
        columns = [str(k) for k in range(search.width)]
        monitor.heatmap(0, "saliency", (found / found.max()).numpy(), run.schema.names, columns)
        scores = found
        if search.order == "density":
            scores = found / torch.tensor(run.schema.cardinalities, dtype=found.dtype)[:, None]
        shown = sample_of(run, model, "validation", search.rows)
        moments = Moments(len(scores), search.width, context.device)
        for piece in shown.pieces(rows_at_once(len(scores), search.width)):
            moments.add(piece.x)
        bases = columns_by(scores.to(context.device), moments.sum(context).mean)
        truncated = TruncatedModel(model, shown, bases, context)

        def find(budget: Budget | None) -> Chosen:
            if budget:
                cost = cost_of(run.schema, budget.resource, extra)
                widths, kept = best_columns_under(scores, cost, budget.limit, found)
            else:
                widths, kept = best_columns(scores, search.keep, found), search.keep
            return Chosen(widths, {"order": search.order, "kept": round(kept, 6)}, truncated.metrics(widths))

        return find


class SSEDS(Method):
    """Single-shot embedding dimension search (Qu et al. 2022)."""

    config = SSEDSConfig
    planted = {"search": {"width": 8, "rows": 6000, "batches": 40, "batch_size": 512}}
    trial = {"search": {"width": 4, "pareto": ["60%"], "rows": 300, "batches": 4, "batch_size": 128}}

    def stages(self) -> list[Stage]:
        return [WidestStage(), SaliencyStage()]

    def check(self, run: Run) -> None:
        check_one_column(budgets_of(run), run.schema, run.config.model.extra)
