"""Stage 1: train the supernet on drawn architectures (section 4.1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.model import ArchitectureSupernet
from embsearch_dist.methods.stages import Stage, training_inputs
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.sampling import draw, training_architecture
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer

STAGE = "supernet"


class SupernetTask:
    """Each step trains the architecture that is drawn for it; of its weights the slices in use, and nothing else.

    Args:
        total: steps of the whole training; 0 for a supernet that is only read.
    """

    def __init__(self, run: Run[NASRecConfig], total: int = 0) -> None:
        search = run.config.search
        self.context, self.seed, self.sampling = run.context, run.config.run.seed, search.sampling
        self.space = search.space.make()
        self.model = ArchitectureSupernet(run.config, run.schema, self.space, run.context)
        self.l2 = run.config.optim.embedding_l2
        self.warmup = int(search.sampling.warmup * total)
        # Of the whole supernet an evaluation would take as long as an epoch: one small network is watched.
        self._watched = prune(draw(self.space, "single_operator_single_connection", np.random.default_rng(self.seed)))
        own = {f"search.sampling.{k}": v for k, v in dataclasses.asdict(search.sampling).items()}
        self.settings: dict[str, Any] = {
            "model.init_std": run.config.model.init_std,
            "search.space": self.space.to_json(),
            **own,
        }

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        s, context = self.sampling, self.context
        ranks = [0] if s.same_network else range(context.world_size)
        drawn = [
            prune(training_architecture(self.space, s.scheme, self.seed, step, r, self.warmup, s.set_size))
            for r in ranks
        ]
        self.model.others = None if s.same_network else drawn
        u = self.model.embed(batch)
        logits = self.model.head(drawn[0 if s.same_network else context.rank], batch.dense, u)
        loss = binary_cross_entropy_with_logits(logits, batch.label)
        if not s.same_network:
            loss = loss + 0.0 * u.sum()  # the tables' gradients are exchanged on all ranks or on none
        return loss + self.l2 * u.square().sum() / batch.size if self.l2 else loss

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits of one small network, the same all through training: a curve to watch."""
        return self.model(batch, self._watched)

    def after_step(self, step: int, monitor: Monitor) -> None:
        pass

    def after_skip(self) -> None:
        self.model.head.live = None

    def state(self) -> dict[str, Any]:
        return {"warmup": self.warmup}

    def load_state(self, state: dict[str, Any]) -> None:
        self.warmup = int(state["warmup"])


class SupernetStage(Stage[NASRecConfig]):
    """Trains the supernet and leaves its checkpoint under ``checkpoints/supernet``."""

    name = STAGE

    def inputs(self, run: Run[NASRecConfig]) -> dict[str, Any]:
        search = run.config.search
        own = {"search.space": search.space.make().to_json(), "search.sampling": search.sampling}
        trained = training_inputs(run, "search.supernet", search.supernet)
        return {**trained, "model.init_std": run.config.model.init_std, **own}

    def run(self, run: Run[NASRecConfig]) -> None:
        search = run.config.search
        training = run.stream("train", search.supernet.batch_size, shuffle=True)
        validation = run.stream("validation", search.supernet.eval_batch_size, shuffle=False)
        task = SupernetTask(run, search.supernet.total_steps(training.batches_per_epoch))
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            count = sum(p.numel() for p in task.model.head.parameters())
            monitor.say(
                f"supernet: {task.space.blocks} blocks, {count:,} weights behind {len(run.schema.fields)} fields, "
                f"{search.sampling.scheme}, {run.context.world_size} rank(s)"
            )
            root, optim = gated.checkpoint_root(run, STAGE), run.config.optim
            Trainer(task, search.supernet, optim, training, validation, run.context, monitor, root).fit()


def load_supernet(run: Run) -> SupernetTask:
    """The finished supernet of a run directory: its last weights.

    Raises:
        UserError: they are missing or damaged.
    """
    task = SupernetTask(run)
    gated.load(run, STAGE, task, best=False)
    return task
