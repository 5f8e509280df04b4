"""Models in plain torch, built from a description and arrays: the logits of the training models, without TorchRec.

Three kinds: ``single`` (tables and head: AdaS&S, NASRec, uniform widths, ...), ``gated`` (columns weighed row by row:
AdaFS, the gates of iHAS) and ``routed`` (a model per group of rows, behind a router: iHAS).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from embsearch_dist.config.backbones import FIXED, registered_names
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.errors import UserError
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.models.backbones.making import backbone_of
from embsearch_dist.models.folded import FoldedMLP, can_fold
from embsearch_dist.models.head import Head, make_head
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.models.rows import fill_rows
from embsearch_dist.precision import MIXED
from embsearch_dist.schema import Schema
from embsearch_dist.serving.selecting import Selector, make_selector
from embsearch_dist.serving.tables import Ids, PlainTables, TableSpec

Tensors = Mapping[str, torch.Tensor]
KINDS = ("single", "gated", "routed")


class ServedModel(nn.Module):
    """Ids in, logits ``[B]`` out. ``fields``: names of those that it looks at, in schema order."""

    fields: list[str]

    def forward(self, ids: Ids) -> torch.Tensor:
        raise NotImplementedError


class Single(ServedModel):
    """Tables of one allocation, and the head behind them.

    ``precisions``: of the fields whose tables have another than ``precision``; ``values``: of those whose tables have
    rows for some values alone.
    """

    def __init__(
        self,
        schema: Schema,
        widths: Mapping[str, int],
        model: ModelConfig,
        precision: str,
        precisions: Mapping[str, str] = MappingProxyType({}),
        padded: bool = False,
        values: Mapping[str, KeptValues] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.fields = [n for n in schema.names if widths[n]]
        specs = [
            TableSpec(
                f, widths[f.name], widths[f.name] + model.extra, precisions.get(f.name, precision), values.get(f.name)
            )
            for f in schema.fields
            if widths[f.name]
        ]
        self.tables = PlainTables(specs, padded)
        self.head: Head = make_head(model, [s.width for s in specs], len(schema.dense), False)

    def fill(self, tables: Tensors, dense: Tensors, prefix: str) -> None:
        """Take weights out of arrays by name."""
        self.tables.fill(tables, prefix)
        self.head.load_state_dict(_behind(dense, f"{prefix}head."))

    def forward(self, ids: Ids) -> torch.Tensor:
        return self.behind(self.head, ids)

    def behind(self, head: Any, ids: Ids) -> torch.Tensor:
        """What ``head`` makes of the tables' rows."""
        pooled = self.tables(ids)
        whole = dataclasses.replace(pooled, values=fill_rows(pooled.values))
        logit: torch.Tensor = head(fill_rows(ids.dense), whole)
        return logit[: ids.rows]


