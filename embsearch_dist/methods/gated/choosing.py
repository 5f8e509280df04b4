"""Searches that learn a relaxed choice per field on held-out rows: their task and stage."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, cast

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.gated.config import ChoiceOptions
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.methods.gated.relaxed import Choice, step_noise
from embsearch_dist.methods.gated.stage import SelectorStage
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor

STAGE = "choice"


class ChoiceTask(gated.GatedTask):
    """A gated task whose selector is a :class:`embsearch_dist.methods.gated.relaxed.Choice` of T candidates a field.

    Ordinary batches train tables and head under the relaxed choice, noise included; held-out ones its logits. At
    inference there is no noise, and the temperature is that of the last ordinary step.

    Args:
        names: of the candidates, for pictures.
        own: the method's settings that the result depends on.
    """

    def __init__(self, run: Run, model: GatedModel, names: list[str], own: dict[str, Any], training: bool) -> None:
        search: ChoiceOptions = run.config.search
        own = own | {f"search.relax.{k}": v for k, v in dataclasses.asdict(search.relax).items()}
        super().__init__(run, model, search.outer, search.training if training else None, own)
        self.relax, self.names = search.relax, names

    @abstractmethod
    def weigh(self, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]`` under the candidates' ``weights [F, T]``: ``[B, F, d]``."""

    def select(self, u: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        return self.weigh(u, self.model.bare_selector(*self._arguments(step, 0)))

    def select_outer(self, u: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weigh(u, self.model.selector(*self._arguments(step, 1))), None

    def select_final(self, u: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.weigh(u, self.model.bare_selector(self.relax.temperature(self.steps - self.warmup)))

    @property
    def _choice(self) -> Choice:
        return cast(Choice, self.model.bare_selector)

    def _arguments(self, step: int, stream: int) -> tuple[float, torch.Tensor | None]:
        noise = step_noise(self.relax, self._choice.logits, self.run.config.run.seed, step, stream)
        return self.relax.temperature(step - self.warmup), noise

    def log_probabilities(self) -> torch.Tensor:
        """``[F, T]`` float64 on the CPU."""
        return torch.log_softmax(self._choice.logits.detach().double(), 1).cpu()

    def after_step(self, step: int, monitor: Monitor) -> None:
        super().after_step(step, monitor)
        if self.picture_due(step):
            shown = self.log_probabilities().exp()
            monitor.heatmap(step, "probabilities", shown.numpy(), self.run.schema.names, self.names)


class ChoiceStage(SelectorStage[ChoiceTask]):
    """Trains model and choice; the checkpoints are under ``checkpoints/choice``, and the last one is the result."""

    name = STAGE

    def inputs(self, run: Run) -> dict[str, Any]:
        return {**super().inputs(run), "search.relax": run.config.search.relax}

    def line(self, run: Run, task: ChoiceTask) -> str:
        return f"{len(run.schema.fields)} fields x {', '.join(task.names)}"

    def learned(self, run: Run) -> torch.Tensor:
        """Log-probabilities ``[F, T]`` of the finished stage."""
        return self.finished(run).log_probabilities()
