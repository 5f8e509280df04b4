"""Policies that enlarge fields, the rows that reward them, the growth under a budget, and all of it as a method."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.allocating import AllocateStage, Chosen, Finder, budgets_of
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.columns import cost_of
from embsearch_dist.methods.esapn.config import ESAPNConfig
from embsearch_dist.methods.esapn.growth import Growth, replayed
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.methods.gated.popularity import Popularity, PopularityNet, popularity_of, row_by_row
from embsearch_dist.methods.gated.stage import SelectorStage
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.methods.noise import uniform_noise
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import PLANTED_TRAINING, TRAINING
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor

LAST = 5  # held-out losses that the baseline of that name is the mean of


class GrowthTask(GatedTask):
    """Ordinary batches train tables and head at the present sizes and one size ahead; held-out ones the policies.

    The widest table is there from the beginning; a size is how many of its columns are open.
    """

    def __init__(self, run: Run, training: bool) -> None:
        search: ESAPNConfig = run.config.search
        fields, candidates = len(run.schema.fields), search.candidates
        net = PopularityNet(fields, len(candidates) - 1, search.popularity, run.config.run.seed, search.start)
        model = GatedModel(run.config, run.schema, candidates[-1], net, run.context)
        own = {f"search.{k}": getattr(search, k) for k in ("candidates", "start", "ahead", "baseline")}
        own |= {f"search.popularity.{k}": v for k, v in vars(search.popularity).items()}
        super().__init__(run, model, search.outer, search.training if training else None, own)
        self.search, self.largest = search, len(candidates) - 1
        self.widths = torch.tensor(candidates, device=run.context.device)
        self.losses: list[float] = []  # of the last held-out batches, as drawn
        self.rewards: list[float] = []  # since they were last shown
        self._take(Growth([0] * fields))
        self.popularity: Popularity | None = None
        if training:
            self.popularity = popularity_of(run, search.training.batch_size, search.popularity.buckets)
            net.rows.copy_(self.popularity.rows)

    def _take(self, growth: Growth) -> None:
        self.growth = growth
        self.sizes = torch.tensor(growth.sizes, device=self.run.context.device)

    @property
    def net(self) -> PopularityNet:
        """The policies: ``[F, K, T - 1]`` logits of enlarging each size but the widest."""
        return cast(PopularityNet, self.model.bare_selector)

    def at(self, u: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """``u [B, F, d]`` with the columns of ``sizes`` (``[F]`` or ``[B, F]``, places among the candidates) open."""
        return u * (torch.arange(u.shape[2], device=u.device) < self.widths[sizes][..., None])

    def select_none(self, u: torch.Tensor) -> torch.Tensor:
        return self.at(u, self.sizes)

    def select(self, u: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        ahead = self._uniform(len(u), step, stream=0) < self.search.ahead
        return self.at(u, (self.sizes + ahead).clamp(max=self.largest))

    def select_outer(self, u: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError("the policies learn from rewards, not through the model")

    def select_final(self, u: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.at(u, self.sizes)

    def _uniform(self, rows: int, step: int, stream: int) -> torch.Tensor:
        """``[rows, F]`` of this rank's rows of a step, the same for any number of ranks on CPU."""
        context, fields = self.run.context, len(self.growth.sizes)
        first = context.rank * self.search.training.batch_size // context.world_size
        seed, even = self.run.config.run.seed * 4 + stream, fields + fields % 2
        return uniform_noise(seed, step, first, (rows, even), context.device)[:, :fields]

    def outer_loss(self, step: int) -> torch.Tensor | None:
        batch = self.held_out(step)
        if batch is None:
            return None
        assert self.popularity is not None
        logits = present(row_by_row(self.model.selector(), self.popularity.of(batch.sparse), batch.size), self.sizes)
        open_ = self.sizes < self.largest
        action = (self._uniform(batch.size, step, stream=1) < logits.detach().sigmoid()) & open_
        drawn, kept = self._losses(batch, action)
        reward = self._baseline(kept, drawn) - drawn
        self.rewards.append(float(self._mean(reward)))
        return policy_loss(logits, action, open_, reward)

    @torch.no_grad()
    def _losses(self, batch: Batch, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each row ``[B]`` with the sizes that it drew, and with those of now. Nothing is written to."""
        head = self.model.bare_head
        head.eval()  # dropout would tell the two apart
        try:
            u = self.model.embed(batch)
            both = [head(batch.dense, self.at(u, sizes)) for sizes in (self.sizes + action, self.sizes)]
        finally:
            head.train()
        drawn, kept = (binary_cross_entropy_with_logits(x, batch.label, reduction="none") for x in both)
        return drawn, kept

    def _baseline(self, kept: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        if self.search.baseline == "rows":
            return kept
        now = float(self._mean(drawn))
        base = sum(self.losses) / len(self.losses) if self.losses else now
        self.losses = [*self.losses, now][-LAST:]
        return torch.full_like(drawn, base)

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """Over the rows of all ranks, float64."""
        total = self.run.context.sum(torch.stack([x.double().sum(), x.new_tensor(len(x)).double()]))
        return total[0] / total[1]

    @torch.no_grad()
    def enlarging(self) -> torch.Tensor:
        """Mean probability over the training rows that a field of each size is enlarged: ``[F, T - 1]`` float64."""
        net = self.net
        return (net().double().sigmoid() * net.shares()[..., None]).sum(1)

    def after_step(self, step: int, monitor: Monitor) -> None:
        super().after_step(step, monitor)
        if step <= self.warmup or (step - self.warmup) % self.outer.every:
            return
        probability = self.enlarging()
        own = probability.gather(1, self.sizes.clamp(max=self.largest - 1)[:, None])[:, 0]
        if self.growth.enlarge(step, own.tolist(), self.largest):
            self._take(self.growth)
        if self.picture_due(step):
            widths = [self.search.candidates[k] for k in self.growth.sizes]
            reward = sum(self.rewards) / len(self.rewards) if self.rewards else math.nan
            monitor.scalars(step, {"reward": reward, "mean width": sum(widths) / len(widths)})
            shown = [f"{a} to {b}" for a, b in zip(self.search.candidates, self.search.candidates[1:], strict=False)]
            monitor.heatmap(step, "enlarging", probability, self.run.schema.names, shown)
            self.rewards = []

    def state(self) -> dict[str, Any]:
        growth = {"sizes": self.growth.sizes, "growth": self.growth.steps}
        return super().state() | growth | {"losses": self.losses, "rewards": self.rewards}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._take(Growth(list(state["sizes"]), [(int(step), int(f)) for step, f in state["growth"]]))
        self.losses, self.rewards = list(state["losses"]), list(state["rewards"])


def present(table: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Of ``table [B, F, T - 1]`` the entry of each field's size ``sizes [F]``: ``[B, F]``; the last for the widest."""
    place = sizes.clamp(max=table.shape[2] - 1).expand(table.shape[:2])
    return table.gather(2, place[..., None])[..., 0]


def policy_loss(logits: torch.Tensor, action: torch.Tensor, open_: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """REINFORCE: minus the mean over rows of ``reward [B]`` times the log-probability of the row's actions.

    Args:
        logits: of enlarging, ``[B, F]``.
        action: ``[B, F]`` bool.
        open_: ``[F]`` bool: fields that can be enlarged; the others have no action.
    """
    log_probability = -binary_cross_entropy_with_logits(logits, action.to(logits.dtype), reduction="none")
    return -(reward * (log_probability * open_).sum(1)).mean()


class GrowthStage(SelectorStage[GrowthTask]):
    """Trains model and policies under ``checkpoints/growth``; the last state has the whole growth."""

    name = "growth"
    own = ("candidates", "start", "ahead", "baseline", "popularity")

    def task(self, run: Run, training: bool) -> GrowthTask:
        return GrowthTask(run, training)

    def line(self, run: Run, task: GrowthTask) -> str:
        return f"{len(run.schema.fields)} fields grow through {', '.join(map(str, run.config.search.candidates))}"


class SizeStage(AllocateStage):
    """The growth as far as each budget allows it."""

    def finder(self, run: Run, monitor: Monitor) -> Finder:
        search, names = run.config.search, run.schema.names
        growth = GrowthStage().finished(run).growth
        grown = [[step, names[f]] for step, f in growth.steps]

        def find(budget: Budget | None) -> Chosen:
            cost = cost_of(run.schema, budget.resource if budget else "parameters", run.config.model.extra)
            widths, refused = replayed(growth, search.candidates, cost, budget.limit if budget else math.inf)
            return Chosen(widths, {"growth": grown, "refused": refused})

        return find


class ESAPN(Method):
    """ESAPN (Liu et al. 2020), a policy a field."""

    config = ESAPNConfig
    planted = {
        "search": {
            "candidates": [1, 2, 4, 8],
            "training": PLANTED_TRAINING,
            "outer": {"pretrain_epochs": 0.5, "every": 1, "lr": 0.002},
        }
    }
    trial = {
        "search": {
            "candidates": [1, 2, 4],
            "pareto": ["60%"],
            "popularity": {"buckets": 6, "width": 4, "hidden": 4},
            "training": TRAINING,
            "outer": {"pretrain_epochs": 0.3, "every": 2, "lr": 0.01},
        }
    }

    def stages(self) -> list[Stage]:
        return [GrowthStage(), SizeStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)
