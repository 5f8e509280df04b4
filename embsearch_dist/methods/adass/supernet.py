"""Stage 1: train the supernet on sampled subnets (AdaS&S Algorithm 1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.config import SAFETY_KEYS
from embsearch_dist.data.batch import Batch
from embsearch_dist.dist.statistics import column_sums
from embsearch_dist.methods import gated
from embsearch_dist.methods.adass.ahead import Subnets
from embsearch_dist.methods.adass.config import AdassConfig
from embsearch_dist.methods.adass.sampling import Sampler, candidate_variance
from embsearch_dist.methods.base import Run, Stage
from embsearch_dist.models.ctr import SupernetModel
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer

HEATMAPS = 40  # pictures of P_E over a whole training


class SupernetTask:
    """Each step trains the subnet the sampler draws; P_E and P_F follow every ``update_every`` steps."""

    def __init__(self, run: Run, total_steps: int = 0) -> None:
        search: AdassConfig = run.config.search
        self.context, self.names = run.context, run.schema.names
        self.candidates = search.candidates
        same = search.sampling.same_subnet
        self.model = SupernetModel(run.config, run.schema, search.candidates, search.scheme, run.context, same)
        warmup = int(search.sampling.warmup * total_steps)
        self.sampler = Sampler(search.sampling, run.schema, search.candidates, run.config.run.seed, warmup)
        self._subnets = Subnets(self.sampler, run.context)
        self.l2 = run.config.optim.embedding_l2
        model = {f"model.{k}": v for k, v in dataclasses.asdict(run.config.model).items()}
        sampling = {f"search.sampling.{k}": v for k, v in dataclasses.asdict(search.sampling).items()}
        own = {"search.candidates": list(search.candidates), "search.scheme": search.scheme}
        self.settings = model | own | sampling
        self.picture_every = max(search.sampling.update_every, total_steps // HEATMAPS)
        self._pictured = 0
        self._gradient: torch.Tensor | None = None
        self._size: torch.Tensor | None = None
        fields = len(run.schema.fields)
        largest = torch.full((fields,), len(search.candidates) - 1)
        self._widest = (largest.to(run.context.device), torch.ones(fields, dtype=torch.bool, device=run.context.device))

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        choice, keep = self._subnets.of(step)
        logits, pooled = self.model(batch, choice, keep)
        loss = binary_cross_entropy_with_logits(logits, batch.label)
        if self.l2:
            active = self.model.tables.read[choice] * keep[:, None]
            loss = loss + self.l2 * (pooled.stack().square().sum(1) * active).sum() / batch.size
        if self.sampler.due(step):
            self._watch(pooled, choice, keep, self._subnets.kept(step))
        return loss

    def _watch(self, pooled: Pooled, choice: torch.Tensor, keep: torch.Tensor, kept: torch.Tensor) -> None:
        """Take the mean magnitudes that Eq. 6 needs from this batch: of E now, of dL/dE in backward.

        Args:
            kept: the numbers of the fields that ``keep`` keeps.
        """
        active = self.model.tables.mask[choice]
        columns = active.sum(1).clamp(min=1)
        self._size = (pooled.stack().detach().abs().mean(1) * active).sum(1) / columns

        starts, widths = pooled.starts, pooled.widths  # a hook that held the values would keep them for ever

        def hook(gradient: torch.Tensor) -> None:
            per_field = (Pooled(gradient, starts, widths).stack().abs().mean(1) * active).sum(1) / columns
            # A dropped field has no gradient; counting it as zero would keep it dropped.
            mean = per_field[kept].mean()
            self._gradient = torch.where(keep, per_field, mean)

        pooled.values.register_hook(hook)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits of the widest subnet: one curve to watch; the search scores the others."""
        return self.model(batch, *self._widest)[0]

    def after_step(self, step: int, monitor: Monitor) -> None:
        if self._gradient is not None and self._size is not None:
            both = torch.stack([self._gradient, self._size])
            self.context.sum(both)
            sums, rows = column_sums(self.model.sharded)
            variance = candidate_variance(sums.cpu(), rows.cpu(), self.model.tables.columns)
            both = both.cpu() / self.context.world_size
            self.sampler.update(variance, both[0], both[1])
            self._gradient = self._size = None
        if step - self._pictured >= self.picture_every and self.sampler.adaptive:
            self._pictured = step
            p_e, p_f = self.sampler.probabilities()
            columns = [str(d) for d in self.candidates]
            monitor.heatmap(step, "P_E", p_e.numpy(), self.names, columns)
            monitor.heatmap(step, "P_F", p_f[None].numpy(), ["keep"], self.names)

    def after_skip(self) -> None:
        self._gradient = self._size = None

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state(), "pictured": self._pictured}

    def load_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state(state["sampler"])
        self._pictured = state["pictured"]


class SupernetStage(Stage):
    """Trains the supernet and leaves its checkpoint under ``checkpoints/supernet``."""

    name = "supernet"

    def inputs(self, run: Run) -> dict[str, Any]:
        c = run.config
        search: AdassConfig = c.search
        return {
            "schema": run.schema.fingerprint,
            "run.seed": c.run.seed,
            "data.window_rows": c.data.window_rows,
            "model": c.model,
            "optim": c.optim,
            "search.candidates": search.candidates,
            "search.scheme": search.scheme,
            "search.sampling": search.sampling,
            "search.supernet": {k: v for k, v in vars(search.supernet).items() if k not in SAFETY_KEYS},
        }

    def run(self, run: Run) -> None:
        search: AdassConfig = run.config.search
        training = run.stream("train", search.supernet.batch_size, shuffle=True)
        validation = run.stream("validation", search.supernet.eval_batch_size, shuffle=False)
        task = SupernetTask(run, search.supernet.total_steps(training.batches_per_epoch))
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.say(
                f"supernet: {len(run.schema.fields)} fields x candidates {search.candidates}, {search.scheme} scheme, "
                f"{search.sampling.mode} sampling, {task.model.sharded.context.world_size} rank(s)"
            )
            root, optim = gated.checkpoint_root(run, self.name), run.config.optim
            Trainer(task, search.supernet, optim, training, validation, run.context, monitor, root).fit()


def load_supernet(run: Run) -> SupernetTask:
    """The finished supernet of a run directory, frozen: its last weights.

    Raises:
        UserError: they are missing or damaged. An older checkpoint would be another supernet, so none is taken.
    """
    task = SupernetTask(run)
    gated.load(run, SupernetStage.name, task, best=False)
    return task
