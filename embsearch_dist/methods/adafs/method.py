"""AdaFS as a method: train model and controller together, then measure what came of it on the test split.

Nothing is retrained: the searched model is the result, and the controller a part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.config.options import require
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.files import read_sealed
from embsearch_dist.methods.adafs.config import AdaFSConfig
from embsearch_dist.methods.adafs.controller import AdaFSModel, keep_top
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.gated.method import GatedMethod
from embsearch_dist.methods.gated.result import leave_result
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.run import Run
from embsearch_dist.train.bilevel import frozen
from embsearch_dist.train.monitor import Monitor

STAGE = "controller"
OWN = ("mode", "k", "renormalise", "scale", "norm", "dropout")


class AdaFSTask(gated.GatedTask):
    """Ordinary batches train tables, BatchNorm and head under the controller's weights; held-out ones the controller.

    Gradients of ordinary batches reach the tables through the weights as well.
    """

    model: AdaFSModel
    part = "controller"

    def __init__(self, run: Run, search: AdaFSConfig, training: bool) -> None:
        model = AdaFSModel(run.config, run.schema, search, run.context)
        own = {f"search.{k}": getattr(search, k) for k in OWN}
        super().__init__(run, model, search.outer, search.training if training else None, own)
        self.search, self.fields = search, len(run.schema.fields)
        self.k = search.kept(self.fields)
        self._shown: torch.Tensor | None = None

    def selection(self) -> dict[str, Any]:
        s = self.search
        told = {"kind": "adafs", "mode": s.mode, "k": self.k, "renormalise": s.renormalise, "scale": s.scale}
        return told | {"norm": s.norm}

    def choose(self, weights: torch.Tensor) -> torch.Tensor:
        """What the controller's ``weights [B, N]`` leave of each field, before ``scale``."""
        return weights if self.search.mode == "soft" else keep_top(weights, self.k, self.search.renormalise)

    def _weigh(self, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen = self.choose(weights)
        return u * (chosen * self.fields if self.search.scale else chosen)[..., None]

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        # As in the base class, but L2 is on what the tables hold: BatchNorm fixes the size of what comes behind it.
        raw = self.model.raw(batch)
        weighed = u = self.model.normalise(raw)
        if step >= self.warmup:
            with frozen(self.model.outer_parameters):
                weighed = self.select(u, batch, step)
        loss = binary_cross_entropy_with_logits(self.model.head(batch.dense, weighed), batch.label)
        return loss + self.l2 * raw.square().sum() / batch.size if self.l2 else loss

    def select(self, u: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        return self._weigh(u, self.model.bare_selector(u))

    def select_outer(self, u: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if (step - self.warmup) % self.between_pictures == 0:
            self._shown = self._look(u)
        return self._weigh(u, self.model.selector(u)), None

    def select_final(self, u: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._weigh(u, self.model.bare_selector(u))

    @torch.no_grad()
    def _look(self, u: torch.Tensor) -> torch.Tensor:
        """``[2N + 1]`` of this rank's rows: sum of each field's weight, rows that keep it, and all rows."""
        controller = self.model.bare_selector
        controller.eval()  # without dropout
        chosen = self.choose(controller(u)).double()
        controller.train()
        return torch.cat([chosen.sum(0), (chosen > 0).sum(0), chosen.new_full((1,), len(u))])

    def after_step(self, step: int, monitor: Monitor) -> None:
        super().after_step(step, monitor)
        if self._shown is None:
            return
        *shares, rows = self.run.context.sum(self._shown).tolist()
        self._shown, names = None, self.run.schema.names
        monitor.heatmap(step, "field weights", [[s / rows for s in shares[: self.fields]]], ["weight"], names)
        if self.search.mode == "hard":
            monitor.heatmap(step, "fields kept", [[s / rows for s in shares[self.fields :]]], ["kept"], names)


class ControllerStage(Stage[AdaFSConfig]):
    """Trains model and controller; their checkpoints are under ``checkpoints/controller``."""

    name = STAGE

    def inputs(self, run: Run[AdaFSConfig]) -> dict[str, Any]:
        return _inputs(run)

    def run(self, run: Run[AdaFSConfig]) -> None:
        search = run.config.search
        task = AdaFSTask(run, search, training=True)
        kept = f"{task.k} of {task.fields} fields a row" if search.mode == "hard" else f"{task.fields} fields, weighed"
        line = f"controller: {kept}, width {search.width}, {run.context.world_size} rank(s)"
        gated.train(run, self.name, task, search.training, [line])


class MeasureStage(Stage[AdaFSConfig]):
    """Evaluates the best checkpoint since the controller set in; leaves ``retrain/NAME/evaluation.json``."""

    name = "test"
    repeatable = True

    def inputs(self, run: Run[AdaFSConfig]) -> dict[str, Any]:
        best = gated.checkpoint_root(run, STAGE) / "best.json"
        measured = read_sealed(best)["step"] if best.exists() else None
        return {**_inputs(run), "search.name": run.config.search.result_name, "step": measured}

    def run(self, run: Run[AdaFSConfig]) -> None:
        search = run.config.search
        leave_result(run, load_searched(run), search.result_name, search.training.eval_batch_size)


def _inputs(run: Run[AdaFSConfig]) -> dict[str, Any]:
    search = run.config.search
    own = {f"search.{k}": getattr(search, k) for k in (*OWN, "width", "outer")}
    return gated.inputs_of(run, search.training, own)


def load_searched(run: Run) -> AdaFSTask:
    """The finished search of a run directory, to be read: its best weights."""
    task = AdaFSTask(run, run.config.search, training=False)
    gated.load(run, STAGE, task, best=True)
    return task


class AdaFS(GatedMethod):
    """AdaFS: Adaptive Feature Selection in Deep Recommender System (Lin et al. 2022)."""

    config = AdaFSConfig
    finds = "rows"
    result = ""
    trial = {
        "model": {"backbone": "mlp", "hidden": [8, 4]},
        "search": {"width": 4, "training": TRAINING, "outer": {"pretrain_epochs": 0.3, "every": 2}},
    }

    def stages(self) -> list[Stage]:
        return [ControllerStage(), MeasureStage()]

    def check(self, run: Run) -> None:
        search, fields = run.config.search, len(run.schema.fields)
        require(search.k <= fields, "search.k", f"must be at most {fields}, the number of fields, got {search.k}")

    def searched(self, run: Run) -> AdaFSTask:
        return load_searched(run)
