"""Tiny data sets, configs and batches that the tests share; made in a second or less."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.dataset import BatchMaker, BatchStream
from embsearch_dist.methods import CONFIGS
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer
from tests.ranks import THREADS

torch.set_num_threads(THREADS)

ROWS = 4000
MODEL = ["model.hidden=[8,4]", "model.unified_width=8", "optim.embedding_lr=0.05", "optim.dense_lr=0.01"]
TRAINING = ["train.batch_size=256", "train.eval_batch_size=200", "train.epochs=2", "train.log_every=1"]
SEARCH = [
    "search.candidates=[0,2,4,8]",
    "search.supernet.batch_size=256",
    "search.supernet.eval_batch_size=200",
    "search.supernet.epochs=2",
    "search.supernet.log_every=1",
    "search.sampling.update_every=3",
    "search.policy.steps=8",
    "search.policy.batch=4",
    "search.policy.model_width=8",
    "search.policy.heads=2",
    "search.policy.layers=1",
]


def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set, made once a session: see :func:`make_data`."""
    folder = tmp_path_factory.getbasetemp() / "factory"
    if not (folder / "out" / "schema.json").exists():
        make_data(folder)
    return folder / "out"


def make_data(folder: Path, rows: int = ROWS) -> Path:
    """3200 training, 400 validation, 400 test rows (about); four fields and a dense column ``x``.

    ``big`` has more than 2048 values in training, so that two ranks may split it by rows. The label
    depends on the pair (``left``, ``right``) and on ``x``.
    """
    import polars as pl  # tests that make their data otherwise run without it

    from embsearch_dist.data.prepare.pipeline import prepare

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    left, right, x = rng.integers(0, 12, rows), rng.integers(0, 7, rows), rng.standard_normal(rows)
    table = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 7))
    logit = 2 * table[left, right] + x
    columns = {
        "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int),
        "left": left,
        "big": np.arange(rows) % 3600,
        "right": right,
        "idle": rng.integers(0, 40, rows),
        "x": x,
    }
    pl.DataFrame(columns).write_csv(folder / "clicks.csv")
    fields = "left: categorical, big: categorical, right: categorical, idle: categorical, x: dense"
    (folder / "clicks.yaml").write_text(f"name: tiny\nfiles: clicks.csv\nlabel: click\nfields: {{{fields}}}\n")
    prepare("table", folder / "clicks.yaml", folder / "out", quiet=True, row_group_rows=500)
    return folder / "out"


def prepared_rows(folder: Path, lines: Sequence[str], field: str) -> Path:
    """Rows ``label,time,FIELD,x`` split by time, in row groups of 64 and files of 256 rows.

    Of 1000 rows 800 are for training, in four files of 4, 4, 4 and 1 row groups, and 100 each for the others, in 2.
    """
    from embsearch_dist.data.prepare.pipeline import prepare

    (folder / "r.csv").write_text(f"y,t,{field},x\n" + "\n".join(lines) + "\n")
    (folder / "r.yaml").write_text(f"files: r.csv\nlabel: y\ntime: t\nfields: {{{field}: categorical, x: dense}}\n")
    prepare("table", folder / "r.yaml", folder / "out", split="time", row_group_rows=64, rows_per_shard=256, quiet=True)
    return folder / "out"


def small_config(data: Path | str, run_dir: Path | str, *overrides: str, method: str = "adass") -> Config:
    """A config for :func:`make_data`: an epoch takes 12 steps of well under 0.1 s."""
    base = [f"data.path={data}", f"run.dir={run_dir}", "run.device=cpu", "dist.timeout_s=60", *MODEL, *TRAINING]
    return load_config(CONFIGS, None, [*base, *(SEARCH if method == "adass" else []), *overrides], method=method)


def options(overrides: Sequence[str]) -> list[str]:
    """Overrides as the words of a command line."""
    return [f"--{word}" for word in overrides]


def command_line(data: Path | str, run_dir: Path | str, *overrides: str) -> list[str]:
    """The config of :func:`small_config` as options of ``search.py``; needs ``--config`` beside it."""
    where = [f"data.path={data}", f"run.dir={run_dir}", "run.device=cpu", "dist.timeout_s=60", f"run.threads={THREADS}"]
    return options([*where, *overrides])


