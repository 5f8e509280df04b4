"""What ``import embsearch_dist as es`` offers: one process, for notebooks and other programs.

Everything here is kept stable: a name that goes is announced one version before. Several GPUs and hosts are the entry
scripts' (docs/running.md); they read and write the same directories.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist

from embsearch_dist import running
from embsearch_dist.allocation import Allocation
from embsearch_dist.config.backbones import register_backbone
from embsearch_dist.config.own_module import load_module
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config, DistConfig, RunConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.sources.arrays import ArraySource
from embsearch_dist.data.sources.registry import GIVEN, handed_over, register_source, schema_of
from embsearch_dist.data.sources.source import DataSource
from embsearch_dist.data.sources.split import SourceSplit
from embsearch_dist.data.sources.tables import frame_of, unreadable
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.library.supernet import Supernet
from embsearch_dist.library.widths import search_widths
from embsearch_dist.methods import CONFIGS, METHODS
from embsearch_dist.methods.results import read_result, searched_network, seed_suffix
from embsearch_dist.methods.wish import Wish
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import Run
from embsearch_dist.run import open_data as open_checked
from embsearch_dist.rundir import check_text, hold, release
from embsearch_dist.schema import SPLITS, Field, Schema
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.predict import LOGIT, PROBABILITY, Job, Scorer
from embsearch_dist.stores.mirroring import mirroring
from embsearch_dist.stores.states import restore

__all__ = [
    "Allocation",
    "ArraySource",
    "Data",
    "DataSource",
    "Field",
    "Model",
    "Schema",
    "Supernet",
    "UserError",
    "evaluate",
    "load_model",
    "open_data",
    "register_backbone",
    "register_source",
    "retrain",
    "search",
    "search_widths",
]

Settings = Mapping[str, Any]
_busy = threading.Lock()


@dataclass(frozen=True)
class Data:
    """A prepared data set, or a data source: its schema, and batches as models see them."""

    path: Path
    schema: Schema
    source: DataSource | None = None

    def batches(self, split: str, batch_size: int = 8192, shuffle: bool = False, seed: int = 0) -> Iterator[Batch]:
        """One epoch of ``train``, ``validation`` or ``test``: ids of each field, dense columns, labels.

        Raises:
            UserError: a file is missing or damaged.
        """
        rows_of = self.path if self.source is None else SourceSplit(self.source, self.schema, split)
        stream = BatchStream(
            rows_of, self.schema, split, global_batch=batch_size, rank=0, world_size=1, shuffle=shuffle, seed=seed
        )
        yield from stream.epoch(0)


def open_data(data: str | Path | DataSource) -> Data:
    """Open what ``launch/prepare.py`` wrote, or a data source.

    >>> batch = next(open_data("runs/data/my").batches("train", batch_size=100))
    >>> batch.label.shape
    torch.Size([100])

    Raises:
        UserError: nothing was prepared there, or it was changed since; or the source is none.
    """
    if not isinstance(data, str | Path):
        return Data(Path(), schema_of(data), data)
    config = load_config(CONFIGS, None, [f"data.path={data}"], method="ues")
    with _alone(RunConfig(device="cpu"), DistConfig()) as context:
        schema = open_checked(config, context)
    return Data(Path(config.data.path), schema)


def search(
    config: str | Path | None = None,
    *,
    run_dir: str | Path,
    data: str | Path | DataSource | None = None,
    settings: Settings | None = None,
    method: str = "",
) -> Allocation | GroupedAllocation | None:
    """Search as ``launch/search.py`` does, in this process. A run that was stopped goes on, one that is done is read.

    Args:
        config: YAML file; None: the defaults of ``method``.
        run_dir: where the run's files go.
        data: a prepared data set, or a data source; None: what config and settings name.
        settings: keys on top of the config: ``{"data.path": "runs/data/my", "search.budget": "25%"}``.
        method: name of a method, if the config names none.

    Returns:
        What was found; of a search for networks the widths of its tables; None of one that finds no widths and has
        trained its model itself, under ``run_dir/retrain`` (``adafs``).

    Raises:
        UserError: names the file, key or field, and the cure.
    """
    words = [*_words(settings), *_data_words(data), f"run.dir={run_dir}"]
    made = load_config(CONFIGS, config, words, method=method)
    with _one_call(), _handed_over(data):
        with _alone(made.run, made.dist) as context, mirroring(made, context):
            run = running.search(made, context, "es.search")
        return read_result("", run.dir, run.schema)[1] if METHODS[made.method].result else None


def retrain(
    run_dir: str | Path,
    allocation: str | Path = "",
    *,
    data: str | Path | DataSource | None = None,
    name: str = "",
    settings: Settings | None = None,
    start: str | Path = "",
    start_optimizer: bool = True,
    finetune: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Train what a search found as ``launch/retrain.py`` does, in this process, and measure it on the test split.

    Args:
        run_dir: of the search.
        allocation: a file, ``ues-32`` for a uniform width, or empty for what was found.
        data: a prepared data set, or a data source; None: that of the search, unless a program handed it over.
        name: of the result under ``run_dir/retrain``; empty: from the allocation. ``-seedN`` is added for a seed other
            than the search's (``settings={"run.seed": N}``).
        settings: ``train``, ``optim`` and ``model`` keys that are to be other ones.
        start: directory of an earlier training (``run_dir/retrain/NAME``) to begin with; empty: fresh weights.
        start_optimizer: take the state of its optimizers along.
        finetune: begin with the widest model of the search, cut down; None: as the method does by default.

    Returns:
        Directory name under ``run_dir/retrain`` -> figures (auc, logloss, embedding_parameters, ...).

    Raises:
        UserError: names the file, key or field, and the cure.
    """
    home = Path(run_dir)
    if mirror := (settings or {}).get("run.mirror"):
        restore(home, str(mirror))
    check_text(home / "config.yaml")
    words = [*_words(settings), *_data_words(data)]
    config: Config = load_config(CONFIGS, home / "config.yaml", [*searched_network(home, words), *words])
    suffix = seed_suffix(config, load_config(CONFIGS, home / "config.yaml", _modules(settings)))
    wish = Wish(str(allocation), name, False, 0, False, str(start), start_optimizer, finetune)
    with _one_call(), _handed_over(data), _alone(config.run, config.dist) as context:
        return running.retrain(config, context, home, wish, suffix).results


