"""The models of all groups as one: batch in, logits out, whatever groups the rows are of (iHAS section 3.4).

A router says the group of each row; each group's model predicts its rows; the answers are put back in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from embsearch_dist.allocation import BYTES_PER_PARAMETER
from embsearch_dist.config.options import one_of
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.load.select import select
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.methods.ihas.router_by_centres import CentreRouter, load_router
from embsearch_dist.methods.ihas.router_by_fields import assignment_file, load_field_router, read_assignment
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema, differs
from embsearch_dist.train.evaluation import Evaluation
from embsearch_dist.train.figures import Wanted, told
from embsearch_dist.train.metrics import Predictions, figures, score, stored_places

ROUTERS = ("centres", "fields")


class Router(Protocol):
    """What says which group a row belongs to."""

    def assign(self, batch: Batch) -> torch.Tensor:
        """Group of each row, ``[B]`` int64; all ranks call it together."""

    def parameters(self) -> int:
        """Numbers that must be loaded to route."""

    def flops_per_sample(self) -> float:
        """Of routing one row."""


class RoutedModel(nn.Module):
    """Router and group models; for inference only.

    Args:
        router: says the group of each row.
        models: of group 0, 1, ...
        schema: of the whole data set.
        context: of this rank. Every rank calls every model for every batch, since look-ups are collectives.
    """

    def __init__(self, router: Router, models: Sequence[SubnetModel], schema: Schema, context: Context) -> None:
        super().__init__()
        self.router, self.context = router, context
        self.subnets = tuple(models)
        for model in models:
            model.fold()
        self._registered = nn.ModuleList(models)
        self._single = not any(f.is_list for f in schema.fields)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits ``[B]``, in the order of the batch."""
        return self.predict(batch, self.router.assign(batch))

    @torch.no_grad()
    def predict(self, batch: Batch, groups: torch.Tensor) -> torch.Tensor:
        """Logits ``[B]`` of rows whose groups ``[B]`` int64 are known."""
        order = torch.argsort(groups, stable=True)
        sizes = torch.bincount(groups, minlength=len(self.subnets)).tolist()
        answers = []
        for model, rows in zip(self.subnets, order.split(sizes), strict=True):
            if len(rows):
                answers.append(model(select(batch, rows, self._single))[0])
            elif self.context.world_size > 1:
                # Other ranks may have rows of this group, and TorchRec cannot look up an empty batch.
                model(select(batch, order[:1], self._single))
        joined = torch.cat(answers)
        logits = torch.empty_like(joined)
        logits[order] = joined
        return logits


def open_router(run: Run, kind: str, groups: int) -> Router:
    """The router of a search, one of ``ROUTERS``.

    Args:
        run: the search, with its own config.
        groups: K, of the models behind it.

    Raises:
        UserError: unknown kind; missing or damaged parts; a router of another number of groups.
    """
    one_of("--router", kind, ROUTERS)
    router: Router
    if kind == "centres":
        router = centres = load_router(run)
        found = int(centres.kmeans.alive.sum())  # dead ones get no rows and come last
    else:
        router = fields = load_field_router(run)
        found = fields.groups
    if found != groups:
        raise UserError(f"the router in {run.dir} knows {found} groups, there are models of {groups}. Retrain them")
    return router


@dataclass(frozen=True)
class Measured:
    """One pass over a split; all rows of all ranks, on every rank, in stored order.

    Attributes:
        logits, labels: ``[N]`` float32 on CPU.
        groups: ``[N]`` where the router sent each row.
        seconds: of the pass on this rank, reading included; ``routing`` of these for the router.
        ids: ``[N]`` int32 of the field that was asked for; None without one.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    seconds: float
    routing: float
    ids: torch.Tensor | None = None

    @property
    def predictions(self) -> Predictions:
        """The same without the router's part."""
        return Predictions(self.logits, self.labels, self.ids, None)