def write_config(path: Path) -> Path:
    """A YAML file with the settings of :func:`small_config`."""
    path.write_text(small_config("to-be-named", "to-be-named").to_yaml())
    return path


def small_schema(*cardinalities: int, dense: int = 1) -> Schema:
    """Fields f0, f1, ... and dense columns x0, ..."""
    fields = tuple(Field(f"f{i}", n) for i, n in enumerate(cardinalities))
    return Schema("small", fields, tuple(f"x{i}" for i in range(dense)))


def random_batch(schema: Schema, rows: int = 32, seed: int = 0) -> Batch:
    """Random ids, dense values and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(n, (rows,), generator=generator) for n in schema.cardinalities]).int()
    dense = torch.randn(rows, len(schema.dense), generator=generator)
    label = torch.randint(2, (rows,), generator=generator).float()
    return Batch(dense, BatchMaker(schema).sparse(ids), label, Position(0, 1))


def ids_of(batch: Batch, schema: Schema) -> dict[str, torch.Tensor]:
    """Field name -> ids ``[B]`` of a batch."""
    return {n: batch.sparse[n].values().long() for n in schema.names}


def one_rank() -> Context:
    """A context of one process; its group is opened on first use and stays open."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Context(0, 1, torch.device("cpu"))


def rank_context(rank: int, world_size: int) -> Context:
    """The context of a rank inside :func:`tests.ranks.run_ranks`."""
    return Context(rank, world_size, torch.device("cpu"))


def open_run(config: Config, context: Context) -> Run:
    return Run(config, Schema.load(config.data.path), context)


def streams(run: Run) -> tuple[BatchStream, BatchStream]:
    """Training and validation batches of the retraining."""
    train = run.config.train
    return (
        run.stream("train", train.batch_size, shuffle=True),
        run.stream("validation", train.eval_batch_size, shuffle=False),
    )


def train_and_measure(run: Run, task: Any, directory: str) -> dict[str, Any]:
    """Train a task as ``fit``; validation metrics, a figure of every table, and how each is sharded."""
    config = run.config
    with Monitor(directory, "fit", run.context.rank, quiet=True) as monitor:
        root = Path(directory, "checkpoints", "fit")
        Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root).fit()
    task.model.eval()
    metrics = evaluate(task.predict, streams(run)[1].epoch(0), run.context)
    digest = {n: float(t.double().square().sum()) for n, t in whole_tables(task.model.sharded).items()}
    return {"metrics": metrics, "tables": digest, "kinds": task.model.sharded.kinds}


def recorded(run_dir: Path | str, stage: str, key: str, split: str | None = None) -> list[float]:
    """A column of ``metrics.jsonl``: the values of one stage, in order."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if r["stage"] == stage and key in r and r.get("split") == split]


def whole_tables(sharded: Any) -> dict[str, torch.Tensor]:
    """Every table as one tensor on every rank: the parts of all ranks, put together."""
    context = sharded.context
    whole = {t.name: torch.zeros(t.rows, t.width) for t in sharded.tables.values()}
    for shard in sharded.local_shards():
        if shard.replicated and context.rank != 0:
            continue
        rows, columns = shard.tensor.shape
        part = whole[shard.table.name][shard.row_offset : shard.row_offset + rows]
        part[:, shard.column_offset : shard.column_offset + columns] = shard.tensor.detach()
    return {name: context.sum(value) for name, value in whole.items()}


def optimizer_state(sharded: Any) -> dict[str, torch.Tensor]:
    """All state of the tables' optimizers on one rank, live: the step count of Adam too."""
    found = {}
    for keeper, values in sharded.optimizer_state().items():
        for name, value in values.items():
            found[f"{keeper} {name}"] = value.local_tensor() if hasattr(value, "local_tensor") else value
    return found


STEEP = ["optim.embedding=sgd", "optim.embedding_lr=1e4"]
"""So long a step that the gradient can be read from the tables, exact zeros included."""


def table_gradients(sharded: Any, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradient of each whole table, from what a step of :data:`STEEP` has made of ``before``."""
    return {n: (before[n] - after) / 1e4 for n, after in whole_tables(sharded).items()}


def set_tables(sharded: Any, values: dict[str, torch.Tensor]) -> None:
    """Write whole tables into the live storage of one rank."""
    with torch.no_grad():
        for shard in sharded.local_shards():
            shard.tensor.copy_(values[shard.table.name])
