"""The mixture of candidate widths, the widths that a budget leaves, and both as a method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from embsearch_dist.config.options import option, require
from embsearch_dist.methods.allocating import AllocateStage, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.gated.choosing import ChoiceOptions, ChoiceStage, ChoiceTask
from embsearch_dist.methods.gated.mixture import MixtureModel, most_probable
from embsearch_dist.methods.gated.relaxed import Choice
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.models.tables import check_candidates
from embsearch_dist.run import Run
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


class WidthTask(ChoiceTask):
    """The choice is a mixture of widths; before it sets in, all candidates count alike."""

    model: MixtureModel

    def weigh(self, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.model.mixed(u, weights)

    def select_none(self, u: torch.Tensor) -> torch.Tensor:
        return self.model.even(u)


class MixtureStage(ChoiceStage):
    """Trains the mixture."""

    own = ("candidates",)

    def task(self, run: Run, training: bool) -> ChoiceTask:
        candidates = run.config.search.candidates
        choice = Choice(len(run.schema.fields), len(candidates))
        model = MixtureModel(run.config, run.schema, candidates, choice, run.context)
        return WidthTask(run, model, [str(d) for d in candidates], {"search.candidates": candidates}, training)


class WidthStage(AllocateStage):
    """The most probable widths that a budget holds."""

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        return most_probable(run, MixtureStage().learned(run), {})


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
