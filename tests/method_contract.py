"""What every method must keep: helpers of ``tests/unit/test_methods.py``, which tries everything in ``METHODS``."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.files import read_json
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.results import kept_network, read_result, searched_network
from embsearch_dist.methods.retraining import Retraining
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.methods.trial import merged, words_of
from embsearch_dist.methods.wish import BRACKET, Wish
from embsearch_dist.networks.architecture import RESULT, Architecture
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run, open_data
from embsearch_dist.train.directories import open_run_directory
from tests.factories import small_config

PLANTED = {
    "model.hidden": "[32]",
    "model.unified_width": "8",
    "optim.embedding_lr": "0.01",
    "optim.dense_lr": "0.003",
    "optim.embedding_l2": "0.0005",
    "train.batch_size": "512",
    "train.eval_batch_size": "6000",
    "train.epochs": "6",
    "train.save_every": "0",
    "search.budget": "12.5%",
    "search.pareto": "[]",
}
"""The recipe under which every method is tried on planted widths of 0 to 8; a method adds what its search needs."""
TIMES = {"time", "seconds", "sha256", "lines", "memory_mb", "share_of_time"}
"""Keys of records that differ between two runs that are the same, beside those that end in ``_s``."""
BUDGET = "60%"


@dataclass(frozen=True)
class Case:
    """A method, its trial settings, and the prepared data."""

    name: str
    data: str
    more: tuple[str, ...] = field(default=())
    short: bool = False
    """Trainings of a quarter of the steps, which save where they evaluate alone: for tests that stop nothing."""

    @property
    def method(self) -> Method:
        return METHODS[self.name]()

    @property
    def has_budget(self) -> bool:
        return any(f.name == "budget" for f in dataclasses.fields(METHODS[self.name].config))

    def config(self, directory: Path | str, *words: str) -> Config:
        trial = merged(METHODS[self.name].trial)
        own = words_of(_shorter(trial) if self.short else trial)
        budget = [f"search.budget={BUDGET}"] if self.has_budget else []
        return small_config(self.data, directory, *own, *budget, *self.more, *words, method=self.name)

    def run(self, directory: Path | str, context: Context, *words: str) -> Run:
        """A run under the method's settings and ``words``."""
        config = self.config(directory, *words)
        return Run(config, open_data(config, context), context)

    def search(self, directory: Path | str, context: Context, *words: str) -> Run:
        """As ``search.py`` does it."""
        run = self.run(directory, context, *words)
        check_stages(self.method, run)
        context.first("opening", lambda: open_run_directory(run.config, run.schema, run.dir, "a test"))
        run_stages(self.method, run)
        return run

    def retrain(self, search: Path, context: Context, **wished: Any) -> dict[str, dict[str, Any]]:
        """As ``retrain.py`` does it: figures of each result."""
        config = self.config(search, *searched_network(search, []))
        run = Run(config, open_data(config, context), context)
        wish = Wish(**{"allocation": "", "name": "", "or_uniform": False, "best": 0, "refit": False, **wished})
        name, found = read_result("" if wish.allocation == BRACKET else wish.allocation, search, run.schema)
        found = found.counted(config.model.extra)
        return self.method.retrain(Retraining(wish, run, search, wish.name or name, "", found))

    def evaluate(self, trained: Path, context: Context) -> dict[str, Any]:
        """As ``evaluate.py`` does it."""
        config = self.config(trained, *searched_network(trained, []), *kept_network(trained))
        self.method.check_evaluation(trained, "", "")
        run = Run(config, open_data(config, context), context)
        return self.method.evaluate(run, trained, "test", "", "")


def _shorter(settings: Any) -> Any:
    """Settings, nested ones too, with batches of four times the rows and no saves between evaluations."""
    if not isinstance(settings, Mapping):
        return settings
    changed = {"save_every": lambda _: 0, "batch_size": lambda rows: 4 * rows}
    return {key: changed[key](value) if key in changed else _shorter(value) for key, value in settings.items()}


@dataclass(frozen=True)
class PlantedCase(Case):
    """A method under :data:`PLANTED` and what it says under ``planted``, in place of its trial settings."""

    def config(self, directory: Path | str, *words: str) -> Config:
        own = self.method.planted or {"search": {"candidates": [0, 1, 2, 4, 8]}}
        recipe = [f"{key}={value}" for key, value in PLANTED.items()]
        return small_config(self.data, directory, *recipe, *words_of(own), *words, method=self.name)


def read_found(run: Run, method: Method) -> Any:
    """What a search has left, read by its own reader."""
    path = run.dir / method.result
    if method.result == RESULT:
        return Architecture.load(path)
    return (GroupedAllocation if method.result == GROUPS else Allocation).load(path, run.schema)


def records(directory: Path) -> dict[str, Any]:
    """Every JSON file and line of a run but times: what two runs that are the same have in common."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*.json")):
        inside = {"report", "checkpoints"} & set(path.relative_to(directory).parts)
        if path.name != "written.json" and not (inside and path.name != "best.json"):
            found[str(path.relative_to(directory))] = untimed(json.loads(path.read_text()))
    for path in sorted(directory.rglob("*.jsonl")):
        lines = [untimed(json.loads(line)) for line in path.read_text().splitlines()]
        found[str(path.relative_to(directory))] = lines
    return found


def untimed(body: Any) -> Any:
    if isinstance(body, dict):
        return {k: untimed(v) for k, v in body.items() if k not in TIMES and not k.endswith("_s")}
    return [untimed(v) for v in body] if isinstance(body, list) else body


def weights(directory: Path) -> dict[str, bytes]:
    """Every file of tensors below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.distcp"))}


def steps_of(run: Run) -> dict[str, int]:
    """Stage -> steps that its training took, of all trainings of a search."""
    found: dict[str, int] = {}
    for path in [run.dir / "metrics.jsonl", *run.dir.glob("widest/**/metrics.jsonl")]:
        for line in path.read_text().splitlines() if path.exists() else ():
            body = json.loads(line)
            if "loss" in body:
                found[body["stage"]] = max(found.get(body["stage"], 0), int(body["step"]))
    return found


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target, symlinks=True)
    return target


def marks(run: Run) -> dict[str, dict[str, Any]]:
    """What the marks of a run's stages say."""
    return {p.stem: read_json(p) for p in sorted((run.dir / "stages").glob("*.json"))}
