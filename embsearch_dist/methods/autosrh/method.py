"""Weights of columns by frequency group, the columns that they leave under a budget, and both as a method."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.autosrh.config import AutoSrhConfig
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.columns import best_columns, best_columns_under, check_one_column, cost_of
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.methods.gated.popularity import Popularity, popularity_of, row_by_row
from embsearch_dist.methods.gated.stage import SelectorStage
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import PLANTED_TRAINING, TRAINING
from embsearch_dist.methods.widest import blocks_of
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


class GroupWeights(nn.Module):
    """``a [K, d]``: a weight for each column of each group, 1 at the start."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, width))

    def forward(self) -> torch.Tensor:
        return self.weight.clone()


class GroupTask(GatedTask):
    """Ordinary batches train tables and head under the weights, held-out ones the weights."""

    def __init__(self, run: Run, own: dict[str, Any], training: bool) -> None:
        search: AutoSrhConfig = run.config.search
        weights = GroupWeights(search.groups, search.width)
        model = GatedModel(run.config, run.schema, search.width, weights, run.context)
        super().__init__(run, model, search.outer, search.training if training else None, own)
        self.l1 = search.l1
        # Counted for a model that is only read as well: its tables' rows are weighed by their groups.
        self.popularity: Popularity = popularity_of(run, search.training.batch_size, search.groups)

    @property
    def weights(self) -> torch.Tensor:
        """``a [K, d]``."""
        return cast(GroupWeights, self.model.bare_selector).weight

    def weigh(self, u: torch.Tensor, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]`` under ``weights [K, d]``."""
        table = weights.expand(u.shape[1], *weights.shape)
        return u * row_by_row(table, self.popularity.of(batch.sparse), len(u))

    def select(self, u: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        return self.weigh(u, batch, self.weights)

    def select_outer(self, u: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = self.model.selector()
        return self.weigh(u, batch, weights), self.l1 * weights.abs().sum()

    def select_final(self, u: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.weigh(u, batch, self.weights)

    def after_step(self, step: int, monitor: Monitor) -> None:
        super().after_step(step, monitor)
        if self.picture_due(step):
            groups, width = self.weights.shape
            names = [str(g) for g in range(groups)], [str(k) for k in range(width)]
            monitor.heatmap(step, "weights of groups", self.weights, *names)

    @torch.no_grad()
    def column_scores(self) -> torch.Tensor:
        """Mean size of the entries ``a_g * e_x`` of each column over the values of its field: ``[F, d]`` float64 on the
        CPU, the same on every rank."""
        run = self.run
        rows = torch.tensor(run.schema.cardinalities, device=run.context.device)
        total = torch.zeros(len(rows), self.model.width, dtype=torch.float64, device=run.context.device)
        for x, inside, ids, _ in blocks_of(self.model.tables, run.schema, run.context):
            group = self.popularity.of_values(torch.minimum(ids, rows[:, None] - 1))
            total += ((x * self.weights[group]).abs().double() * inside[..., None]).sum(1)
        return (run.context.sum(total) / rows[:, None]).cpu()


class GroupStage(SelectorStage[GroupTask]):
    """Trains tables, head and weights under ``checkpoints/weights``."""

    name = "weights"
    own = ("width", "groups", "l1")

    def task(self, run: Run, training: bool) -> GroupTask:
        return GroupTask(run, self.settings(run), training)

    def line(self, run: Run, task: GroupTask) -> str:
        groups, width = task.weights.shape
        return f"{len(run.schema.fields)} fields of width {width}, {groups} frequency groups"


class ColumnStage(AllocateStage):
    """The columns of the largest weighed entries that a budget holds."""

    name = "columns"

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: AutoSrhConfig = run.config.search
        scores, extra = GroupStage().finished(run).column_scores(), run.config.model.extra

        def find(budget: Budget | None) -> Chosen:
            if budget is None:
                return Chosen(best_columns(scores, search.keep), {"kept_share": search.keep})
            widths, share = best_columns_under(scores, cost_of(run.schema, budget.resource, extra), budget.limit)
            return Chosen(widths, {"kept_share": round(share, 6)})

        return find


class AutoSrh(Method):
    """DNIS (Cheng et al. 2020), published anew as AutoSrh."""

    config = AutoSrhConfig
    planted = {
        "search": {
            "width": 8,
            "training": PLANTED_TRAINING,
            "outer": {"pretrain_epochs": 1.0, "every": 2, "lr": 0.005},
        }
    }
    trial = {
        "search": {
            "width": 4,
            "groups": 6,
            "pareto": ["60%"],
            "training": TRAINING,
            "outer": {"pretrain_epochs": 0.3, "every": 2, "lr": 0.01},
        }
    }

    def stages(self) -> list[Stage]:
        return [GroupStage(), ColumnStage()]

    def check(self, run: Run) -> None:
        check_one_column(budgets_of(run), run.schema, run.config.model.extra)