def evaluate(
    directory: str | Path, split: str = "test", *, data: str | Path | DataSource | None = None
) -> dict[str, Any]:
    """Measure a trained model once more as ``launch/evaluate.py`` does, in this process.

    Args:
        directory: ``RUN/retrain/NAME``.
        split: ``train``, ``validation`` or ``test``.
        data: a prepared data set, or a data source; None: that of the training, unless a program handed it over.

    Returns:
        auc, logloss, embedding_parameters, ...

    Raises:
        UserError: nothing is trained there, or the data do not fit.
    """
    home = Path(directory)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}. Use one of {', '.join(SPLITS)}")
    config = running.trained_config(home, "es.evaluate:", _data_words(data))
    with _one_call(), _handed_over(data), _alone(config.run, config.dist) as context, mirroring(config, context):
        run = Run(config, open_checked(config, context), context)
        hold(home, "es.evaluate")
        return METHODS[config.method]().evaluate(run, home, split, "", "")


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
        frame = frame_of(table)
        if not frame.height:
            return np.zeros(0, np.float32)
        # By way of a file, because that is how types, missing values and formats are read alike everywhere.
        with tempfile.TemporaryDirectory(prefix="embsearch-") as folder:
            file = Path(folder) / "rows.parquet"
            try:
                frame.write_parquet(file)
            except pl.exceptions.PolarsError as e:
                raise unreadable(e) from e
            scorer = Scorer(Job(self.directory.path, file, Path(folder) / "unused", "table"), self.directory)
            parts = [scorer.score(chunk)[0] for chunk in scorer.source.chunks()]
        return np.concatenate([part[column].to_numpy() for part in parts]).astype(np.float32)


def load_model(directory: str | Path, *, module: str | Path = "") -> Model:
    """Open a model directory that ``launch/export.py`` wrote; all of its files are compared with their checksums.

    >>> load_model("exported/my").predict({"left": [3], "big": [17], "right": [None], "idle": [5], "x": [0.5]}).shape
    (1,)

    Args:
        module: a file or an installed module that registers the model's backbone, where it is your own. Its code is
            run. Not needed where this program has registered the class already.

    Raises:
        UserError: it is no model directory, or damaged; ``module`` cannot be imported.
    """
    load_module(os.fspath(module), "module")
    return Model(open_directory(Path(directory)))


@contextmanager
def _one_call() -> Iterator[None]:
    """One search, training or evaluation at a time; what it holds is let go at its end. The process group, torch's
    random numbers and the locks of run directories are the process's, so calls of two threads would mix.

    Raises:
        UserError: another thread is in such a call.
    """
    if not _busy.acquire(blocking=False):
        raise UserError(
            "another thread of this program is in es.search, es.retrain or es.evaluate. Wait for it, or start a "
            "process of its own for each"
        )
    try:
        yield
    finally:
        release()
        _busy.release()


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


def _data_words(data: str | Path | DataSource | None) -> list[str]:
    """``data`` of a call as overrides."""
    if data is None:
        return []
    if isinstance(data, str | Path):
        return [f"data.path={data}", "data.source="]
    return [f"data.source={GIVEN}", "data.module="]


def _handed_over(data: str | Path | DataSource | None) -> AbstractContextManager[None]:
    return nullcontext() if data is None or isinstance(data, str | Path) else handed_over(data)


def _modules(settings: Settings | None) -> list[str]:
    """The words that a run's config cannot be read without: where its own backbone lies now."""
    return [word for word in _words(settings) if word.startswith("model.module=")]


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