class Gated(ServedModel):
    """Tables of one width, whose columns are weighed by what stands in each row."""

    def __init__(
        self, schema: Schema, width: int, model: ModelConfig, precision: str, selection: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.fields = list(schema.names)
        count, n_dense = len(schema.fields), len(schema.dense)
        self.tables = PlainTables([TableSpec(f, width, width, precision) for f in schema.fields])
        self.selector: Selector = make_selector(selection, count, width)
        self.head = Head(nn.Identity(), backbone_of(model, count, width, n_dense))

    def fill(self, tables: Tensors, dense: Tensors, prefix: str) -> None:
        self.tables.fill(tables, prefix)
        self.head.load_state_dict(_behind(dense, f"{prefix}head."))
        self.selector.load_state_dict(_behind(dense, f"{prefix}selector."))

    def embed(self, ids: Ids) -> torch.Tensor:
        """``[F, B, d]`` as the tables hold them."""
        return self.tables(ids).stack()

    def forward(self, ids: Ids) -> torch.Tensor:
        u = fill_rows(self.embed(ids).transpose(0, 1)).transpose(0, 1)
        logit: torch.Tensor = self.head(fill_rows(ids.dense), self.selector(u))
        return logit[: ids.rows]


class FieldRouter(nn.Module):
    """Which group a row belongs to, by a few of its ids: sums of tables, see methods/ihas/router_by_fields.py."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.prior: torch.Tensor

    def fill(self, tensors: Tensors, prefix: str) -> None:
        self.register_buffer("prior", tensors[f"{prefix}prior"], persistent=False)
        for k, name in enumerate(self.names):
            self.register_buffer(f"t{k}", tensors[f"{prefix}tables/{name}"], persistent=False)

    def forward(self, ids: Ids) -> torch.Tensor:
        """``[B]`` int64."""
        score = self.prior.expand(ids.rows, -1)
        for k, name in enumerate(self.names):
            score = score + nn.functional.embedding(ids.single[name], self.get_buffer(f"t{k}"))
        return score.argmax(1)


class CentreRouter(nn.Module):
    """The router of the paper: the search's tables and gates, then the nearest centre: ``ihas.router_by_centres``."""

    def __init__(self, base: Gated, on: str, groups: int) -> None:
        super().__init__()
        self.base, self.on, self.groups = base, on, groups
        self.names = base.fields
        self.scale: torch.Tensor
        self.centres: torch.Tensor

    def fill(self, tables: Tensors, dense: Tensors, prefix: str) -> None:
        self.base.fill(tables, dense, prefix)
        self.register_buffer("scale", dense[f"{prefix}scale"], persistent=False)
        self.register_buffer("centres", dense[f"{prefix}centres"], persistent=False)

    def forward(self, ids: Ids) -> torch.Tensor:
        """``[B]`` int64."""
        from embsearch_dist.methods.ihas.kmeans import squared_distances

        selector: Any = self.base.selector
        u = self.base.embed(ids).transpose(0, 1)
        logits, masks = selector.look(u)
        if self.on == "masks":
            seen = masks
        elif self.on == "probabilities":
            seen = torch.sigmoid(logits)
        else:
            u = u / self.scale[:, None] if self.on == "scaled" else u
            seen = u.flatten(1) * masks
        alive = torch.ones(len(self.centres), dtype=torch.bool)
        return squared_distances(seen, self.centres, alive).argmin(1)


class Routed(ServedModel):
    """A router, and a model for each group; the model of its group answers each row."""

    def __init__(self, schema: Schema, router: FieldRouter | CentreRouter, models: Sequence[Single]) -> None:
        super().__init__()
        self.router, self.models = router, nn.ModuleList(models)
        used = {*router.names, *(n for m in models for n in m.fields)}
        self.fields = [n for n in schema.names if n in used]
        self._folded: list[FoldedMLP | None] = []

    def fold(self) -> None:
        """Once the weights are there: predict as :class:`embsearch_dist.methods.ihas.routed_model.RoutedModel` does."""
        for model in self.models:
            head: Any = model.head
            tables: Any = model.tables
            folded = None
            if can_fold(head.unify, head.backbone):
                values = torch.zeros(1, sum(s.columns for s in tables.specs) + sum(tables._fills))
                widths = tuple(s.width for s in tables.specs)
                folded = FoldedMLP(head.unify, head.backbone, Pooled(values, tables._starts, widths, tables._weights))
            self._folded.append(None if folded is None else folded.eval())

    def answer(self, group: int, ids: Ids) -> torch.Tensor:
        """Logits of one group's model for any rows."""
        model: Any = self.models[group]
        folded = self._folded[group]
        return model.behind(model.head if folded is None else folded, ids)

    def forward(self, ids: Ids) -> torch.Tensor:
        groups = self.router(ids)
        if torch.compiler.is_exporting():  # shapes there may not depend on values: all models answer, one is taken
            every = torch.stack([self.answer(k, ids) for k in range(len(self.models))], 1)
            return every.gather(1, groups[:, None]).squeeze(1)
        logits = torch.empty(ids.rows)
        for k in range(len(self.models)):
            rows = (groups == k).nonzero().flatten()
            if len(rows):
                logits[rows] = self.answer(k, ids.take(rows))
        return logits


def build(body: Mapping[str, Any], schema: Schema, directory: Path) -> Any:
    """The model that a description (:mod:`embsearch_dist.serving.directory`) is of, without weights.

    Raises:
        KeyError, TypeError, ValueError: the description is damaged.
    """
    model = config_of(body["model"], directory)
    precision, kind = body["precision"], body["kind"]
    if kind == "single":
        own = body["precisions"] if precision == MIXED else {}
        return Single(schema, body["widths"][0], model, precision, own, values=values_of(body, schema))
    if kind == "gated":
        return Gated(schema, body["width"], model, precision, body["selection"])
    if kind != "routed":
        raise ValueError(f"kind {kind!r}")
    router = body["router"]
    if router["kind"] == "fields":
        made: FieldRouter | CentreRouter = FieldRouter(router["fields"])
    else:
        base = config_of(router["model"], directory)
        gates = Gated(schema, router["width"], base, "fp32", router["selection"])
        made = CentreRouter(gates, router["on"], len(body["widths"]))
    return Routed(schema, made, [Single(schema, w, model, precision, padded=True) for w in body["widths"]])


def fill(model: Any, body: Mapping[str, Any], tables: Tensors, dense: Tensors) -> Any:
    """Put the weights in; gives the model, ready to predict."""
    if isinstance(model, Routed):
        for k, one in enumerate(model.models):
            one.fill(tables, dense, f"group-{k}/")  # type: ignore[operator]
        if isinstance(model.router, FieldRouter):
            model.router.fill(dense, "router/")
        else:
            model.router.fill(tables, dense, "router/")
    else:
        model.fill(tables, dense, "")
    model.eval().requires_grad_(False)
    if isinstance(model, Routed):
        model.fold()
    return model


def values_of(body: Mapping[str, Any], schema: Schema) -> dict[str, KeptValues]:
    """The fields whose tables have rows for some values alone, as a description tells them."""
    cardinality = {f.name: f.cardinality for f in schema.fields}
    return {name: KeptValues.from_dict(own, cardinality[name]) for name, own in body.get("values", {}).items()}


def config_of(body: Mapping[str, Any], directory: Path) -> ModelConfig:
    """The model section of a config; the architecture lies in the directory.

    Raises:
        UserError: it names a backbone that nothing has registered. A directory never says what code to run: whoever
            opens it has to.
    """
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    config = ModelConfig(**{k: v for k, v in body.items() if k in known})
    if config.backbone not in (*FIXED, *registered_names()):
        raise UserError(
            f"{directory}: its backbone {config.backbone!r} is none of ours, and a model directory holds no code. Give "
            f"--module {config.module or 'FILE.py'} (a file or an installed module that registers it), in Python "
            "es.load_model(DIR, module=...); programs of export.py --format torch or onnx run without it"
        )
    if config.architecture:
        config.architecture = str(directory / config.architecture)
    return config


def _behind(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
