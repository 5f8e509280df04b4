"""Stage 1: train tables and head with the gates between them (iHAS section 3.5.1, Algorithm 1, lines 1-9)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.methods.gated.result import leave_result
from embsearch_dist.methods.ihas.config import IHASConfig
from embsearch_dist.methods.ihas.gates import (
    BernoulliGates,
    deterministic,
    regulariser,
    sampled,
    straight_through,
)
from embsearch_dist.methods.noise import uniform_noise
from embsearch_dist.methods.stages import Stage
from embsearch_dist.models.model import seeded
from embsearch_dist.models.rows import fill_rows
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor

STAGE = "gates"
HISTOGRAM_BINS = 50


class GatesTask(gated.GatedTask):
    """Sampled masks while training, thresholded ones at inference."""

    part = "gates"

    def __init__(self, run: Run, search: IHASConfig, training: bool) -> None:
        self.gates, fields = search.gates, len(run.schema.fields)
        with seeded(run.config.run.seed):
            selector = BernoulliGates(fields * search.width, self.gates.shared, self.gates.bias)
        model = GatedModel(run.config, run.schema, search.width, selector, run.context)
        own = {f"search.gates.{k}": v for k, v in dataclasses.asdict(self.gates).items()}
        super().__init__(run, model, search.outer, search.training if training else None, own)
        self.batch_size = search.training.batch_size
        self._histogram: torch.Tensor | None = None

    def selection(self) -> dict[str, Any]:
        gates = dataclasses.asdict(self.gates)
        return {"kind": "gates"} | {key: gates[key] for key in ("shared", "bins", "fallback", "smooth")}

    def logits(self, u: torch.Tensor) -> torch.Tensor:
        """Logits of the gates ``[B, C]`` for embeddings ``u [B, F, d]``; the selector without DDP."""
        flat = u.reshape(len(u), -1)
        if torch.is_grad_enabled():
            return self.model.bare_selector(flat)
        return self.model.bare_selector(fill_rows(flat))[: len(flat)]

    def masks(self, u: torch.Tensor) -> torch.Tensor:
        """Deterministic masks ``[B, C]`` (section 3.3.2)."""
        return deterministic(self.logits(u), self.gates.bins, self.gates.fallback, self.gates.smooth)

    def _noise(self, rows: int, columns: int, step: int, stream: int) -> torch.Tensor:
        context = self.run.context
        first = context.rank * self.batch_size // context.world_size
        seed = self.run.config.run.seed * 4 + stream
        return uniform_noise(seed, step, first, (rows, columns), context.device)

    def select(self, u: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        rows, columns = len(u), u.shape[1] * u.shape[2]
        noise = self._noise(rows, columns, step, stream=0)
        if self.gates.through:
            mask = straight_through(self.logits(u), noise, self.gates.temperature)
        else:
            with torch.no_grad():
                mask = sampled(self.logits(u), noise)
        return u * mask.view_as(u)

    def select_outer(self, u: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat = u.reshape(len(u), -1)
        logits = self.model.selector(flat)
        p = torch.sigmoid(logits)
        self._histogram = torch.histc(p.detach(), HISTOGRAM_BINS, 0, 1)
        mask = straight_through(logits, self._noise(len(flat), flat.shape[1], step, stream=1), self.gates.temperature)
        return u * mask.view_as(u), regulariser(p, self.gates.sparsity, self.gates.polarization)

    def select_final(self, u: torch.Tensor, batch: Batch) -> torch.Tensor:
        return u * self.masks(u).view_as(u)

    def after_step(self, step: int, monitor: Monitor) -> None:
        super().after_step(step, monitor)
        if self.picture_due(step) and self._histogram is not None:
            counts = self.run.context.sum(self._histogram.double())
            share = (counts / counts.sum()).cpu()
            edges = [f"{k / HISTOGRAM_BINS:.2f}" for k in range(HISTOGRAM_BINS)]
            monitor.heatmap(step, "probabilities", share[None].numpy(), ["share"], edges)
            middle = (torch.arange(HISTOGRAM_BINS) + 0.5) / HISTOGRAM_BINS
            monitor.scalars(step, {"open": float((share * middle).sum())})
            self._histogram = None


class GateStage(Stage[IHASConfig]):
    """Trains the gated model and leaves its checkpoint under ``checkpoints/gates``."""

    name = STAGE

    def inputs(self, run: Run[IHASConfig]) -> dict[str, Any]:
        search = run.config.search
        own = {"search.width": search.width, "search.outer": search.outer, "search.gates": search.gates}
        return gated.inputs_of(run, search.training, own)

    def run(self, run: Run[IHASConfig]) -> None:
        search = run.config.search
        task = GatesTask(run, search, training=True)
        fields = len(run.schema.fields)
        kind = "one gate vector for all rows" if search.gates.shared else "gates by row"
        line = f"gates: {fields} fields x {search.width} columns, {kind}, {run.context.world_size} rank(s)"
        gated.train(run, self.name, task, search.training, [line])


class MeasureStage(Stage[IHASConfig]):
    """Evaluates the searched model itself, gates by threshold: the ablation iHAS-1. Leaves ``retrain/NAME-1``."""

    name = "test"
    repeatable = True

    def inputs(self, run: Run[IHASConfig]) -> dict[str, Any]:
        search = run.config.search
        return {**GateStage().inputs(run), "search.name": search.name}

    def run(self, run: Run[IHASConfig]) -> None:
        search = run.config.search
        leave_result(run, load_gates(run), f"{search.name}-1", search.training.eval_batch_size)


def load_gates(run: Run) -> GatesTask:
    """The finished search of a run directory, to be read: its last weights."""
    task = GatesTask(run, run.config.search, training=False)
    gated.load(run, STAGE, task, best=False)
    return task
