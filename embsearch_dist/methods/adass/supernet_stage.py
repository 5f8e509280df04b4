"""Stage 1: train the supernet on sampled subnets (AdaS&S Algorithm 1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.adass.ahead import Subnets
from embsearch_dist.methods.adass.config import AdassConfig
from embsearch_dist.methods.adass.distinct import describe, distinct_of
from embsearch_dist.methods.adass.panel import Panel, draw_panel
from embsearch_dist.methods.adass.sampling import Sampler, candidate_variance, column_variance, own_columns
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.stages import Stage, training_inputs
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.run import Run
from embsearch_dist.sharding.statistics import column_sums
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer

HEATMAPS = 40  # pictures of P_E over a whole training
READ_LATER = ("keep",)  # of search.supernet: which of the checkpoints a search reads


class SupernetTask:
    """Each step trains the subnets the sampler draws; P_E and P_F follow every ``update_every`` steps.

    With several a step they share one look-up and one optimizer step: the widest learns from the labels, the others
    from what it predicts (in-place distillation: Yu and Huang 2019, "Universally Slimmable Networks"; BigNAS, Yu et
    al. 2020). Losses are averaged, so that rates, clipping and the log keep the size they have with one subnet.
    """

    def __init__(self, run: Run[AdassConfig], total_steps: int = 0) -> None:
        search = run.config.search
        self.run, self.context, self.names = run, run.context, run.schema.names
        self.candidates = search.candidates
        same = search.sampling.same_subnet
        self.model = SupernetModel(run.config, run.schema, search.candidates, search.scheme, run.context, same)
        warmup = int(search.sampling.warmup * total_steps)
        seed, self.distinct = run.config.run.seed, distinct_of(run.config, run.schema)
        self.sampler = Sampler(search.sampling, run.schema, search.candidates, seed, warmup, self.distinct)
        self._subnets = Subnets(self.sampler, run.context)
        self.l2 = run.config.optim.embedding_l2
        model = {f"model.{k}": v for k, v in run.config.model.settings().items()}
        sampling = {f"search.sampling.{k}": v for k, v in dataclasses.asdict(search.sampling).items()}
        own = {f"search.{k}": getattr(search, k) for k in ("candidates", "scheme", "distinct")}
        judged = {f"search.supernet.{k}": getattr(search.supernet, k) for k in ("panel", "panel_rows")}
        self.settings = model | own | sampling | judged
        self.picture_every = max(search.sampling.update_every, total_steps // HEATMAPS)
        self._pictured = 0
        self._gradient: torch.Tensor | None = None
        self._size: torch.Tensor | None = None
        self._panel: Panel | None = None
        widest = self.sampler.widest.to(run.context.device)
        self._widest = (widest, torch.ones_like(widest, dtype=torch.bool))

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        if step == 0 and self.sampler.by_growth:
            self.sampler.start(self._variance())
        choices, keeps = self._subnets.of(step)
        logits, pooled = self.model(batch, choices[0], keeps[0])
        loss = binary_cross_entropy_with_logits(logits, batch.label)
        if len(choices) > 1:
            taught = logits.detach().sigmoid()
            for choice, keep in zip(choices[1:], keeps[1:], strict=True):
                # DDP allows several calls before one backward: a weight's gradient arrives when it is whole.
                own = self.model.head(batch.dense, pooled, choice, keep)
                loss = loss + binary_cross_entropy_with_logits(own, taught)
            loss = loss / len(choices)
        if self.l2:
            share = (self.model.tables.read[choices] * keeps[..., None]).mean(0)
            loss = loss + self.l2 * (pooled.stack().square().sum(1) * share).sum() / batch.size
        if self.sampler.due(step):
            self._watch(pooled, choices, keeps, self._subnets.kept(step))
        return loss

    def _watch(self, pooled: Pooled, choices: torch.Tensor, keeps: torch.Tensor, kept: torch.Tensor) -> None:
        """Take the mean magnitudes that Eq. 6 needs from this batch: of E now, of dL/dE in backward.

        Args:
            kept: the numbers of the fields that some subnet keeps.
        """
        active, keep = self.model.tables.mask[choices[0]], keeps[0]
        if len(choices) > 1:
            active, keep = (self.model.tables.mask[choices] * keeps[..., None]).amax(0), keeps.any(0)
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
        """Logits of the widest subnet."""
        return self.model(batch, *self._widest)[0]

    def judge(self) -> dict[str, float] | None:
        """Mean metrics of the panel; None where the widest subnet alone is to be looked at."""
        search, schema = self.run.config.search, self.run.schema
        c = search.supernet
        if c.panel == 1:
            return None
        if self._panel is None:
            seed = self.run.config.run.seed
            choices = draw_panel(self.distinct, search.candidates, schema.cardinalities, c.panel, seed)
            self._panel = Panel(self.run, choices, c.panel_rows, c.eval_batch_size)
        return self._panel.judge(self.model)

    def _variance(self) -> torch.Tensor:
        """What Eq. 5 compares, ``[F, T]`` on the CPU, the same on every rank."""
        sums, rows = (t.cpu() for t in column_sums(self.model.sharded))
        if self.sampler.by_growth:
            return column_variance(sums, rows, own_columns(self.model.tables.columns))
        return candidate_variance(sums, rows, self.model.tables.columns)

    def after_step(self, step: int, monitor: Monitor) -> None:
        if self._gradient is not None and self._size is not None:
            both = torch.stack([self._gradient, self._size])
            self.context.sum(both)
            both = both.cpu() / self.context.world_size
            self.sampler.update(self._variance(), both[0], both[1])
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


class SupernetStage(Stage[AdassConfig]):
    """Trains the supernet and leaves its checkpoints under ``checkpoints/supernet``."""

    name = "supernet"

    def inputs(self, run: Run[AdassConfig]) -> dict[str, Any]:
        search = run.config.search
        own = {f"search.{k}": getattr(search, k) for k in ("candidates", "scheme", "distinct", "sampling")}
        trained = training_inputs(run, "search.supernet", search.supernet, *READ_LATER)
        return {**trained, "model": run.config.model.settings(), **own}

    def run(self, run: Run[AdassConfig]) -> None:
        search = run.config.search
        training = run.stream("train", search.supernet.batch_size, shuffle=True)
        validation = run.stream("validation", search.supernet.eval_batch_size, shuffle=False)
        task = SupernetTask(run, search.supernet.total_steps(training.batches_per_epoch))
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.say(
                f"supernet: {len(run.schema.fields)} fields x candidates {search.candidates}, {search.scheme} scheme, "
                f"{search.sampling.mode} sampling, {task.model.sharded.context.world_size} rank(s)"
            )
            if search.supernet.panel > 1:
                rows = min(search.supernet.panel_rows, validation.rows)
                monitor.say(
                    f"validation figures: means of a fixed panel of {search.supernet.panel} subnets, {rows:,} rows"
                )
            for line in describe(run.schema.names, search.candidates, task.distinct):
                monitor.say(line)
            root, optim = gated.checkpoint_root(run, self.name), run.config.optim
            Trainer(task, search.supernet, optim, training, validation, run.context, monitor, root).fit()


def load_supernet(run: Run) -> SupernetTask:
    """The finished supernet of a run directory, frozen: its best weights by the panel, or the last ones, as
    ``search.supernet.keep`` says.

    Raises:
        UserError: they are missing or damaged. An older checkpoint would be another supernet, so none is taken.
    """
    task = SupernetTask(run)
    gated.load(run, SupernetStage.name, task, best=run.config.search.supernet.keep == "best")
    return task
