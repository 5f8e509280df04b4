"""A method from search to evaluation through the entry scripts' functions, in one process, with and without kills."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from embsearch_dist.config.read import load_config
from embsearch_dist.files import read_json
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.trainer import Trainer
from launch import evaluate, retrain, search
from tests.factories import CONFIGS, recorded
from tests.pretend.worker import Worker

SMALL = [
    *(
        "dist.timeout_s=60",
        "run.threads=1",
        "optim.embedding_lr=0.05",
        "optim.dense_lr=0.01",
        "optim.embedding_l2=0.001",
    ),
    *("model.hidden=[8,4]", "model.unified_width=8", "train.batch_size=128", "train.eval_batch_size=200"),
    *("train.epochs=1", "train.steps=3", "train.log_every=1", "train.save_every=1"),
]
TRAINING = ("batch_size=128", "eval_batch_size=200", "epochs=2", "steps=6", "log_every=1", "save_every=3")
SEARCH = {
    "adass": (
        *("search.candidates=[0,4,8]", "search.sampling.update_every=3", "search.policy.steps=2"),
        *("search.policy.batch=2", "search.policy.model_width=4", "search.policy.heads=2", "search.policy.layers=1"),
    ),
    "ihas": (
        *("search.width=4", "search.outer.pretrain_epochs=0.5", "search.outer.every=2", "search.groups.min_rows=20"),
        *("search.groups.batch_size=200", "model.backbone=mlp"),
    ),
    "adafs": ("search.width=4", "search.outer.pretrain_epochs=0.5", "search.outer.every=2", "model.backbone=mlp"),
    "nasrec": (
        *("search.space.blocks=2", "search.space.dense_widths=[8]", "search.space.sparse_widths=[4]"),
        *("search.space.tokens=2", "search.space.width=8", "search.scoring.rows=100", "search.scoring.tune_rows=100"),
        *("search.scoring.tune_steps=2", "search.scoring.tune_batch=50", "search.evolution.population=3"),
        *("search.evolution.generations=1", "search.evolution.parents=2", "search.evolution.children=1"),
        *("search.evolution.keep=1", "search.sampling.warmup=0.3", "optim.dense=adagrad", "optim.clip_norm=1.0"),
    ),
    "ues": ("search.width=8",),
}
TRAINED = {"adass": "supernet", "ihas": "gates", "adafs": "controller", "nasrec": "supernet"}
"""The stage of each method that trains, and its config section where that is not ``training``."""


@dataclass(frozen=True)
class Chain:
    """One combination; ``lists``: fields of weighted, averaged and empty lists beside single ids."""

    method: str
    optimizer: str
    norm: str = "none"
    lists: bool = False
    more: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        kind = "lists" if self.lists else "ids"
        return "-".join([self.method, self.optimizer, self.norm, kind, *(m.split("=")[-1] for m in self.more)])

    def words(self, data: Path, device: str) -> list[str]:
        section = "supernet" if TRAINED.get(self.method) == "supernet" else "training"
        own = [f"search.{section}.{key}" for key in TRAINING] if self.method in TRAINED else []
        given = [f"data.path={data}", f"run.device={device}", f"optim.embedding={self.optimizer}"]
        return [*SMALL, *SEARCH[self.method], *own, *given, f"model.norm={self.norm}", *self.more]


# Every method with every optimizer; of norms and kinds of fields every pair with a method and with an optimizer.
CHAINS = [
    Chain("adass", "adam", "field"),
    Chain("adass", "adagrad", "width", lists=True),
    Chain("adass", "rowwise_adagrad", "none", lists=True),
    Chain("adass", "sgd", "none"),
    Chain("nasrec", "adam", "none", lists=True),
    Chain("nasrec", "adagrad", "field"),
    Chain("nasrec", "rowwise_adagrad", "width"),
    Chain("nasrec", "sgd", "field", lists=True),
    Chain("ihas", "adam", "width"),
    Chain("ihas", "adagrad", "none"),
    Chain("ihas", "rowwise_adagrad", "field", lists=True, more=("search.gates.through=true",)),
    Chain("ihas", "sgd", "width", lists=True, more=("search.gates.shared=true",)),
    Chain("adafs", "adam", lists=True),
    Chain("adafs", "adagrad", more=("search.mode=hard",)),
    Chain("adafs", "rowwise_adagrad"),
    Chain("adafs", "sgd", lists=True),
    Chain("ues", "adam", "field", lists=True),
    Chain("ues", "adagrad", "width", more=("model.backbone=dlrm",)),
    Chain("ues", "rowwise_adagrad", more=("model.backbone=wide_deep", "model.precision=bfloat16")),
    Chain("ues", "sgd", lists=True, more=("model.dropout=0.2",)),
]


class Killed(BaseException):
    """In place of a SIGKILL: nothing of the training answers it."""


@contextlib.contextmanager
def killed_after(stage: str, step: int) -> Iterator[None]:
    """The training of ``stage`` ends when ``step`` steps are done, before that step can be saved."""
    pause = Trainer._pause

    def paused(self: Trainer, stop: bool) -> None:
        if self.monitor.stage == stage and self.progress.step == step:
            raise Killed
        pause(self, stop)

    with mock.patch.object(Trainer, "_pause", paused):
        yield


def start(script: Any, words: Sequence[str], kill: tuple[str, int] | None = None) -> str:
    """What a script prints; with ``kill`` it is killed there, and started again."""
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        for name in ("heatmap", "figure", "_tensorboard_writer"):  # pictures take longer than the training
            stack.enter_context(mock.patch.object(Monitor, name, lambda *_, **__: None))
        if kill:
            with killed_after(*kill):
                try:
                    script.main(list(words))
                except Killed:
                    pass
                else:
                    raise AssertionError(f"{kill}: not killed; the training is shorter than that")
        script.main(list(words))
    return printed.getvalue()


def walk(chain: Chain, data: Path, folder: Path, device: str = "cuda", kill: bool = False) -> dict[str, Any]:
    """Search, retrain and evaluate; the losses of every step, and the figures of the found model.

    With ``kill``, the search's training and the retraining are each killed between two checkpoints, and continued.
    """
    run = folder / ("killed" if kill else "unbroken")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(load_config(CONFIGS, None, chain.words(data, device), chain.method).to_yaml())
    words, stage = ["--config", str(config), "--run.dir", str(run)], TRAINED.get(chain.method)
    told = start(search, words, (stage, 5) if kill and stage else None)
    found: dict[str, Any] = {}
    if stage:
        assert not kill or "continuing from" in told
        found["search"] = recorded(run, stage, "loss")
    if chain.method == "adafs":
        return found | figures(next(run.glob("retrain/*/evaluation.json")))
    assert not kill or "continuing from" in start(retrain, ["--run", str(run)], ("retrain", 2))
    if not kill:
        start(retrain, ["--run", str(run)])
    own = next((run / "retrain").iterdir())
    for folder in sorted(p.parent for p in own.rglob("metrics.jsonl")):
        found[f"retrain {folder.relative_to(own)}"] = recorded(folder, "retrain", "loss")
    trained = figures(own / "evaluation.json")
    if not kill:
        start(evaluate, ["--run", str(own)])
        assert figures(own / "evaluation.json") == trained, "evaluated again, the model that was trained"
    for name, losses in found.items():
        assert losses and all(math.isfinite(x) for x in losses), name
    return found | trained


def figures(path: Path) -> dict[str, Any]:
    body = read_json(path)
    assert 0 < body["auc"] < 1 and 0 < body["logloss"] < 5
    return {key: body[key] for key in ("auc", "logloss", "embedding_parameters") if key in body}


def check_killed(worker: Worker, chain: Chain, data: Path, folder: Path) -> None:
    """A chain killed in every training ends as an unbroken one, to the bit."""
    unbroken, killed = (worker(walk, chain, data, folder, "cuda", kill) for kill in (False, True))
    assert killed == unbroken


def chains_of(*methods: str) -> Any:
    """A test for each chain of these methods; all but the first one are slow."""
    chains = [c for m in methods for c in CHAINS if c.method == m]
    return pytest.mark.parametrize("chain", slow_but(chains[:1], chains))


def first_of_each(chains: Sequence[Chain]) -> list[Any]:
    """The chains as parameters of a test: of each method all but the first one are slow."""
    return slow_but([*{c.method: c for c in reversed(chains)}.values()], chains)


def slow_but(some: Sequence[Chain], chains: Sequence[Chain]) -> list[Any]:
    """The chains as parameters of a test, slow but for some."""
    return [pytest.param(c, marks=() if c in some else pytest.mark.slow, id=c.label) for c in chains]
