"""Controllers that weigh widths by popularity, the widths that a budget leaves of that, and both as a method."""

from __future__ import annotations

from typing import cast

import torch

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.allocating import AllocateStage, Finder, budgets_of
from embsearch_dist.methods.autoemb.config import AutoEmbConfig
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.gated.mixture import MixtureModel, most_probable
from embsearch_dist.methods.gated.popularity import Popularity, PopularityNet, popularity_of, row_by_row
from embsearch_dist.methods.gated.stage import SelectorStage
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import PLANTED_TRAINING, TRAINING
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


class AutoEmbTask(GatedTask):
    """Ordinary batches train the mixture under the controllers' weights, held-out ones the controllers."""

    model: MixtureModel

    def __init__(self, run: Run, training: bool) -> None:
        search: AutoEmbConfig = run.config.search
        fields, candidates = len(run.schema.fields), search.candidates
        net = PopularityNet(fields, len(candidates), search.popularity, run.config.run.seed)
        model = MixtureModel(run.config, run.schema, candidates, net, run.context, torch.tanh)
        own = {"search.candidates": candidates} | {
            f"search.popularity.{k}": v for k, v in vars(search.popularity).items()
        }
        super().__init__(run, model, search.outer, search.training if training else None, own)
        self.popularity: Popularity | None = None
        if training:
            self.popularity = popularity_of(run, search.training.batch_size, search.popularity.buckets)
            self.net.rows.copy_(self.popularity.rows)

    @property
    def net(self) -> PopularityNet:
        """The controllers."""
        return cast(PopularityNet, self.model.bare_selector)

    def weigh(self, u: torch.Tensor, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]`` under the controllers' ``scores [F, K, T]``."""
        assert self.popularity is not None, "a model that is only read has counted nothing"
        weights = row_by_row(scores.softmax(2), self.popularity.of(batch.sparse), len(u))
        return self.model.mixed(u, weights)

    def select_none(self, u: torch.Tensor) -> torch.Tensor:
        return self.model.even(u)

    def select(self, u: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        return self.weigh(u, batch, self.net())

    def select_outer(self, u: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weigh(u, batch, self.model.selector()), None

    def select_final(self, u: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.weigh(u, batch, self.net())

    @torch.no_grad()
    def by_popularity(self) -> torch.Tensor:
        """Weights of the candidates for each bucket: ``[F, K, T]`` float64 on the CPU."""
        return self.net().double().softmax(2).cpu()

    def probabilities(self) -> torch.Tensor:
        """Mean weights over the training rows: ``[F, T]`` float64 on the CPU."""
        return averaged(self.by_popularity(), self.net.shares().cpu())

    def after_step(self, step: int, monitor: Monitor) -> None:
        super().after_step(step, monitor)
        if self.picture_due(step):
            names = self.run.schema.names
            widths = [str(d) for d in self.model.candidates]
            monitor.heatmap(step, "probabilities", self.probabilities().numpy(), names, widths)
            by = mean_widths(self.by_popularity(), self.model.candidates)
            monitor.heatmap(step, "width by popularity", by.numpy(), names, [str(k) for k in range(by.shape[1])])


def averaged(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mean of ``weights [F, K, T]`` under ``shares [F, K]`` of rows: ``[F, T]``; of all buckets alike without rows."""
    empty = shares.sum(1, keepdim=True) == 0
    return (weights * torch.where(empty, 1 / shares.shape[1], shares)[..., None]).sum(1)


def mean_widths(weights: torch.Tensor, candidates: list[int]) -> torch.Tensor:
    """Expected width of each bucket under ``weights [F, K, T]``: ``[F, K]``."""
    return weights @ torch.tensor(candidates, dtype=weights.dtype)


class ControllerStage(SelectorStage[AutoEmbTask]):
    """Trains mixture and controllers under ``checkpoints/controller``."""

    name = "controller"
    own = ("candidates", "popularity")

    def task(self, run: Run, training: bool) -> AutoEmbTask:
        return AutoEmbTask(run, training)

    def line(self, run: Run, task: AutoEmbTask) -> str:
        widths = ", ".join(map(str, task.model.candidates))
        return (
            f"{len(run.schema.fields)} fields x {widths}, {run.config.search.popularity.buckets} buckets of popularity"
        )


class WidthStage(AllocateStage):
    """The widths of the largest product of mean weights that a budget holds."""

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        task = ControllerStage().finished(run)
        by = mean_widths(task.by_popularity(), task.model.candidates)
        told: dict[str, object] = {"width_by_popularity": [[round(w, 3) for w in row] for row in by.tolist()]}
        return most_probable(run, task.probabilities().log(), told)


class AutoEmb(Method):
    """AutoEmb (Zhao et al. 2020), a controller a field."""

    config = AutoEmbConfig
    planted = {
        "search": {
            "candidates": [1, 2, 4, 8],
            "training": PLANTED_TRAINING,
            "outer": {"pretrain_epochs": 1.0, "every": 2, "lr": 0.002},
        }
    }
    trial = {
        "search": {
            "candidates": [0, 2, 4],
            "pareto": ["60%"],
            "popularity": {"buckets": 6, "width": 4, "hidden": 4},
            "training": TRAINING,
            "outer": {"pretrain_epochs": 0.3, "every": 2},
        }
    }

    def stages(self) -> list[Stage]:
        return [ControllerStage(), WidthStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)
