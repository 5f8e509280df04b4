"""Train the model of an allocation from scratch (AdaS&S section 3.3), and evaluate it."""

from __future__ import annotations

import re
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
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_sealed
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.networks.network import ArchitectureNetwork
from embsearch_dist.ranks.context import Context
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.lines import lines_of
from embsearch_dist.train.metrics import area_of, evaluate
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer

STAGE = "retrain"


class SubnetTask:
    """The mixed-width model of one allocation; UES is the allocation of one width."""

    def __init__(self, config: Config, allocation: Allocation, context: Context) -> None:
        self.model = SubnetModel(config, allocation, context)
        self.l2 = config.optim.embedding_l2
        # Of the allocation the widths count, wherever its file lies; of the architecture its key.
        model = {f"model.{k}": v for k, v in config.model.settings().items() if k != "allocation"}
        backbone = self.model.bare_head.backbone
        if isinstance(backbone, ArchitectureNetwork):
            model["model.architecture"] = backbone.key
        else:
            del model["model.layer_norm"]  # nothing reads it
        self.settings = {**model, "widths": allocation.widths}

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
    begin: Callable[[SubnetTask], None] = lambda task: None,
) -> SubnetTask:
    """Train to the early stop and return the task with its best weights; continues if it was stopped.

    Without ``validation`` nothing is evaluated, and the last weights count.

    ``begin`` may set initial values; a checkpoint that is there replaces them.
    """
    torch.manual_seed(config.run.seed)  # dropout
    task = SubnetTask(config, allocation, context)
    begin(task)
    with Monitor(directory, STAGE, context.rank, quiet) as monitor:
        monitor.say(
            f"retrain: {len(allocation.kept)} fields, {allocation.total('parameters'):,} embedding parameters, "
            f"{task.model.dense_count():,} dense parameters, {context.world_size} rank(s)"
        )
        trainer = Trainer(
            task, config.train, config.optim, training, validation, context, monitor, directory / "checkpoints" / STAGE
        )
        progress = trainer.fit()
        trainer.restore_best()
        write: dict[str, Any] = {"seconds": progress.seconds, "steps": progress.step, "best_step": progress.best_step}
        write |= {"lines": lines_of(directory, STAGE)} if context.rank == 0 else {}
        write |= rows_left_out(training) | ({"data": training.schema.data} if training.schema.data else {})
        context.first("writing training.json", lambda: write_sealed(directory / "training.json", write))
    return task


def load_best(config: Config, allocation: Allocation, context: Context, directory: Path) -> SubnetTask:
    """The retrained model of a run directory with its best weights.

    Raises:
        UserError: there is no finished training, or a checkpoint is damaged.
    """
    task = SubnetTask(config, allocation, context)
    root, schema = directory / "checkpoints" / STAGE, allocation.schema
    checkpointer = Checkpointer(
        root, task.model, None, context, schema=schema.fingerprint, data=schema.data, settings=task.settings
    )
    best = checkpointer.best()
    if best is None:
        raise UserError(f"{directory} holds no trained model; train it first: python launch/retrain.py --help")
    checkpointer.load(best, optimizers=False)
    return task


def evaluate_model(
    task: SubnetTask,
    stream: BatchStream,
    split: str,
    context: Context,
    config: Config,
    name: str,
    allocation: Allocation,
) -> dict[str, Any]:
    """Exact AUC and logloss over all ranks, with every size and cost beside them.

    ``name`` is that of the sub-run's directory.
    """
    task.model.eval()
    started = time.monotonic()
    metrics = evaluate(task.predict, stream.epoch(0), context)
    seconds = time.monotonic() - started
    return {
        "name": result_name(name),
        "seed": config.run.seed,
        "split": split,
        "rows": int(metrics["rows"]),
        **area_of(metrics, split),
        "logloss": metrics["logloss"],
        "embedding_parameters": allocation.total("parameters"),
        "embedding_bytes": allocation.total("bytes"),
        "dense_parameters": task.model.dense_count(),
        "flops_per_sample": task.model.flops_per_sample(),
        "inference_rows_per_s": metrics["rows"] / seconds,
        "widths": allocation.widths,
        "backbone": config.model.backbone,
        **({"data": allocation.schema.data} if allocation.schema.data else {}),
        **rows_left_out(stream),
    }


def result_name(name: str) -> str:
    """The name of a sub-run's directory without its ``-seedN``, so that seeds are averaged."""
    return re.sub(r"-seed\d+$", "", name)


def rows_left_out(stream: BatchStream) -> dict[str, int]:
    """For the record of a result: how many rows it has not seen; nothing when it has seen all."""
    return {"rows_left_out": stream.rows_left_out} if stream.left_out else {}
