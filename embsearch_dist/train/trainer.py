"""The one training loop: supernets and found models alike."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch

from embsearch_dist.config.sections import OptimConfig, TrainConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.load.feeding import with_next
from embsearch_dist.errors import Diverged, UserError
from embsearch_dist.ranks.context import Context
from embsearch_dist.stores.mirroring import settle
from embsearch_dist.train import faults, signals
from embsearch_dist.train.bilevel import BilevelTask, frozen
from embsearch_dist.train.checkpoint import Checkpointer, SaveError
from embsearch_dist.train.guard import Gate, Verdict, agree
from embsearch_dist.train.metrics import beside_click_rate, check_group, evaluate, shown
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.position import Progress, schedule
from embsearch_dist.train.seeding import seed_step
from embsearch_dist.train.task import Judge, Task

SAVE_FAILURES = 3  # so many checkpoints in a row may fail before training stops: nothing would be left of it


class Trainer:
    """Trains a task over the batches of two streams and leaves its best checkpoint.

    Stops after ``epochs`` or ``steps``, or after ``patience`` evaluations without a better metric.
    Continues from the last whole checkpoint under ``root`` if there is one.

    Raises:
        UserError: loss or gradient not finite on some rank (found before any weight is written), or
            checkpoints that can be neither read nor, several times in a row, written.
        StoppedBySignal: all ranks have saved after the same step.
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
        check_group(training.schema, config.group)
        self.task, self.config, self.training, self.validation = task, config, training, validation
        self.context, self.monitor = context, monitor
        self.faults = faults.from_environment(context.rank, monitor.stage)
        self._head = list(task.model.bare_head.parameters())
        self._outer = list(task.model.outer_parameters)
        outer_lr = cast(BilevelTask, task).outer_lr if self._outer else 0.0
        self.optimizer = task.model.make_optimizer(optim, outer_lr)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.clip_norm = optim.clip_norm
        settings = {f"optim.{k}": v for k, v in dataclasses.asdict(optim).items()} | task.settings
        settings |= {"batch_size": training.global_batch, "run.seed": training.seed}
        settings |= {"schedule": config.schedule, "warmup": config.warmup}
        self.checkpointer = Checkpointer(
            root,
            task.model,
            self.optimizer,
            context,
            config.keep_checkpoints,
            schema=training.schema.fingerprint,
            data=training.schema.data,
            settings=settings | {"data.window_rows": training.window_rows},
            faults=self.faults,
            say=monitor.say,
        )
        self.progress = Progress()
        self.total = config.total_steps(training.batches_per_epoch)
        parts, per_epoch = config.evals_per_epoch, training.batches_per_epoch
        self.eval_batches = {math.ceil(per_epoch * (k + 1) / parts) for k in range(parts)}
        self._schedule = 1.0  # factor that the optimizers have now
        self._failures = 0  # saves in a row
        self._best_before: tuple[float | None, int | None, list[float] | None] = (None, None, None)
        self._began: Callable[[dict[str, float]], None] | None = None
        self._told_metric = False

    def fit(self, began: Callable[[dict[str, float]], None] | None = None) -> Progress:
        """Train to the end (or from where it stopped); the model holds the last weights afterwards.

        Args:
            began: the weights are those of an earlier model: they are evaluated before the first step, may be the best
                ones, and ``began`` is told their figures before they are saved. It is not called where a training is
                continued.
        """
        self._began = began
        with signals.noted() as self._asked, Gate(self.task.model.sharded) as self._gate:
            try:
                self._resume()
                self._train()
            finally:
                self.checkpointer.close()
            # A signal that came in the last step has not been heard by the others yet.
            asked = torch.tensor([float(bool(self._asked.name))], device=self.context.device)
            if float(self.context.sum(asked)):
                self._leave()
        return self.progress

    def _train(self) -> None:
        p = self.progress
        if p.evaluate:
            self._evaluate_and_save()
        logged = (p.step, time.monotonic())
        with self.monitor.progress(self.total, "steps", initial=p.step) as bar:
            while p.step < self.total and not p.stopped:
                for batch, following in self._batches():
                    started = time.monotonic()
                    if not self.task.model.training:  # it asks every module, each time
                        self.task.model.train()
                    self.task.model.sharded.exchange.expect(None if following is None else following.sparse)
                    verdict = self._step(batch)
                    p.step, p.batch = p.step + 1, batch.position.batch
                    p.seconds += time.monotonic() - started
                    if verdict.what:
                        bar.update(1)
                        self.task.after_skip()
                    else:
                        p.loss_sum, p.loss_count = p.loss_sum + verdict.loss, p.loss_count + 1
                        bar.update(1, loss=verdict.loss)
                        self._outer_step()
                        self.task.after_step(p.step, self.monitor)
                    if p.step % self.config.log_every == 0:
                        now = time.monotonic()
                        rate = (p.step - logged[0]) * self.config.batch_size / (now - logged[1])
                        self._log(p.loss_sum / p.loss_count if p.loss_count else math.nan, rate)
                        p.loss_sum, p.loss_count = 0.0, 0
                        logged = (p.step, now)
                    if self.faults is not None:
                        self.faults.at_step(p.step)
                    paused = time.monotonic()
                    self._pause(verdict.stop)
                    logged = (logged[0], logged[1] + time.monotonic() - paused)
                    if p.stopped or p.step >= self.total:
                        break
                p.epoch, p.batch = p.epoch + 1, 0

    def _batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        """The rest of the epoch on the device; each batch with the one after it where that is begun beforehand."""
        p, device = self.progress, self.context.device
        rest = (b.to(device) for b in self.training.epoch(p.epoch, start_batch=p.batch))
        if not self.task.model.sharded.exchange.ahead:
            yield from ((batch, None) for batch in rest)
            return
        for batch, following in with_next(rest):
            yield batch, following if p.step + 1 < self.total else None

    def _pause(self, stop: bool) -> None:
        """What is due between two steps: evaluate, save, leave."""
        p = self.progress
        p.evaluate = p.batch in self.eval_batches or p.step >= self.total
        if stop:
            # Evaluating may take longer than a scheduler waits: that is left to the continued run.
            self._save(must=True)
            self._leave()
        if p.evaluate:
            self._evaluate_and_save()
        elif self.config.save_every and p.step % self.config.save_every == 0:
            self._save()

    def _leave(self) -> None:
        settle(self.context)
        name, step = self._asked.name or "a signal to another rank", self.progress.step
        raise signals.StoppedBySignal(
            f"stopped by {name} after step {step}; {self.checkpointer.root}/step-{step} is whole, "
            "give the same command again to continue"
        )

    def restore_best(self) -> None:
        """Put the weights of the best checkpoint back into the model."""
        best = self.checkpointer.best()
        if best is not None:
            self.task.load_state(self.checkpointer.load(best, optimizers=False)["task"])

    def _resume(self) -> None:
        step = self.checkpointer.newest_whole()
        if step is None:
            self.monitor.resume_at(-1)
            self.progress.evaluate = self._began is not None and self.validation is not None
            return
        state = self.checkpointer.load(step, checked=True)
        self.progress = p = Progress(**state["progress"])
        self.task.load_state(state["task"])
        self._set_lr(self._schedule)
        self._resume_best(step)
        self.monitor.resume_at(p.step, state.get("lines"))
        self.monitor.say(f"continuing from {self.checkpointer.root / f'step-{step}'}")
        if p.batch >= self.training.batches_per_epoch and not p.evaluate:
            p.epoch, p.batch = p.epoch + 1, 0

    def _resume_best(self, step: int) -> None:
        """Mark the best checkpoint again: a kill between a save and its mark, or damage, leaves a wrong one."""
        p = self.progress
        over = p.step >= self.total or bool(p.stopped)
        if p.best_step is not None and p.best_step != step and not self.checkpointer.is_whole(p.best_step):
            kept = "the last one counts as the best" if over else "the best of the evaluations to come counts"
            place = self.checkpointer.root / f"step-{p.best_step}"
            self.monitor.say(f"the best checkpoint, step-{p.best_step}, is gone or damaged; {kept} ({place})")
            p.no_best()
        if p.best_step is not None or over:
            self.checkpointer.mark_best(step if p.best_step is None else p.best_step)

    def _step(self, batch: Batch) -> Verdict:
        # Dropout of a step depends on the step alone, so that a continued run draws what the unbroken one did.
        step, model = self.progress.step, self.task.model
        self._follow_schedule()
        seed_step((self.training.seed * 1_000_003 + step) * 1021 + self.context.rank, self.context.device)
        self.optimizer.zero_grad(set_to_none=True)
        model.sharded.zero_grad()
        buffers = {}
        if self.config.skip_bad_batches:  # running statistics have seen the batch before anybody knows it is bad
            buffers = {b: b.clone() for b in model.replicated.buffers()}
        loss = self.task.loss(batch, step)
        if (weight := self.training.weight(batch)) != 1:  # ranks are averaged, and one may have a row more
            loss = loss * weight
        if self.faults is not None:
            loss = self.faults.loss(loss, step)
        model.sharded.exchange.begin()
        loss.backward()
        gradients, asked = self._gate.gradients(), bool(self._asked.name)
        dense = model.after_backward()
        verdict = agree(self.context, loss, gradients, dense, asked)
        model.sharded.exchange.advance()
        if verdict.what:
            self._gate.clear()
            self._skip_or_stop(verdict, batch)
            for buffer, value in buffers.items():
                buffer.copy_(value)
            return verdict
        self._gate.pass_on()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(dense, self.clip_norm)
        self.optimizer.step()
        model.sharded.step()
        return verdict

    def _outer_step(self) -> None:
        """Train the outer parameters, and them alone, on held-out rows, if the task says that it is time."""
        if not self._outer:
            return
        step, task = self.progress.step, cast(BilevelTask, self.task)
        seed_step((self.training.seed * 1_000_003 + step) * 1021 + self.context.rank + 509, self.context.device)
        with frozen(self._head):
            loss = task.outer_loss(step)
            if loss is None:
                return
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        verdict = agree(self.context, loss, [], self._outer, False)
        if verdict.what:
            raise UserError(
                f"held-out {verdict.what} is not finite after step {step} on rank {verdict.rank}: stopped before any "
                "selector was written. Lower its learning rate, or look at the dense columns of the validation split",
                everywhere=True,
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _skip_or_stop(self, verdict: Verdict, batch: Batch) -> None:
        """Count a batch as skipped on all ranks, or raise on all ranks."""
        p, at, limit = self.progress, batch.position, self.config.skip_bad_batches
        where = f"on rank {verdict.rank} (epoch {at.epoch}, batch {at.batch - 1})"
        text = f"{verdict.what} is not finite at step {p.step} {where}"
        if p.skipped < limit:
            p.skipped += 1
            self.monitor.say(f"{text}: batch skipped, {p.skipped} of at most {limit}")
            return
        kept = self.checkpointer.steps()
        last = f"the last checkpoint is {self.checkpointer.root}/step-{kept[-1]}" if kept else "no checkpoint yet"
        before = f"; {p.skipped} batches were skipped before (skip_bad_batches)" if limit else ""
        raise Diverged(
            f"{text}: stopped before any table was written; {last}{before}. "
            "Lower --optim.embedding_lr and --optim.dense_lr, or look at the dense columns of that batch",
            everywhere=True,
        )

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
            own = self.task.judge() if isinstance(self.task, Judge) else None
            metrics = own or evaluate(self.task.predict, self.validation.epoch(0), self.context, self.config.group)
            self.monitor.scalars(p.step, metrics, split="validation", epoch=self._epochs())
            bad, metric = p.bad_evals, self._metric(metrics)
            value = (1 if metric == "auc" else -1) * metrics[metric]
            early = bool(self._outer) and p.step <= cast(BilevelTask, self.task).warmup
            before = (p.best, p.best_step, p.peak)
            better = not early and p.count(value, metrics["logloss"])
            if better:
                self._best_before = before
            if p.bad_evals > bad:
                if self.config.patience and p.bad_evals >= self.config.patience:
                    p.stopped = f"no better {metric} in {p.bad_evals} evaluations"
                elif self.config.lr_cut < 1:
                    p.lr_factor *= self.config.lr_cut
                    self._set_lr(self._schedule)
            mark = " (best)" if better else " (nothing is selected yet)" if early else ""
            if p.step == 0 and self._began is not None:
                self._began(metrics)
            else:
                self.monitor.say(
                    f"epoch {self._epochs():g}  step {p.step}  validation auc {shown(metrics['auc'])}  "
                    f"logloss {metrics['logloss']:.5f}{mark}"
                )
        p.evaluate = False
        over = p.step >= self.total or bool(p.stopped)
        if over and p.best_logloss is not None:
            note = beside_click_rate(self.training.schema, p.best_logloss) if self.config.metric == "auc" else ""
            if note:
                self.monitor.say(note)
        if over and p.best_step is None and self.validation is not None:
            self.monitor.say("no evaluation gave a number to select by, so the last checkpoint counts as the best")
            p.best_step = p.step
        self._save(best=self.validation is None or p.best_step == p.step, must=over)

    def _metric(self, metrics: dict[str, float]) -> str:
        """What selects: the metric of the config, or logloss where AUC is undefined."""
        if self.config.metric != "auc" or not math.isnan(metrics["auc"]):
            return self.config.metric
        if not self._told_metric:
            self._told_metric = True
            self.monitor.say("validation rows are of one class only, so AUC is undefined: logloss selects")
        return "logloss"

    def _save(self, best: bool = False, must: bool = False) -> None:
        """Write a checkpoint; ``must``: the run ends here, so it has to be on disk, and in time."""
        p = self.progress
        try:
            if self.checkpointer.wait() is not None:
                self._failures = 0
        except SaveError as e:
            self._not_saved(e, must=False)
        background = self.config.async_save and not must
        try:
            state = {"progress": vars(p), "task": self.task.state(), "lines": self.monitor.lines}
            self.checkpointer.save(p.step, state, best, background)
        except SaveError as e:
            self._not_saved(e, must)
            return
        if not background:
            self._failures = 0

    def _not_saved(self, error: SaveError, must: bool) -> None:
        """Go on without that checkpoint, unless it was needed or too many are missing by now."""
        p = self.progress
        self._failures += 1
        if p.best_step == error.step:  # what was never saved cannot be the best
            p.best, p.best_step, p.peak = self._best_before
            p.best_logloss = None
        disk = "Free or enlarge the disk, then give" if error.disk else "Mend that, then give"
        again = f"{disk} the same command again"
        if must or self.config.on_save_error == "stop" or self._failures >= SAVE_FAILURES:
            failed = f" ({self._failures} in a row)" if self._failures > 1 else ""
            raise SaveError(error.step, f"{error}{failed}. {again}", error.disk) from error
        self.monitor.say(f"{error}. Training goes on; after {SAVE_FAILURES} such failures in a row it stops")

    def _follow_schedule(self) -> None:
        """The learning rates of the step to come, a function of its number."""
        factor = schedule(self.config, self.progress.step, self.total)
        if factor != self._schedule:
            self._set_lr(factor)

    def _set_lr(self, schedule: float) -> None:
        self._schedule, factor = schedule, schedule * self.progress.lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.task.model.sharded.set_lr(factor)
