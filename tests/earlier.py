"""Earlier trainings and later data for the tests of warm starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.methods.retraining import retrain_one
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run, open_data
from embsearch_dist.rundir import release
from embsearch_dist.train.checkpoint import Checkpointer
from embsearch_dist.train.retrain import STAGE, SubnetTask, load_best
from embsearch_dist.train.warm.ids import Data
from embsearch_dist.train.warm.start import Start, begin
from tests.factories import make_data, small_config

STEPS = "train.steps=3"


def two_days(folder: Path) -> tuple[Path, Path]:
    """Prepared data of a day, and of the next one, which does not keep its ids: other counts, and some new values."""
    first = make_data(folder / "first", rows=1200)
    rows = pl.read_csv(folder / "first" / "clicks.csv").slice(200)
    later = rows.with_columns(
        left=pl.when(pl.col("left") > 9).then(pl.col("left") + 100).otherwise(pl.col("left")),
        idle=pl.col("idle").replace({1: 77}),
    )
    (folder / "second").mkdir()
    later.write_csv(folder / "second" / "clicks.csv")
    (folder / "second" / "clicks.yaml").write_text((folder / "first" / "clicks.yaml").read_text())
    prepare("table", folder / "second" / "clicks.yaml", folder / "second" / "out", quiet=True, row_group_rows=500)
    return first, folder / "second" / "out"


def open_run(data: Path, directory: Path, context: Context, *overrides: str) -> Run:
    """A run whose schema knows which data it is of."""
    config = small_config(data, directory, *overrides, method="ues")
    return Run(config, open_data(config, context), context)


def train(run: Run, widths: dict[str, int] | int, start: Start | None = None) -> dict[str, Any]:
    """Train in the run's directory, and measure."""
    allocation = allocation_of(run, widths)
    try:
        return retrain_one(run, allocation, run.dir, run.dir.name, start)[1]
    finally:
        release()


def allocation_of(run: Run, widths: dict[str, int] | int) -> Allocation:
    """The widths as an allocation of the run's data."""
    found = Allocation.uniform(run.schema, widths) if isinstance(widths, int) else Allocation(run.schema, widths)
    return found.counted(run.config.model.extra)


def change(run: Run, widths: dict[str, int] | int, edit: Callable[[SubnetTask], None]) -> SubnetTask:
    """Change the weights that a training has left, and keep them as its best."""
    task = load_best(run.config, allocation_of(run, widths), run.context, run.dir)
    with torch.no_grad():
        edit(task)
    optimizer = task.model.make_optimizer(run.config.optim)
    root = run.dir / "checkpoints" / STAGE
    names = {"schema": run.schema.fingerprint, "data": run.schema.data}
    Checkpointer(root, task.model, optimizer, run.context, settings=settings(run.config, task), **names).save(
        99, {}, best=True
    )
    return task


def settings(config: Config, task: SubnetTask) -> dict[str, Any]:
    return {"optim.embedding": config.optim.embedding, "optim.dense": config.optim.dense} | task.settings


def begun(
    run: Run, widths: dict[str, int] | int, start: Start, turn: bool = True, keep_means: bool = True
) -> tuple[SubnetTask, dict[str, Any], Any]:
    """A model that begins so, untrained; what the start says of it; the optimizer of its dense part."""
    torch.manual_seed(5)
    task = SubnetTask(run.config, allocation_of(run, widths), run.context)
    optimizer = task.model.make_optimizer(run.config.optim)
    data = Data(Path(run.config.data.path), run.schema)
    own, allocation = settings(run.config, task), allocation_of(run, widths)
    told = begin(start, task, optimizer, own, data, allocation, run.context, turn, keep_means)
    return task, told, optimizer


def logits(run: Run, task: SubnetTask) -> torch.Tensor:
    """Of the first rows of the training split, which are the same for models of the same data."""
    task.model.eval()
    batch = next(run.stream("train", 256, shuffle=False).epoch(0))
    with torch.no_grad():
        return task.predict(batch)
