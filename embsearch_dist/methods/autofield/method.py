"""Gates per field, the fields that they leave under a budget, and both as a method."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from embsearch_dist.config.options import require
from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.autofield.config import AutoFieldConfig
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget, cost_table, knapsack
from embsearch_dist.methods.gated.choosing import ChoiceStage, ChoiceTask
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.methods.gated.relaxed import Choice
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import PLANTED_TRAINING, TRAINING
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


class FieldTask(ChoiceTask):
    """Candidate 0 drops a field, candidate 1 keeps it."""

    def weigh(self, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return u * weights[:, 1, None]


class GateStage(ChoiceStage):
    """Trains the gates."""

    own = ("width",)

    def task(self, run: Run, training: bool) -> ChoiceTask:
        search: AutoFieldConfig = run.config.search
        model = GatedModel(run.config, run.schema, search.width, Choice(len(run.schema.fields), 2), run.context)
        return FieldTask(run, model, ["drop", "keep"], {}, training)


class FieldStage(AllocateStage):
    """Keeps the fields of the highest probabilities."""

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: AutoFieldConfig = run.config.search
        kept = GateStage().learned(run)[:, 1].exp()
        told: dict[str, object] = {"probabilities": [round(p, 4) for p in kept.tolist()]}
        fields, extra = len(run.schema.fields), run.config.model.extra

        def find(budget: Budget | None) -> Chosen:
            if budget is None:
                keep = top(kept, search.k or max(1, fields // 2))
            else:
                costs = cost_table(run.schema, search.candidates, budget.resource, extra)
                keep = knapsack(torch.stack([torch.zeros_like(kept), kept], 1), costs, budget.limit)
            return Chosen([search.width * k for k in keep], told)

        return find


def top(scores: torch.Tensor, k: int) -> Sequence[int]:
    """1 for the ``k`` highest of ``scores [F]``, of equal ones the first; 0 for the others."""
    order = scores.argsort(descending=True, stable=True)[:k].tolist()
    return [int(f in order) for f in range(len(scores))]


class AutoField(Method):
    """AutoField (Wang et al. 2022)."""

    config = AutoFieldConfig
    planted = {
        "search": {
            "width": 8,
            "training": PLANTED_TRAINING,
            "outer": {"pretrain_epochs": 1.0, "every": 2},
        }
    }
    trial = {
        "search": {"width": 4, "pareto": ["60%"], "training": TRAINING, "outer": {"pretrain_epochs": 0.3, "every": 2}}
    }

    def stages(self) -> list[Stage]:
        return [GateStage(), FieldStage()]

    def check(self, run: Run) -> None:
        search, fields = run.config.search, len(run.schema.fields)
        require(search.k <= fields, "search.k", f"must be at most {fields}, the number of fields, got {search.k}")
        budgets_of(run)
