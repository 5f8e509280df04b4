"""Train the model of an allocation from scratch (AdaS&S section 3.3) or from an earlier one, and evaluate it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError, script
from embsearch_dist.files import write_sealed
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.evaluation import Evaluation, rows_left_out
from embsearch_dist.train.figures import Wanted, told
from embsearch_dist.train.lines import lines_of
from embsearch_dist.train.metrics import figures, predictions, shown
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer
from embsearch_dist.train.warm.ids import Data
from embsearch_dist.train.warm.start import Start, write_record
from embsearch_dist.train.warm.start import begin as begin_with

STAGE = "retrain"


class SubnetTask:
    """The mixed-width model of one allocation; UES is the allocation of one width."""

    def __init__(
        self, config: Config, allocation: Allocation, context: Context, model: SubnetModel | None = None
    ) -> None:
        """``model``: the allocation's, built otherwise than usual; None for the usual one."""
        self.model = model or SubnetModel(config, allocation, context)
        self.l2 = config.optim.embedding_l2
        # Of the allocation the widths count, wherever its file lies; of the architecture its key.
        settings = {f"model.{k}": v for k, v in config.model.settings().items() if k != "allocation"}
        backbone = self.model.bare_head.backbone
        if isinstance(backbone, ArchitectureNetwork):
            settings["model.architecture"] = backbone.key
        else:
            del settings["model.layer_norm"]  # nothing reads it
        self.settings: dict[str, Any] = {**settings, "widths": allocation.widths}
        if allocation.values:
            self.settings["values"] = {n: kept.digest for n, kept in allocation.values.items()}

    def loss(self, batch: Batch, step: int) -> torch.Tensor:
        logits, pooled = self.model(batch)
        loss = binary_cross_entropy_with_logits(logits, batch.label)
        if self.l2:
            loss = loss + self.l2 * torch.stack([g.square().sum() for g in pooled.used()]).sum() / batch.size
        return loss

    def predict(self, batch: Batch) -> torch.Tensor:
        return self.model(batch)[0]

    def after_step(self, step: int, monitor: Monitor) -> None:
        pass

    def after_skip(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


def retrain(
    config: Config,
    allocation: Allocation,
    training: BatchStream,
    validation: BatchStream | None,
    context: Context,
    directory: Path,
    quiet: bool = False,
    begin: Callable[[SubnetTask], None] | None = None,
    start: Start | None = None,
) -> SubnetTask:
    """Train to the early stop and return the task with its best weights; continues if it was stopped.

    Without ``validation`` nothing is evaluated, and the last weights count.

    ``begin`` may set initial values, or they come from an earlier training, ``start``, whose weights are the result
    where no evaluation is better than theirs; a checkpoint that is there replaces them.
    """
    torch.manual_seed(config.run.seed)  # dropout
    task = SubnetTask(config, allocation, context)
    if begin is not None:
        begin(task)
    with Monitor(directory, STAGE, context.rank, quiet) as monitor:
        monitor.say(
            f"retrain: {len(allocation.kept)} fields, {allocation.total('parameters'):,} embedding parameters, "
            f"{task.model.dense_count():,} dense parameters, {context.world_size} rank(s)"
        )
        trainer = Trainer(
            task, config.train, config.optim, training, validation, context, monitor, directory / "checkpoints" / STAGE
        )
        began = None
        if start is not None and context.share(trainer.checkpointer.newest()) is None:
            began = _start(start, trainer, allocation, directory)
        progress = trainer.fit(began)
        if progress.best_step == 0:
            monitor.say(
                "no evaluation was better than that of the model it began with, whose weights are kept (step 0)"
            )
        trainer.restore_best()
        write: dict[str, Any] = {"seconds": progress.seconds, "steps": progress.step, "best_step": progress.best_step}
        write |= {"lines": lines_of(directory, STAGE)} if context.rank == 0 else {}
        write |= rows_left_out(training) | ({"data": training.schema.data} if training.schema.data else {})
        context.first("writing training.json", lambda: write_sealed(directory / "training.json", write))
    return task


def _start(
    start: Start, trainer: Trainer, allocation: Allocation, directory: Path
) -> Callable[[dict[str, float]], None]:
    """Begin with an earlier model; returns what records its figures on the validation split."""
    task, context, training = trainer.task, trainer.context, trainer.training
    new = Data(training.shards.directory.parent, training.schema)
    done = begin_with(start, task, trainer.optimizer, trainer.checkpointer.settings, new, allocation, context)

    def record(metrics: dict[str, float]) -> None:
        if metrics:
            done["validation"] = {key: metrics[key] for key in ("auc", "logloss")}
            trainer.monitor.say(
                f"begins with {start.directory}, step {start.step}: validation auc {shown(metrics['auc'])}  "
                f"logloss {metrics['logloss']:.5f}"
            )
        context.first("writing the start", lambda: write_record(directory, start.facts() | done))

    if trainer.validation is None:
        record({})
    return record


def load_best(config: Config, allocation: Allocation, context: Context, directory: Path) -> SubnetTask:
    """The retrained model of a run directory with its best weights.

    Raises:
        UserError: there is no training, or one that has not ended; or a checkpoint is damaged.
    """
    context.first("looking for the trained model", _check_ended, directory)
    task = SubnetTask(config, allocation, context)
    root, schema = directory / "checkpoints" / STAGE, allocation.schema
    checkpointer = Checkpointer(
        root, task.model, None, context, schema=schema.fingerprint, data=schema.data, settings=task.settings
    )
    best = checkpointer.best()
    if best is None:
        raise UserError(_untrained(directory))
    checkpointer.load(best, optimizers=False)
    return task


def _check_ended(directory: Path) -> None:
    """The best of a training that was stopped looks like that of one that has ended, but is of an earlier epoch."""
    if (directory / "training.json").exists():
        return
    if (directory / "checkpoints" / STAGE).exists():
        raise UserError(f"{directory}: its training has not ended. Give its command again, then this one")
    raise UserError(_untrained(directory))


def _untrained(directory: Path) -> str:
    return f"{directory} holds no trained model; train it first: {script('retrain')} --help"


def evaluate_model(
    task: SubnetTask,
    stream: BatchStream,
    context: Context,
    config: Config,
    name: str,
    allocation: Allocation,
    wanted: Wanted | None = None,
) -> dict[str, Any]:
    """Exact figures over all ranks, with every size and cost beside them.

    ``name`` is that of the sub-run's directory; ``wanted``: what is told beside, by default ``train.group`` is.
    """
    wanted = wanted or Wanted(config.train.group)
    task.model.eval()
    started = time.monotonic()
    found = predictions(task.predict, stream.epoch(0), context, wanted.group)
    seconds = time.monotonic() - started
    metrics = figures(found)
    rows = {n: allocation.rows(n) for n in allocation.values if allocation.widths[n]}
    measured = Evaluation(
        metrics,
        seconds,
        allocation.total("parameters"),
        allocation.total("bytes"),
        task.model.dense_count(),
        task.model.flops_per_sample(),
        {"widths": allocation.widths} | ({"table_rows": rows} if rows else {}),
        told(metrics, found, wanted, context),
    )
    return measured.body(name, stream, config)