@torch.no_grad()
def measure(model: RoutedModel, batches: Iterable[Batch], context: Context, group: str = "") -> Measured:
    """Predict an epoch of a stream that is not shuffled; ``group``: a field whose ids are kept beside."""
    model.eval()
    logits, labels, groups = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)]
    ids = [torch.zeros(0, dtype=torch.int32)]
    sizes: list[int] = []
    started, routing = time.monotonic(), 0.0
    for batch in batches:
        batch = batch.to(context.device)
        before = time.monotonic()
        said = model.router.assign(batch)
        if context.device.type == "cuda":
            torch.cuda.synchronize(context.device)  # no loss: the sizes of the groups are waited for anyway
        routing += time.monotonic() - before
        logits.append(model.predict(batch, said).float().cpu())
        labels.append(batch.label.cpu())
        groups.append(said.cpu())
        if group:
            ids.append(batch.sparse[group].values().int().cpu())
        sizes.append(batch.size)
    seconds = time.monotonic() - started
    places = torch.from_numpy(stored_places(context.every(sizes)))
    found = []
    for parts in (logits, labels, groups, *([ids] if group else [])):
        every = context.gather(torch.cat(parts).to(context.device)).cpu()
        found.append(torch.empty_like(every).index_copy_(0, places, every))
    return Measured(found[0], found[1], found[2], seconds, routing, found[3] if group else None)


def evaluate_routed(
    model: RoutedModel,
    run: Run,
    grouped: GroupedAllocation,
    stream: BatchStream,
    config: Config,
    name: str,
    kind: str,
    wanted: Wanted | None = None,
) -> dict[str, Any]:
    """Exact AUC and logloss over all ranks, all sizes and costs, each group's part, and the router's.

    Embedding parameters are those of all groups' tables and of the router's (with ``centres`` the search's tables):
    all of them must be loaded. Operations are those of the router and of the group a row goes to on average. A figure
    that does not exist (AUC of a group with one class, agreement on other data than the search's) is None.

    Args:
        run: the search that the groups are of, its schema that of ``stream``.
        stream: not shuffled.
        config: of the group models.
        name: of the sub-run's directory.
        kind: of the router.
        wanted: what is told beside; by default ``train.group`` is.
    """
    wanted = wanted or Wanted(config.train.group)
    found = measure(model, stream.epoch(0), run.context, wanted.group)
    total = figures(found.predictions)
    parts = [_group(found, k, grouped) for k in range(len(model.subnets))]
    tables = router_tables(model.router)
    flops = [p["rows"] / total["rows"] * m.flops_per_sample() for p, m in zip(parts, model.subnets, strict=True)]
    router = {
        "kind": kind,
        "embedding_parameters": tables,
        "agreement": agreement(found.groups, run, stream.shards.split),
        "share_of_time": found.routing / found.seconds,
    }
    measured = Evaluation(
        total,
        found.seconds,
        grouped.total("parameters") + tables,
        grouped.total("bytes") + tables * BYTES_PER_PARAMETER,
        sum(m.dense_count() for m in model.subnets) + model.router.parameters() - tables,
        sum(flops) + model.router.flops_per_sample(),
        {"groups": parts, "router": router},
        told(total, found.predictions, wanted, run.context),
    )
    return measured.body(name, stream, config)


def router_tables(router: Router) -> int:
    """Of a router's parameters, those that stand in tables and are looked up."""
    if isinstance(router, CentreRouter):
        return router.task.model.width * sum(router.task.run.schema.cardinalities)
    return router.parameters()


def agreement(groups: torch.Tensor, run: Run, split: str) -> float | None:
    """Share of the rows that went where the search had put them; None when they are not the search's rows."""

    def compare() -> float | None:
        if not is_data_of(run) or not assignment_file(run.dir, split).exists():
            return None
        said = read_assignment(run.dir, split)
        return float((groups.numpy() == said).mean()) if len(said) == len(groups) else None

    return run.context.share(run.context.first("comparing with the groups of the search", compare))


def is_data_of(run: Run) -> bool:
    """Whether ``run.schema`` is of the very data that the search in ``run.dir`` was made from."""
    if not (run.dir / "schema.json").exists():
        return False
    kept = Schema.load(run.dir)
    return replace(kept, data="") == replace(run.schema, data="") and not differs(kept.data, run.schema.data)


def _group(found: Measured, group: int, grouped: GroupedAllocation) -> dict[str, Any]:
    inside = found.groups == group
    rows = int(inside.sum())
    own_figures = score(found.logits[inside], found.labels[inside]) if rows else {"auc": math.nan, "logloss": math.nan}
    own = grouped.allocations[group]
    return {
        "rows": rows,
        **{key: None if math.isnan(own_figures[key]) else own_figures[key] for key in ("auc", "logloss")},
        "widths": {n: own.widths[n] for n in own.schema.names},
        "embedding_parameters": own.total("parameters"),
    }
