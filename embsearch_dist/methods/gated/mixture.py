"""A mixture of candidate widths per field, and the widths that a budget leaves of its weights (AutoDim, AutoEmb)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from embsearch_dist.config.sections import Config
from embsearch_dist.methods.allocating import Chosen, Finder
from embsearch_dist.methods.budget import Budget, cost_table, knapsack
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.models.model import Head
from embsearch_dist.models.unify import SupernetUnify, leading
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema


class MixtureModel(GatedModel):
    """A gated model with a map and a BatchNorm per field and candidate, which are parts of the head.

    Candidates are prefixes of one table of the widest of them. The BatchNorms have neither scale nor shift.

    Args:
        candidates: widths, ascending; of a leading 0 nothing is added.
        selector: gives the weights of the candidates.
        squash: applied to each candidate behind its BatchNorm.
    """

    def __init__(
        self,
        config: Config,
        schema: Schema,
        candidates: list[int],
        selector: nn.Module,
        context: Context,
        squash: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        fields, width = len(schema.fields), candidates[-1]
        mask = leading(candidates, width)
        mixture = SupernetUnify(fields, mask, width, "field", 1.0, context.world_size > 1, "field")
        for parameter in (mixture.norm.scale, mixture.norm.shift):
            parameter.requires_grad_(False)
        # In a tuple: it becomes a part of the head in `_wrap`, which the base class calls.
        self._mixture, self.candidates, self.squash = (mixture,), candidates, squash
        super().__init__(config, schema, width, selector, context)

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
        """Sum of the candidates of ``u [B, F, d]`` with ``weights [F, T]`` or ``[B, F, T]``: ``[B, F, d]``."""
        x = u.transpose(0, 1)
        every = torch.ones(len(x), dtype=torch.bool, device=u.device)
        found = torch.zeros_like(u)
        for t, width in enumerate(self.candidates):
            if width:
                choice = torch.full((len(x),), t, device=u.device)
                candidate = self.mixture(x, choice, every)
                if self.squash is not None:
                    candidate = self.squash(candidate)
                found = found + candidate * weights[..., t, None]
        return found

    def even(self, u: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]`` with all candidates alike, as it is used before anything is chosen."""
        count = len(self.candidates)
        return self.mixed(u, u.new_full((u.shape[1], count), 1 / count))


def most_probable(run: Run, scores: torch.Tensor, told: dict[str, object]) -> Finder:
    """Finds, for a budget, the widths among ``search.candidates`` with the largest sum of log-probabilities.

    Args:
        scores: ``[F, T]`` float64 on the CPU.
        told: what the allocations' provenance says beside the probabilities.
    """
    candidates, extra = run.config.search.candidates, run.config.model.extra
    told = {"probabilities": [[round(p, 4) for p in row] for row in scores.exp().tolist()], **told}

    def find(budget: Budget | None) -> Chosen:
        costs = cost_table(run.schema, candidates, budget.resource if budget else "parameters", extra)
        choice = probable(scores, costs, budget.limit if budget else float(costs.sum()), candidates)
        return Chosen([candidates[j] for j in choice], told)

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
