"""FDO and magnitude pruning as a method: the widest model, then a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from embsearch_dist.allocation import Allocation, cost
from embsearch_dist.errors import UserError
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.found import Point, budget_told, budgets, describe, write_points
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.truncated import TruncatedModel, by_columns, principal
from embsearch_dist.methods.truncation.config import TruncationConfig
from embsearch_dist.methods.truncation.rules import fdo_under, fdo_widths, magnitude_under, magnitude_widths
from embsearch_dist.methods.widest import (
    Moments,
    Sample,
    WidestStage,
    first_rows,
    load_widest,
    random_rows,
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
            truncated = TruncatedModel(model, _rows(run, model, "validation"), bases, context)
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
        for _, budget in found:
            # The largest column may be any field's; below this the one that comes first may not fit.
            dearest = max(schema.cardinalities)
            if budget and cost(budget.resource, dearest, 1, extra) > budget.limit:
                raise UserError(
                    f"config key search.budget: {budget.text!r} does not hold one column of the largest field "
                    f"({dearest:,} values), so magnitude pruning may find nothing. Raise it"
                )
    return found


def _rows(run: Run, model: SubnetModel, split: str) -> Sample:
    rows = run.config.search.rows
    stream = random_rows(run, split, rows, run.config.run.seed * 7919)
    return Sample.of(model, first_rows(stream, rows), run.context.device)


def _moments(run: Run[TruncationConfig], model: SubnetModel, tick: Callable[[int], None]) -> Moments:
    config = run.config.search
    if not config.weighted:
        return table_moments(model, run.schema, run.context, tick)
    found = Moments(len(run.schema.fields), config.width, run.context.device)
    for piece in _rows(run, model, "train").pieces(8192):
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
        rule = magnitude_widths if config.rule == "magnitude" else fdo_widths
        return rule(scores, config.keep), config.keep
    under = magnitude_under if config.rule == "magnitude" else fdo_under
    return under(scores, partial(_cost, schema, budget.resource, extra), budget.limit)


def _cost(schema: Schema, resource: str, extra: int, widths: Sequence[int]) -> float:
    return float(sum(cost(resource, f.cardinality, w, extra) for f, w in zip(schema.fields, widths, strict=True)))


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
