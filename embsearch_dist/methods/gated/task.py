"""Search stages that train tables and head beside a selector: iHAS's gates, AdaFS's controller.

First the model is trained with everything open (``pretrain_epochs``); then ordinary batches train tables and head
under what the selector chooses, and every ``every``-th step a held-out batch trains the selector.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.methods.gated.config import OuterConfig
from embsearch_dist.methods.gated.model import GatedModel
from embsearch_dist.methods.stages import training_inputs
from embsearch_dist.models.rows import fill_rows
from embsearch_dist.run import Run
from embsearch_dist.train.bilevel import HeldOut, frozen
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.position import Progress
from embsearch_dist.train.task import Task
from embsearch_dist.train.trainer import Trainer

PICTURES = 40  # of a selector over a whole training


class GatedTask(ABC):
    """A :class:`embsearch_dist.train.bilevel.BilevelTask` over a :class:`GatedModel`; a method says what is selected.

    Args:
        run: config, schema and ranks.
        model: with the selector in it.
        outer: see :class:`OuterConfig`.
        training: of the search stage; None for a model that is only read.
        own: the method's settings that the result depends on.
    """

    part: ClassVar[str] = ""
    """What the selector is called in a model directory; empty: the searched model is not served."""

    def __init__(
        self, run: Run, model: GatedModel, outer: OuterConfig, training: TrainConfig | None, own: dict[str, Any]
    ) -> None:
        self.run, self.model, self.outer = run, model, outer
        self.l2, self.outer_lr = run.config.optim.embedding_l2, outer.lr
        settings = {f"model.{k}": v for k, v in run.config.model.settings().items()}
        settings |= {f"outer.{k}": v for k, v in dataclasses.asdict(outer).items()}
        self.settings: dict[str, Any] = {**settings, "width": model.width, **own}
        self.steps, self.warmup = 0, 0
        self.total = 0  # steps of the whole training; 0, like ``warmup``, in a model that is only read
        self.batches: BatchStream | None = None
        self._held_out: HeldOut | None = None
        if training is not None:
            self.batches = run.stream("train", training.batch_size, shuffle=True)
            self.warmup = int(outer.pretrain_epochs * self.batches.batches_per_epoch)
            self.total = training.total_steps(self.batches.batches_per_epoch)
            held_out = run.stream("validation", training.batch_size, shuffle=True)
            self._held_out = HeldOut(held_out, run.context.device)

    def select_none(self, u: torch.Tensor) -> torch.Tensor:
        """``u`` as it is used while nothing is selected yet."""
        return u

    def selection(self) -> dict[str, Any]:
        """What the description of a served model says of how rows are weighed; only asked where it is served."""
        raise NotImplementedError

    @abstractmethod
    def select(self, u: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        """``u [B, F, d]`` weighed for an ordinary step; the selector's parameters get no gradient here."""

    @abstractmethod
    def select_outer(self, u: torch.Tensor, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``u`` weighed by ``model.selector``, for its own step, and what is added to the loss (a regulariser)."""

    @abstractmethod
    def select_final(self, u: torch.Tensor, batch: Batch) -> torch.Tensor:
        """``u`` weighed without chance, as at inference; it may have rows of zeros behind those of ``batch``."""

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        u = self.model.embed(batch)
        with frozen(self.model.outer_parameters):
            weighed = self.select(u, batch, step) if step >= self.warmup else self.select_none(u)
        loss = binary_cross_entropy_with_logits(self.model.head(batch.dense, weighed), batch.label)
        return loss + self.l2 * u.square().sum() / batch.size if self.l2 else loss

    def held_out(self, step: int) -> Batch | None:
        """The held-out batch of the outer step that is due after ``step`` ordinary steps; None where none is."""
        since = step - self.warmup
        if since <= 0 or since % self.outer.every or self._held_out is None:
            return None
        return self._held_out.batch(since // self.outer.every - 1)

    def outer_loss(self, step: int) -> torch.Tensor | None:
        batch = self.held_out(step)
        if batch is None:
            return None
        # Held-out rows are normalised as at inference: they must not move the model's statistics.
        for module in self.model.normed:
            module.eval()
        try:
            with torch.no_grad():
                u = self.model.embed(batch)
            weighed, extra = self.select_outer(u, batch, step)
            logits = self.model.bare_head(batch.dense, weighed)
        finally:
            for module in self.model.normed:
                module.train()
        loss = binary_cross_entropy_with_logits(logits, batch.label)
        assert self._held_out is not None
        return (loss if extra is None else loss + extra) * self._held_out.stream.weight(batch)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits as at inference; while nothing is selected yet, with everything open."""
        with torch.no_grad():
            u, dense = fill_rows(self.model.embed(batch)), fill_rows(batch.dense)
            u = self.select_none(u) if self.steps <= self.warmup else self.select_final(u, batch)
            return self.model.bare_head(dense, u)[: batch.size]

    def close(self) -> None:
        """Let go of the held-out batches; the next outer step, if there is one, opens them again."""
        if self._held_out is not None:
            self._held_out.close()

    @property
    def between_pictures(self) -> int:
        """Steps from one picture of the selector to the next, a multiple of the outer steps' distance."""
        return self.outer.every * max(1, (self.total - self.warmup) // (self.outer.every * PICTURES))

    def picture_due(self, step: int) -> bool:
        """Whether the selector, which learns behind the warm-up, is to be drawn after this step."""
        return step > self.warmup and (step - self.warmup) % self.between_pictures == 0

    def after_step(self, step: int, monitor: Monitor) -> None:
        self.steps = step

    def after_skip(self) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "warmup": self.warmup}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps, self.warmup = int(state["steps"]), int(state["warmup"])


def checkpoint_root(run: Run, stage: str) -> Path:
    return run.dir / "checkpoints" / stage


def inputs_of(run: Run, training: TrainConfig, own: dict[str, Any]) -> dict[str, Any]:
    """All that a search stage's result depends on, for the stage's mark."""
    return {**training_inputs(run, "search.training", training), "model": run.config.model.settings(), **own}


def train(run: Run, stage: str, task: GatedTask, training: TrainConfig, lines: Sequence[str]) -> Progress:
    """Train a search stage to its end, from where it stood; its best checkpoint is marked.

    Raises:
        UserError: the training is too short for a step in which anything is selected, or for a held-out batch, from
            which alone the selector learns.
    """
    batches = task.batches
    assert batches is not None
    if task.warmup >= task.total:
        raise UserError(_nothing_left(task, training, batches.batches_per_epoch))
    if (left := task.total - task.warmup) < task.outer.every:
        raise UserError(
            f"config key search.outer.every: a held-out batch is due behind each {task.outer.every} ordinary ones, and "
            f"the training has {left} behind its pretraining, so nothing would be learned about what to select. Lower "
            "it, train longer (search.training.epochs), or lower search.training.batch_size"
        )
    validation = run.stream("validation", training.eval_batch_size, shuffle=False)
    with Monitor(run.dir, stage, run.context.rank) as monitor:
        for line in lines:
            monitor.say(line)
        optim, root = run.config.optim, checkpoint_root(run, stage)
        try:
            return Trainer(task, training, optim, batches, validation, run.context, monitor, root).fit()
        finally:
            task.close()


def _nothing_left(task: GatedTask, training: TrainConfig, per_epoch: int) -> str:
    """What to say when pretraining takes all steps: the key that ends the training is the one to raise."""
    pretrained = task.outer.pretrain_epochs
    if task.total < per_epoch * training.epochs:
        return (
            f"config key search.training.steps: {training.steps} steps end before the {task.warmup} of pretraining do "
            f"(search.outer.pretrain_epochs: {pretrained:g}, at {per_epoch} steps an epoch), so nothing is ever "
            "selected. Raise it, or lower search.outer.pretrain_epochs"
        )
    return (
        f"config key search.outer.pretrain_epochs: {pretrained:g} of {training.epochs} epochs "
        "(search.training.epochs) leave none in which anything is selected. Lower it, or train longer"
    )


def load(run: Run, stage: str, task: Task, best: bool) -> None:
    """Put a finished search stage's weights into ``task.model``: the best ones or the last.

    Raises:
        UserError: they are missing or damaged.
    """
    root = checkpoint_root(run, stage)
    checkpointer = Checkpointer(
        root, task.model, None, run.context, schema=run.schema.fingerprint, data=run.schema.data
    )
    step = checkpointer.best() if best else checkpointer.newest()
    mark = run.dir / "stages" / f"{stage}.json"
    mend = f"To train on from the last whole checkpoint, delete {mark} and give the command again"
    if step is None:
        raise UserError(f"{root} holds no checkpoint of the {stage}. {mend}")
    try:
        state = checkpointer.load(step, optimizers=False)
    except UserError as e:
        raise UserError(f"{e}. {mend}", everywhere=e.everywhere) from e
    task.load_state(state["task"])
    task.model.eval()
