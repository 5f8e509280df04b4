"""The mixture of candidate widths, the widths that a budget leaves, and both as a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from embsearch_dist.config.options import option, require
from embsearch_dist.config.sections import Config
from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget, cost_table, knapsack
from embsearch_dist.methods.gated.choosing import ChoiceOptions, ChoiceStage, ChoiceTask
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.methods.gated.relaxed import Choice
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.models.model import Head
from embsearch_dist.models.tables import check_candidates
from embsearch_dist.models.unify import SupernetUnify, leading
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor


@dataclass
class AutoDimConfig(ChoiceOptions):
    """AutoDim: a relaxed choice of each field's width."""

    candidates: list[int] = option(
        [2, 4, 8, 16, 32], "candidate widths, ascending, the widest a multiple of 4; a leading 0 may drop fields"
    )

    def check(self) -> None:
        super().check()
        widest = check_candidates(self.candidates)[-1]
        require(widest % 4 == 0, "search.candidates", f"the widest must be a multiple of 4, got {widest}")


class AutoDimModel(GatedModel):
    """A gated model with a map and a BatchNorm per field and candidate, which are parts of the head."""

    def __init__(self, config: Config, schema: Schema, candidates: list[int], context: Context) -> None:
        fields, width = len(schema.fields), candidates[-1]
        mask = leading(candidates, width)
        mixture = SupernetUnify(fields, mask, width, "field", 1.0, context.world_size > 1, "field")
        for parameter in (mixture.norm.scale, mixture.norm.shift):
            parameter.requires_grad_(False)
        # In a tuple: it becomes a part of the head in `_wrap`, which the base class calls.
        self._mixture, self.candidates = (mixture,), candidates
        super().__init__(config, schema, width, Choice(fields, len(candidates)), context)

    def _wrap(self, module: nn.Module, context: Context) -> nn.Module:
        if isinstance(module, Head):
            module.add_module("mixture", self.mixture)
        return super()._wrap(module, context)

    @property
    def mixture(self) -> SupernetUnify:
        """The maps and BatchNorms."""
        return self._mixture[0]

    @property
    def normed(self) -> list[nn.Module]:
        return [self.mixture.norm]

    def mixed(self, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the candidates of ``u [B, F, d]`` with ``weights [F, T]``: ``[B, F, d]``."""
        x = u.transpose(0, 1)
        every = torch.ones(len(x), dtype=torch.bool, device=u.device)
        found = torch.zeros_like(u)
        for t, width in enumerate(self.candidates):
            if width:
                choice = torch.full((len(x),), t, device=u.device)
                found = found + self.mixture(x, choice, every) * weights[:, t, None]
        return found


class WidthTask(ChoiceTask):
    """The choice is a mixture of widths; before it sets in, all candidates count alike."""

    model: AutoDimModel

    def weigh(self, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.model.mixed(u, weights)

    def select_none(self, u: torch.Tensor) -> torch.Tensor:
        count = len(self.names)
        return self.model.mixed(u, u.new_full((u.shape[1], count), 1 / count))


class MixtureStage(ChoiceStage):
    """Trains the mixture."""

    own = ("candidates",)

    def task(self, run: Run, training: bool) -> ChoiceTask:
        candidates = run.config.search.candidates
        model = AutoDimModel(run.config, run.schema, candidates, run.context)
        return WidthTask(run, model, [str(d) for d in candidates], {"search.candidates": candidates}, training)


class WidthStage(AllocateStage):
    """The most probable widths that a budget holds."""

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search: AutoDimConfig = run.config.search
        scores, extra = MixtureStage().learned(run), run.config.model.extra
        told: dict[str, object] = {"probabilities": [[round(p, 4) for p in row] for row in scores.exp().tolist()]}

        def find(budget: Budget | None) -> Chosen:
            costs = cost_table(run.schema, search.candidates, budget.resource if budget else "parameters", extra)
            choice = probable(scores, costs, budget.limit if budget else float(costs.sum()), search.candidates)
            return Chosen([search.candidates[j] for j in choice], told)

        return find


def probable(scores: torch.Tensor, costs: torch.Tensor, limit: float, candidates: list[int]) -> list[int]:
    """The choice of the largest sum of log-probabilities ``scores [F, T]`` that costs at most ``limit`` and keeps a
    field. Without need each field gets its most probable candidate."""
    choice = knapsack(scores, costs, limit)
    if any(candidates[j] for j in choice):
        return choice
    tried = []
    for f in range(len(scores)):  # the best choice that keeps field f
        kept = scores.clone()
        kept[f, 0] = -torch.inf
        if float(costs[f, 1:].min() + costs.min(1).values.sum() - costs[f].min()) <= limit:
            found = knapsack(kept, costs, limit)
            tried.append((float(scores.gather(1, torch.tensor(found)[:, None]).sum()), found))
    return max(tried)[1]


class AutoDim(Method):
    """AutoDim (Zhao et al. 2021)."""

    config = AutoDimConfig
    trial = {
        "search": {
            "candidates": [0, 2, 4],
            "pareto": ["60%"],
            "training": TRAINING,
            "outer": {"pretrain_epochs": 0.3, "every": 2},
        }
    }

    def stages(self) -> list[Stage]:
        return [MixtureStage(), WidthStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)
