"""The one training loop: supernets and found models alike."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from embsearch_dist.config import OptimConfig, TrainConfig
from embsearch_dist.data.batch import Batch
from embsearch_dist.data.dataset import BatchStream
from embsearch_dist.dist.context import Context
from embsearch_dist.errors import UserError
from embsearch_dist.models.ctr import CTRModel
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor


class Task(Protocol):
    """What is trained. The trainer knows nothing else of a method."""

    @property
    def model(self) -> CTRModel:
        """Tables and head."""

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        """Mean loss of this rank's batch; ``step`` counts the steps already done."""

    def predict(self, batch: Batch) -> torch.Tensor:
        """Logits ``[B]`` in evaluation mode."""

    def after_step(self, step: int, monitor: Monitor) -> None:
        """Called once the parameters are updated; ``step`` counts this one too."""

    def state(self) -> dict[str, Any]:
        """JSON-able state beside the parameters (samplers, counters)."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""


@dataclass
class Progress:
    """Where training stands: all of it is in every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_step: int = 0
    bad_evals: int = 0
    lr_factor: float = 1.0
    stopped: str = ""
    seconds: float = 0.0


class Trainer:
    """Trains a task over the batches of two streams and leaves its best checkpoint.

    Stops after ``epochs`` or ``steps``, or after ``patience`` evaluations without a better metric.
    Continues from the last whole checkpoint under ``root`` if there is one.

    Raises:
        UserError: loss not finite on some rank. It is found before backward, hence before any fused
            optimizer has written to a table.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        optim: OptimConfig,
        training: BatchStream,
        validation: BatchStream | None,
        context: Context,
        monitor: Monitor,
        root: Path,
    ) -> None:
        self.task, self.config, self.training, self.validation = task, config, training, validation
        self.context, self.monitor = context, monitor
        head = task.model.bare_head.parameters()
        self.optimizer = torch.optim.Adam(head, lr=optim.dense_lr, weight_decay=optim.weight_decay, fused=True)
        self.checkpointer = Checkpointer(root, task.model, self.optimizer, context)
        self.progress = Progress()
        self.total = training.batches_per_epoch * config.epochs
        if config.steps:
            self.total = min(self.total, config.steps)
        parts, per_epoch = config.evals_per_epoch, training.batches_per_epoch
        self.eval_batches = {math.ceil(per_epoch * (k + 1) / parts) for k in range(parts)}

    def fit(self) -> Progress:
        """Train to the end (or from where it stopped); the model holds the last weights afterwards."""
        self._resume()
        p = self.progress
        loss_sum = torch.zeros((), dtype=torch.float64)
        logged = (p.step, time.monotonic())
        with self.monitor.progress(self.total, "steps", initial=p.step) as bar:
            while p.step < self.total and not p.stopped:
                for batch in self.training.epoch(p.epoch, start_batch=p.batch):
                    started = time.monotonic()
                    self.task.model.train()
                    loss = self._step(batch.to(self.context.device))
                    p.step, p.batch = p.step + 1, batch.position.batch
                    p.seconds += time.monotonic() - started
                    loss_sum += loss
                    bar.update(1, loss=loss)
                    self.task.after_step(p.step, self.monitor)
                    if p.step % self.config.log_every == 0:
                        now = time.monotonic()
                        rate = (p.step - logged[0]) * self.config.batch_size / (now - logged[1])
                        self._log(float(loss_sum) / (p.step - logged[0]), rate)
                        loss_sum.zero_()
                        logged = (p.step, now)
                    if p.batch in self.eval_batches or p.step >= self.total:
                        paused = time.monotonic()
                        self._evaluate_and_save()
                        logged = (logged[0], logged[1] + time.monotonic() - paused)
                    if p.stopped or p.step >= self.total:
                        break
                p.epoch, p.batch = p.epoch + 1, 0
        return p

    def restore_best(self) -> None:
        """Put the weights of the best checkpoint back into the model."""
        best = self.checkpointer.best()
        if best is not None:
            self.task.load_state(self.checkpointer.load(best, optimizers=False)["task"])

    def _resume(self) -> None:
        steps = self.checkpointer.steps()
        if not steps:
            self.monitor.resume_at(0)
            return
        state = self.checkpointer.load(steps[-1])
        self.progress = Progress(**state["progress"])
        self.task.load_state(state["task"])
        self._scale_lr(self.progress.lr_factor)
        if self.progress.best_step in steps or self.validation is None:
            # A kill between saving a checkpoint and marking it as the best leaves the old mark.
            self.checkpointer.mark_best(self.progress.best_step or steps[-1])
        self.monitor.resume_at(self.progress.step)
        self.monitor.say(f"continuing from {self.checkpointer.root / f'step-{steps[-1]}'}")
        p = self.progress
        if p.batch >= self.training.batches_per_epoch:
            p.epoch, p.batch = p.epoch + 1, 0

    def _step(self, batch: Batch) -> float:
        # Dropout of a step depends on the step alone, so that a continued run draws what the unbroken one did.
        torch.manual_seed((self.training.seed * 1_000_003 + self.progress.step) * 1021 + self.context.rank)
        self.optimizer.zero_grad(set_to_none=True)
        self.task.model.sharded.zero_grad()
        loss = self.task.loss(batch, self.progress.step)
        mean = self._agree_on_loss(loss, batch)
        loss.backward()
        self.optimizer.step()
        self.task.model.sharded.step()
        return mean

    def _agree_on_loss(self, loss: torch.Tensor, batch: Batch) -> float:
        """Mean loss over ranks; every rank stops when one of them is not finite."""
        value = loss.detach()
        world, rank = self.context.world_size, self.context.rank
        if world == 1:
            mean, bad = float(value), []
            if not math.isfinite(mean):
                bad = [0]
        else:
            report = torch.zeros(1 + world, dtype=torch.float64, device=value.device)
            finite = bool(torch.isfinite(value))
            report[0] = value.double() if finite else 0.0
            report[1 + rank] = 0.0 if finite else 1.0
            dist.all_reduce(report)
            mean = float(report[0]) / world
            bad = torch.nonzero(report[1:]).flatten().tolist()
        if bad:
            kept, at = self.checkpointer.steps(), batch.position
            last = f"the last checkpoint is {self.checkpointer.root}/step-{kept[-1]}" if kept else "no checkpoint yet"
            error = UserError(
                f"loss is not finite at step {self.progress.step} on rank {bad[0]} "
                f"(epoch {at.epoch}, batch {at.batch - 1}): stopped before any table was written; {last}. "
                "Lower --optim.embedding_lr and --optim.dense_lr, or look at the dense columns of that batch"
            )
            error.everywhere = True
            raise error
        return mean

    def _log(self, loss: float, rate: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = peak / (1024 if sys.platform != "darwin" else 1 << 20)
        if self.context.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / (1 << 20)
        lr = self.optimizer.param_groups[0]["lr"]
        values = {"loss": loss, "lr": lr, "samples_per_s": rate, "memory_mb": memory}
        self.monitor.scalars(self.progress.step, values, epoch=self._epochs())

    def _epochs(self) -> float:
        return round(self.progress.epoch + self.progress.batch / self.training.batches_per_epoch, 4)

    def _evaluate_and_save(self) -> None:
        p = self.progress
        if self.validation is not None:
            self.task.model.eval()
            metrics = evaluate(self.task.predict, self.validation.epoch(0), self.context)
            self.monitor.scalars(p.step, metrics, split="validation", epoch=self._epochs())
            sign = 1 if self.config.metric == "auc" else -1
            value = sign * metrics[self.config.metric]
            better = p.best is None or value > p.best
            if better:
                p.best, p.best_step, p.bad_evals = value, p.step, 0
            else:
                p.bad_evals += 1
                if self.config.patience and p.bad_evals >= self.config.patience:
                    p.stopped = f"no better {self.config.metric} in {p.bad_evals} evaluations"
                elif self.config.lr_cut < 1:
                    p.lr_factor *= self.config.lr_cut
                    self._scale_lr(self.config.lr_cut)
            mark = " (best)" if better else ""
            self.monitor.say(
                f"epoch {self._epochs():g}  step {p.step}  validation auc {metrics['auc']:.5f}  "
                f"logloss {metrics['logloss']:.5f}{mark}"
            )
        self.checkpointer.save(p.step, {"progress": vars(p), "task": self.task.state()})
        if self.validation is None or p.best_step == p.step:
            self.checkpointer.mark_best(p.step)

    def _scale_lr(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        self.task.model.sharded.scale_lr(factor)
