"""The mixture of candidate widths, the widths that a budget leaves, and both as a method."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.allocating import AllocateStage, Finder, budgets_of
from embsearch_dist.methods.autodim.config import AutoDimConfig
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.gated.choosing import ChoiceStage, ChoiceTask
from embsearch_dist.methods.gated.mixture import MixtureModel, most_probable
from embsearch_dist.methods.gated.relaxed import Choice
from embsearch_dist.methods.gated.unrolled import unrolled_loss
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


class WidthTask(ChoiceTask):
    """The choice is a mixture of widths; before it sets in, all candidates count alike."""

    model: MixtureModel

    def __init__(self, run: Run, model: MixtureModel, names: list[str], own: dict[str, Any], training: bool) -> None:
        super().__init__(run, model, names, own, training)
        self.second = run.config.search.order == "second"
        self._last: Batch | None = None  # ordinary batch, where it is needed
        # Outer steps switch the head's gradients off: which it has is known only now.
        self._inner = [p for p in model.bare_head.parameters() if p.requires_grad]

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        self._last = batch if self.second else None
        return super().loss(batch, step)

    def outer_loss(self, step: int) -> torch.Tensor | None:
        if not self.second:
            return super().outer_loss(step)
        held_out, train = self.held_out(step), self._last
        if held_out is None:
            return None
        assert train is not None
        model, rate = self.model, self.run.config.optim.dense_lr
        with torch.no_grad():
            u, v = model.embed(train), model.embed(held_out)
        model.bare_head.eval()  # no dropout between two sides of a difference, no running statistics that move
        try:
            return unrolled_loss(
                lambda: self._relaxed(u, train, step, 0),
                lambda: self._relaxed(v, held_out, step, 1),
                self._inner,
                model.outer_parameters,
                rate,
                self.run.context,
            )
        finally:
            model.bare_head.train()

    def _relaxed(self, u: torch.Tensor, batch: Batch, step: int, stream: int) -> torch.Tensor:
        """Mean loss of a batch's embeddings ``u [B, F, d]`` under the relaxed choice of a step."""
        weighed = self.weigh(u, self.model.bare_selector(*self._arguments(step, stream)))
        return binary_cross_entropy_with_logits(self.model.bare_head(batch.dense, weighed), batch.label)

    def weigh(self, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.model.mixed(u, weights)

    def select_none(self, u: torch.Tensor) -> torch.Tensor:
        return self.model.even(u)


class MixtureStage(ChoiceStage):
    """Trains the mixture."""

    own = ("candidates", "order")

    def task(self, run: Run, training: bool) -> ChoiceTask:
        candidates = run.config.search.candidates
        choice = Choice(len(run.schema.fields), len(candidates))
        model = MixtureModel(run.config, run.schema, candidates, choice, run.context)
        return WidthTask(run, model, [str(d) for d in candidates], self.settings(run), training)


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
            "order": "second",
            "pareto": ["60%"],
            "training": TRAINING,
            "outer": {"pretrain_epochs": 0.3, "every": 2},
        }
    }

    def stages(self) -> list[Stage]:
        return [MixtureStage(), WidthStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)
