"""A trained model out of its run directory: its description, its arrays, and how it predicts there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.networks.architecture import RESULT
from embsearch_dist.precision import MIXED
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.train.retrain import SubnetTask, load_best

Predict = Callable[[Batch], torch.Tensor]


@dataclass
class Collected:
    """A trained model, taken apart.

    Attributes:
        body: the part of ``model.json`` that describes it.
        predict: logits ``[B]`` of the training model itself.
        tables: float32 ``[rows, columns]`` by the names of ``serving.tables.PlainTables.fill``; padding is left out.
        dense: all other weights by name.
        files: name in the model directory -> file to copy.
        keep_exact: prefixes of tables that stay float32 at any precision (a router compares them).
    """

    body: dict[str, Any]
    predict: Predict
    tables: dict[str, torch.Tensor] = field(default_factory=dict)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    keep_exact: tuple[str, ...] = ()

    def fields(self, schema: Schema) -> list[str]:
        """Names of the fields that the model looks at, in schema order."""
        if self.body["kind"] == "gated":
            return list(schema.names)
        kept = {n for widths in self.body["widths"] for n, w in widths.items() if w}
        kept |= set(self.body.get("router", {}).get("fields", []))
        return [n for n in schema.names if n in kept]


def is_single(directory: Path) -> bool:
    """Whether one ordinary model was trained there."""
    return (directory / "allocation.json").exists() and (directory / "checkpoints").exists()


def nothing_there(directory: Path) -> UserError:
    return UserError(
        f"--run {directory}: holds no trained model. Train it first: launch/retrain.py, and give RUN/retrain/NAME"
    )


def collect_single(run: Run, directory: Path) -> Collected:
    """An ordinary model: AdaS&S, uniform widths, prunings, NASRec networks."""
    allocation = Allocation.load(directory / "allocation.json", run.schema)
    found = of_single(load_best(run.config, allocation, run.context, directory), allocation, run.config.model)
    found.files = existing(directory, ("allocation.json", "evaluation.json", RESULT))
    return found


def of_single(task: SubnetTask, allocation: Allocation, model: ModelConfig) -> Collected:
    """The model of an allocation, of one rank."""
    task.model.eval()
    body = {"kind": "single", "widths": [dict(allocation.widths)], "model": model_of(model)}
    if allocation.precisions:
        body["precisions"] = {n: allocation.precision_of(n, MIXED) for n in allocation.kept}
    if values := {n: kept.to_dict() for n, kept in allocation.values.items() if allocation.widths[n]}:
        body["values"] = values
    found = Collected(body, task.predict)
    take_subnet(found, task.model, "", model.extra)
    return found


def take_subnet(found: Collected, model: SubnetModel, prefix: str, extra: int) -> None:
    """Tables at their nominal widths, and the head."""
    columns = {n: w + extra for n, w in zip(model.tables.names, model.tables.widths, strict=True)}
    take_tables(found, model.sharded, columns, prefix)
    found.dense |= {f"{prefix}head.{name}": t.cpu() for name, t in model.bare_head.state_dict().items()}


def take_tables(found: Collected, sharded: ShardedTables, columns: Mapping[str, int], prefix: str) -> None:
    """Of one rank, which holds them whole."""
    for shard in sharded.local_shards():
        name = shard.table.name
        found.tables[f"{prefix}{name}"] = shard.tensor[:, : columns[name]].detach().cpu()


def model_of(config: ModelConfig) -> dict[str, Any]:
    """The settings of a model that its description needs; an architecture lies beside it."""
    body = dataclasses.asdict(config)
    del body["allocation"]
    module = Path(config.module).name if config.module.endswith(".py") else config.module
    return body | {"architecture": RESULT if config.architecture else "", "module": module}


def existing(directory: Path, names: tuple[str, ...], target: str = "") -> dict[str, Path]:
    """Those of the files that are there."""
    return {target or name: directory / name for name in names if (directory / name).exists()}
