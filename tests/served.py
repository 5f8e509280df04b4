"""Model directories for tests: untrained models of every kind, exported without a run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import Config
from embsearch_dist.data.store.manifest import identity
from embsearch_dist.methods.adafs.method import AdaFSTask
from embsearch_dist.methods.collected import Collected, of_single
from embsearch_dist.methods.gated.collected import of_gated
from embsearch_dist.methods.ihas.collected import of_routed
from embsearch_dist.methods.ihas.gates_stage import GatesTask
from embsearch_dist.methods.ihas.kmeans import KMeans
from embsearch_dist.methods.ihas.routed_model import RoutedModel
from embsearch_dist.methods.ihas.router_by_centres import CentreRouter
from embsearch_dist.methods.ihas.router_by_fields import FieldRouter
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.serving.export import Wish, export
from embsearch_dist.train.retrain import SubnetTask
from tests.factories import one_rank, small_config

WIDTHS = {"left": 4, "big": 2, "right": 8, "idle": 0}
OTHER = {"left": 8, "big": 4, "right": 0, "idle": 2}


def run_of(data: Path, *overrides: str, method: str = "adass") -> Run:
    """A run on prepared data whose directory does not matter."""
    config: Config = small_config(data, "unused", *overrides, method=method)
    schema = Schema.load(data)
    return Run(config, dataclasses.replace(schema, data=identity(data, schema)), one_rank())


def shaken(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Give all weights, tables included, and statistics other values than those that training begins with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            for part in [s.tensor for s in tensor.local_shards()] if hasattr(tensor, "local_shards") else [tensor]:
                if part.is_floating_point():
                    part.copy_(torch.randn(part.shape, generator=generator) * std)
                    if "variance" in name:
                        part.abs_().add_(0.5)


def single(run: Run, widths: dict[str, int] = WIDTHS) -> Collected:
    """An ordinary model."""
    allocation = Allocation(run.schema, widths).counted(run.config.model.extra)
    task = SubnetTask(run.config, allocation, run.context)
    shaken(task.model)
    return of_single(task, allocation, run.config.model)


def gated(run: Run) -> Collected:
    """AdaFS, or the gates of iHAS, as if selection had begun."""
    kinds: dict[str, Any] = {"adafs": AdaFSTask, "ihas": GatesTask}
    task = kinds[run.config.method](run, run.config.search, training=False)
    shaken(task.model)
    task.steps, task.warmup = 1, 0
    return of_gated(task)


def routed(
    run: Run, kind: str, on: str = "embeddings", widths: Sequence[dict[str, int]] = (WIDTHS, OTHER)
) -> Collected:
    """Two models behind a router; ``run`` is of method ihas."""
    schema, generator = run.schema, torch.Generator().manual_seed(1)
    models = []
    widths = (WIDTHS, OTHER)
    for k, own in enumerate(widths):
        allocation = Allocation(schema, own).counted(run.config.model.extra)
        models.append(SubnetTask(run.config, allocation, run.context).model)
        shaken(models[-1], seed=k)
    router: Any
    if kind == "fields":
        tables = {n: torch.randn(f.cardinality, 2, generator=generator) for n, f in zip(schema.names, schema.fields)}
        router = FieldRouter(schema, torch.zeros(2), {n: tables[n] for n in ("right", "idle")})
    else:
        task = GatesTask(run, run.config.search, training=False)
        shaken(task.model, seed=5)
        columns = len(schema.fields) * run.config.search.width
        kmeans = KMeans(3, columns, run.context, 0)
        centres = torch.randn(3, columns, generator=generator) * 0.1
        state = {"started": True, "centres": centres.tolist(), "counts": [1.0] * 3, "idle": [0] * 3}
        kmeans.load_state(state | {"alive": [True, True, False]})
        router = CentreRouter(task, on, kmeans, torch.rand(len(schema.fields), generator=generator) + 0.5)
    model = RoutedModel(router, models, schema, run.context)
    return of_routed(model, [Allocation(schema, own) for own in widths], run.config.model)


def exported(
    run: Run, found: Collected, out: Path, precision: str = "fp32", formats: Sequence[str] = ()
) -> dict[str, Any]:
    """Export it; gives ``model.json``. Batches of 200 rows, so that the last is short."""
    wish = Wish(out, precision, formats, False, "tiny")
    stream = run.stream("test", 200, shuffle=False)
    return export(wish, found, Path(run.config.data.path), run.schema, stream)
