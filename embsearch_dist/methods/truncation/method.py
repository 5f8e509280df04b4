"""FDO and magnitude pruning as a method: the widest model, then a rule."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.columns import best_columns, best_columns_under, check_one_column, cost_of
from embsearch_dist.methods.directions import by_columns, principal
from embsearch_dist.methods.found import Point, budget_told, budgets, describe, write_points
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.truncated import TruncatedModel
from embsearch_dist.methods.truncation.config import TruncationConfig
from embsearch_dist.methods.truncation.rules import fdo_under, fdo_widths
from embsearch_dist.methods.widest import (
    Moments,
    WidestStage,
    load_widest,
    rows_at_once,
    sample_of,
    table_moments,
)
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor


class TruncateStage(Stage[TruncationConfig]):
    """Cut the widest model down, once for ``allocation.json`` and once more for each Pareto budget."""

    name = "truncation"
    repeatable = True

    def run(self, run: Run[TruncationConfig]) -> None:
        config, context = run.config.search, run.context
        wanted = budgets_of(config, run.schema, run.config.model.extra)
        model, magnitude = load_widest(run).model, config.rule == "magnitude"
        with Monitor(run.dir, self.name, context.rank) as monitor:
            with monitor.progress(max(run.schema.cardinalities), "rows of the longest table") as bar:
                moments = _moments(run, model, bar.update)
            bases = by_columns(moments) if magnitude else principal(moments)
            truncated = TruncatedModel(model, sample_of(run, model, "validation", config.rows), bases, context)
            scores = _scores(moments, magnitude).cpu()
            points = []
            for name, budget in wanted:
                widths, kept = _widths(config, scores, run.schema, budget, run.config.model.extra)
                points.append(_point(run, truncated, name, budget, context.share(widths), kept))
            context.first("writing the allocations", lambda: write_points(run.dir, points))
            monitor.say(describe(points[0], run.dir))


class Truncation(Method):
    """The baselines of every comparison of widths: FDO and magnitude pruning."""

    config = TruncationConfig
    planted = {"search": {"rule": "magnitude", "width": 8}}
    trial = {"search": {"width": 4, "pareto": ["60%"], "rows": 300}}

    def stages(self) -> list[Stage]:
        return [WidestStage(), TruncateStage()]

    def check(self, run: Run) -> None:
        budgets_of(run.config.search, run.schema, run.config.model.extra)


def budgets_of(config: TruncationConfig, schema: Schema, extra: int) -> list[tuple[str, Budget | None]]:
    """The searches of this stage. Raises ``UserError`` for a budget below the rule's smallest allocation."""
    found = budgets(config, config.result, schema, extra)
    if config.rule == "magnitude":
        check_one_column(found, schema, extra)
    return found


def _moments(run: Run[TruncationConfig], model: SubnetModel, tick: Callable[[int], None]) -> Moments:
    config = run.config.search
    if not config.weighted:
        return table_moments(model, run.schema, run.context, tick)
    found = Moments(len(run.schema.fields), config.width, run.context.device)
    for piece in sample_of(run, model, "train", config.rows).pieces(rows_at_once(len(found.count), config.width)):
        found.add(piece.x)
    tick(max(run.schema.cardinalities))
    return found.sum(run.context)


def _scores(moments: Moments, magnitude: bool) -> torch.Tensor:
    """``[F, w]``: mean square of each column as it lies, or variance along each principal component, falling."""
    if magnitude:
        return moments.second.diagonal(dim1=1, dim2=2) / moments.count[:, None]
    return torch.linalg.eigvalsh(moments.covariance).flip(1)


def _widths(
    config: TruncationConfig, scores: torch.Tensor, schema: Schema, budget: Budget | None, extra: int
) -> tuple[list[int], float]:
    if budget is None:
        rule = best_columns if config.rule == "magnitude" else fdo_widths
        return rule(scores, config.keep), config.keep
    under = best_columns_under if config.rule == "magnitude" else fdo_under
    return under(scores, cost_of(schema, budget.resource, extra), budget.limit)


def _point(
    run: Run[TruncationConfig],
    truncated: TruncatedModel,
    name: str,
    budget: Budget | None,
    widths: list[int],
    kept: float,
) -> Point:
    config = run.config.search
    metrics = truncated.metrics(widths)
    provenance: dict[str, object] = {
        "method": config.rule,
        "name": name,
        "seed": run.config.run.seed,
        "kept": round(kept, 6),
        **budget_told(budget, config.precision),
        **{f"truncated_{k}": metrics[k] for k in ("auc", "logloss")},
    }
    allocation = Allocation(
        run.schema, dict(zip(run.schema.names, widths, strict=True)), provenance, run.config.model.extra
    )
    size = allocation.total("parameters")
    return Point(name, allocation, metrics, budget.limit if budget else None, [(size, metrics["auc"])])
