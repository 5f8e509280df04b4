"""The result of a search stage's own model, in the form in which ``retrain.py`` leaves those that it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.files import write_sealed
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.train.evaluation import Evaluation
from embsearch_dist.train.figures import Wanted, told
from embsearch_dist.train.metrics import figures, predictions, shown


def seeded_name(name: str, seed: int) -> str:
    """Name of the result's directory: ``-seedN`` for a seed other than 0, as retrain.py has it."""
    return f"{name}-seed{seed}" if seed else name


def evaluate_gated(
    task: GatedTask,
    stream: BatchStream,
    context: Context,
    config: Config,
    name: str,
    wanted: Wanted | None = None,
) -> dict[str, Any]:
    """Exact AUC and logloss over all ranks of a model that selects row by row, with the keys of
    :func:`embsearch_dist.train.retrain.evaluate_model`.

    All columns of all tables must be there for any row, so they all count as embedding parameters; the selector's
    parameters count as dense ones, and its products as FLOPs.

    Args:
        task: with the weights that are to be measured; its selection is that of inference.
        name: of the result's directory; its ``-seedN`` is dropped, so that seeds are averaged.
        wanted: what is told beside; by default ``train.group`` is.
    """
    model = task.model
    model.eval()
    started = time.monotonic()
    wanted = wanted or Wanted(config.train.group)
    found = predictions(task.predict, stream.epoch(0), context, wanted.group)
    seconds = time.monotonic() - started
    metrics = figures(found)
    allocation = Allocation.uniform(task.run.schema, model.width)
    dense = model.dense_count() + sum(p.numel() for p in model.outer_parameters if p.requires_grad)
    layers = [m for m in model.replicated.modules() if isinstance(m, nn.Linear)]
    measured = Evaluation(
        metrics,
        seconds,
        allocation.total("parameters"),
        allocation.total("bytes"),
        dense,
        2.0 * sum(m.in_features * m.out_features for m in layers),
        {"widths": allocation.widths},
        told(metrics, found, wanted, context),
    )
    return measured.body(name, stream, config)


def leave_result(run: Run, task: GatedTask, name: str, eval_batch_size: int) -> Path:
    """Evaluate on the test split; leaves ``evaluation.json`` and ``config.yaml`` in ``RUN/retrain/NAME``, which is
    returned. The weights stay in the search's checkpoint."""
    context, config, name = run.context, run.config, seeded_name(name, run.config.run.seed)
    stream = run.stream("test", eval_batch_size, shuffle=False)
    result = evaluate_gated(task, stream, context, config, name)
    directory = run.dir / "retrain" / name

    def write() -> None:
        config.save(directory)
        write_sealed(directory / "evaluation.json", result)

    context.first("writing evaluation.json", write)
    if context.rank == 0:
        print(f"{name}: test auc {shown(result['auc'])}  logloss {result['logloss']:.5f}  -> {directory}", flush=True)
    return directory
