"""What ``import embsearch_dist as es`` offers: one process, for notebooks and other programs.

Everything here is kept stable: a name that goes is announced one version before. Several GPUs and hosts are the entry
scripts' (docs/running.md); they read and write the same directories.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist

from embsearch_dist import running
from embsearch_dist.allocation import Allocation
from embsearch_dist.config.backbones import load_module, register_backbone
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config, DistConfig, RunConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.methods import CONFIGS
from embsearch_dist.methods.results import read_result, searched_network
from embsearch_dist.methods.retraining import Wish
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import open_data as open_checked
from embsearch_dist.rundir import check_text, release
from embsearch_dist.schema import Schema
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.predict import LOGIT, PROBABILITY, Job, Scorer

__all__ = [
    "Allocation",
    "Data",
    "Model",
    "Schema",
    "UserError",
    "load_model",
    "open_data",
    "register_backbone",
    "retrain",
    "search",
]

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Data:
    """A prepared data set: its schema, and batches as models see them."""

    path: Path
    schema: Schema

    def batches(self, split: str, batch_size: int = 8192, shuffle: bool = False, seed: int = 0) -> Iterator[Batch]:
        """One epoch of ``train``, ``validation`` or ``test``: ids of each field, dense columns, labels.

        Raises:
            UserError: a file is missing or damaged.
        """
        stream = BatchStream(
            self.path, self.schema, split, global_batch=batch_size, rank=0, world_size=1, shuffle=shuffle, seed=seed
        )
        yield from stream.epoch(0)


def open_data(path: str | Path) -> Data:
    """Open what ``launch/prepare.py`` wrote.

    Raises:
        UserError: nothing was prepared there, or it was changed since.
    """
    config = load_config(CONFIGS, None, [f"data.path={path}"], method="ues")
    with _alone(RunConfig(device="cpu"), DistConfig()) as context:
        schema = open_checked(config, context)
    return Data(Path(config.data.path), schema)


def search(
    config: str | Path | None = None, *, run_dir: str | Path, settings: Settings | None = None, method: str = ""
) -> Allocation | GroupedAllocation:
    """Search as ``launch/search.py`` does, in this process. A run that was stopped goes on, one that is done is read.

    Args:
        config: YAML file; None: the defaults of ``method``.
        run_dir: where the run's files go.
        settings: keys on top of the config: ``{"data.path": "runs/data/my", "search.budget": "25%"}``.
        method: name of a method, if the config names none.

    Returns:
        What was found; of a search for networks the widths of its tables.

    Raises:
        UserError: names the file, key or field, and the cure.
    """
    made = load_config(CONFIGS, config, [*_words(settings), f"run.dir={run_dir}"], method=method)
    try:
        with _alone(made.run, made.dist) as context:
            run = running.search(made, context, "es.search")
        return read_result("", run.dir, run.schema)[1]
    finally:
        release()


def retrain(
    run_dir: str | Path, allocation: str | Path = "", *, name: str = "", settings: Settings | None = None
) -> dict[str, dict[str, Any]]:
    """Train what a search found as ``launch/retrain.py`` does, in this process, and measure it on the test split.

    Args:
        run_dir: of the search.
        allocation: a file, ``ues-32`` for a uniform width, or empty for what was found.
        name: of the result under ``run_dir/retrain``; empty: from the allocation.
        settings: ``train``, ``optim`` and ``model`` keys that are to be other ones.

    Returns:
        Directory name under ``run_dir/retrain`` -> figures (auc, logloss, embedding_parameters, ...).

    Raises:
        UserError: names the file, key or field, and the cure.
    """
    home = Path(run_dir)
    check_text(home / "config.yaml")
    words = _words(settings)
    config: Config = load_config(CONFIGS, home / "config.yaml", [*searched_network(home, words), *words])
    wish = Wish(str(allocation), name, or_uniform=False, best=0, refit=False)
    try:
        with _alone(config.run, config.dist) as context:
            return running.retrain(config, context, home, wish).results
    finally:
        release()


class Model:
    """An exported model (``launch/export.py``), on the CPU."""

    def __init__(self, directory: ModelDirectory) -> None:
        self.directory = directory

    def predict(self, table: Any) -> np.ndarray:
        """Probability of a click of each row, ``[N]`` float32; the same as ``launch/predict.py`` writes.

        Args:
            table: a pandas or polars frame, a pyarrow table, or a mapping of columns; raw values under the names of
                the columns that the training data had. Columns that the model does not look at may be missing.

        Raises:
            UserError: a column is missing or cannot be read as what it was in training.
        """
        return self._scores(table, PROBABILITY)

    def logits(self, table: Any) -> np.ndarray:
        """The logit of each row, ``[N]`` float32; see :meth:`predict`."""
        return self._scores(table, LOGIT)

    def _scores(self, table: Any, column: str) -> np.ndarray:
        frame = _frame(table)
        if not frame.height:
            return np.zeros(0, np.float32)
        # By way of a file, because that is how types, missing values and formats are read alike everywhere.
        with tempfile.TemporaryDirectory(prefix="embsearch-") as folder:
            file = Path(folder) / "rows.parquet"
            frame.write_parquet(file)
            scorer = Scorer(Job(self.directory.path, file, Path(folder) / "unused", "table"), self.directory)
            parts = [scorer.score(chunk)[0] for chunk in scorer.source.chunks()]
        return np.concatenate([part[column].to_numpy() for part in parts]).astype(np.float32)


def load_model(directory: str | Path, *, module: str | Path = "") -> Model:
    """Open a model directory that ``launch/export.py`` wrote; all of its files are compared with their checksums.

    Args:
        module: a file or an installed module that registers the model's backbone, where it is your own. Its code is
            run. Not needed where this program has registered the class already.

    Raises:
        UserError: it is no model directory, or damaged; ``module`` cannot be imported.
    """
    load_module(os.fspath(module), "module")
    return Model(open_directory(Path(directory)))


@contextmanager
def _alone(run: RunConfig, config: DistConfig) -> Iterator[Context]:
    """The one rank of this process; in its group, if the program that imports us has opened one.

    Raises:
        UserError: that group has several ranks.
    """
    if not dist.is_initialized():
        with start(run, config) as context:
            yield context
        return
    if dist.get_world_size() > 1:
        raise UserError("the library is for one process. On several ranks start launch/search.py with torchrun")
    cuda = run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())
    yield Context(0, 1, torch.device("cuda" if cuda else "cpu"))


def _frame(table: Any) -> pl.DataFrame:
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, Mapping):
        return pl.DataFrame(dict(table))
    if type(table).__module__.partition(".")[0] == "pandas":
        return pl.from_pandas(table)
    try:
        found = pl.from_arrow(table)
    except (TypeError, ValueError) as e:
        raise UserError(f"{type(table).__name__} is no table: give a pandas or polars frame or a pyarrow table") from e
    if isinstance(found, pl.Series):
        raise UserError("one column is no table: give a pandas or polars frame or a pyarrow table")
    return found


def _words(settings: Settings | None) -> list[str]:
    """``section.key=value`` as the command line has it; what is no text is written as YAML."""
    return [f"{key}={_yaml(value)}" for key, value in (settings or {}).items()]


def _yaml(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
