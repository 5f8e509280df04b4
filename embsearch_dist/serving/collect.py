"""A trained model out of its run directory: its description, its arrays, and how it predicts there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods.adafs.method import load_searched
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.methods.ihas.gates_stage import load_gates
from embsearch_dist.methods.ihas.retraining import load_groups, open_search
from embsearch_dist.methods.ihas.routed_model import ROUTERS as ROUTERS
from embsearch_dist.methods.ihas.routed_model import RoutedModel, Router, open_router
from embsearch_dist.methods.ihas.router_by_centres import CentreRouter
from embsearch_dist.methods.ihas.router_by_fields import FieldRouter
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.networks.architecture import RESULT
from embsearch_dist.precision import MIXED
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.serving.tables import Bag, Ids
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.train.retrain import SubnetTask, load_best

Predict = Callable[[Batch], torch.Tensor]


@dataclass
class Collected:
    """A trained model, taken apart.

    Attributes:
        body: the part of ``model.json`` that describes it.
        predict: logits ``[B]`` of the training model itself.
        tables: float32 ``[rows, columns]`` by the names of :meth:`PlainTables.fill`; padding is left out.
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


def kind_of(directory: Path) -> str:
    """What a directory under ``RUN/retrain`` holds: ``single``, ``routed`` or ``gated``.

    Raises:
        UserError: none of them.
    """
    if not (directory / "config.yaml").exists():
        raise UserError(
            f"--run {directory}: not a directory of retrain.py (config.yaml is missing). Give RUN/retrain/NAME"
        )
    if (directory / GROUPS).exists() and (directory / "group-0").exists():
        return "routed"
    if (directory / "allocation.json").exists() and (directory / "checkpoints").exists():
        return "single"
    if (directory / "evaluation.json").exists() and not (directory / "allocation.json").exists():
        return "gated"
    raise UserError(
        f"--run {directory}: holds no trained model. Train it first: launch/retrain.py, and give RUN/retrain/NAME"
    )


def collect(run: Run, directory: Path, kind: str, router: str) -> Collected:
    """The trained model of a directory under ``RUN/retrain``.

    Args:
        kind: what :func:`kind_of` says of it.
        router: of models of groups, one of :data:`ROUTERS`.

    Raises:
        UserError: nothing is trained there, or a file is damaged.
    """
    with run.context.together("reading the trained model"):
        if kind == "single":
            return collect_single(run, directory)
        if kind == "gated":
            return collect_gated(run, directory)
    search = open_search(directory, run.config, run.schema, run.context)
    return collect_routed(run, search, directory, router)


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
    found = Collected(body, task.predict)
    take_subnet(found, task.model, "", model.extra)
    return found


def collect_routed(run: Run, search: Run, directory: Path, kind: str) -> Collected:
    """The models of iHAS's groups behind one of its routers (``centres`` or ``fields``)."""
    grouped = GroupedAllocation.load(directory / GROUPS, run.schema)
    if GroupedAllocation.load(search.dir / GROUPS, search.schema).counted(0) != grouped.counted(0):
        raise UserError(
            f"{search.dir} has other groups than {directory} was trained on. Train the new ones: retrain.py"
        )
    models = load_groups(run.config, grouped, run.context, directory)
    routed = RoutedModel(open_router(search, kind, len(models)), models, run.schema, run.context)
    found = of_routed(routed, grouped.allocations, run.config.model)
    evaluation = "evaluation.json" if kind == "centres" else f"evaluation-{kind}.json"
    found.files = existing(directory, (GROUPS,)) | existing(directory, (evaluation,), "evaluation.json")
    return found


def of_routed(routed: RoutedModel, allocations: Sequence[Allocation], model: ModelConfig) -> Collected:
    """Models of groups behind a router, of one rank."""
    body = {"kind": "routed", "widths": [dict(a.widths) for a in allocations], "model": model_of(model)}
    found = Collected(body, routed.eval())
    for k, one in enumerate(routed.subnets):
        take_subnet(found, one, f"group-{k}/", model.extra)
    _take_router(found, routed.router)
    return found


def collect_gated(search: Run, directory: Path) -> Collected:
    """The searched model itself: AdaFS, or iHAS without groups."""
    method = search.config.method
    if method not in ("adafs", "ihas"):
        raise UserError(
            f"--run {directory}: a result of method {method!r} without a model of its own. Train it: retrain.py"
        )
    task: Any = load_searched(search) if method == "adafs" else load_gates(search)
    found = of_gated(task)
    found.files = existing(directory, ("evaluation.json",))
    return found


def of_gated(task: GatedTask) -> Collected:
    """A searched model with its selector, of one rank."""
    task.model.eval()
    found = Collected(_gated_body(task) | {"kind": "gated", "model": model_of(task.run.config.model)}, task.predict)
    _take_gated(found, task, "")
    return found


def _gated_body(task: GatedTask) -> dict[str, Any]:
    own: Any = task
    search = task.run
    if search.config.method == "adafs":
        s = search.config.search
        selection = {"kind": "adafs", "mode": s.mode, "k": own.k, "renormalise": s.renormalise, "scale": s.scale}
        selection["norm"] = s.norm
    else:
        gates = dataclasses.asdict(own.gates)
        selection = {"kind": "gates"} | {key: gates[key] for key in ("shared", "bins", "fallback", "smooth")}
    return {"width": task.model.width, "selection": selection}


def _take_gated(found: Collected, task: Any, prefix: str) -> None:
    model = task.model
    take_tables(found, model.sharded, dict.fromkeys(task.run.schema.names, model.width), prefix)
    for name, tensor in model.bare_head.state_dict().items():
        part = "selector." if name.startswith("norm.") else "head."  # AdaFS's norm stands in front of the selector
        found.dense[f"{prefix}{part}{name}"] = tensor.cpu()
    own = "controller" if task.run.config.method == "adafs" else "gates"
    for name, tensor in model.bare_selector.state_dict().items():
        found.dense[f"{prefix}selector.{own}.{name}"] = tensor.cpu()


def _take_router(found: Collected, router: Router) -> None:
    if isinstance(router, FieldRouter):
        found.body["router"] = {"kind": "fields", "fields": list(router.tables)}
        found.dense["router/prior"] = router.prior.cpu()
        found.dense |= {f"router/tables/{name}": table.cpu() for name, table in router.tables.items()}
        return
    assert isinstance(router, CentreRouter)
    task = router.task
    body = _gated_body(task) | {"kind": "centres", "on": router.on, "fields": list(task.run.schema.names)}
    found.body["router"] = body | {"model": model_of(task.run.config.model)}
    _take_gated(found, task, "router/")
    found.dense["router/scale"] = router.scale.cpu()
    found.dense["router/centres"] = router.kmeans.centres[router.kmeans.alive].cpu()
    found.keep_exact = ("router/",)


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


def ids_of_batch(batch: Batch, schema: Schema) -> Ids:
    """A batch of training or evaluation as served models take it."""
    sparse, single, lists = batch.sparse, {}, {}
    counts, flat = sparse.offset_per_key(), sparse.values().long()
    lengths = sparse.lengths().view(len(schema.fields), -1).long()
    weights = sparse.weights_or_none()
    for k, f in enumerate(schema.fields):
        inside = slice(counts[k], counts[k + 1])
        if f.is_list:
            offsets = torch.nn.functional.pad(lengths[k].cumsum(0), (1, 0))
            own = weights[inside] if f.weighted and weights is not None else None
            lists[f.name] = Bag(flat[inside], offsets, own)
        else:
            single[f.name] = flat[inside]
    return Ids(single, lists, batch.dense)
