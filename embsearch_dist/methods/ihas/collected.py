"""The models of iHAS's groups and what routes rows to them, taken apart for serving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods.collected import Collected, existing, model_of, take_subnet
from embsearch_dist.methods.gated.collected import gated_body, take_gated
from embsearch_dist.methods.ihas.retraining import load_groups
from embsearch_dist.methods.ihas.routed_model import RoutedModel, Router, open_router
from embsearch_dist.methods.ihas.router_by_centres import CentreRouter
from embsearch_dist.methods.ihas.router_by_fields import FieldRouter
from embsearch_dist.run import Run


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


def _take_router(found: Collected, router: Router) -> None:
    if isinstance(router, FieldRouter):
        found.body["router"] = {"kind": "fields", "fields": list(router.tables)}
        found.dense["router/prior"] = router.prior.cpu()
        found.dense |= {f"router/tables/{name}": table.cpu() for name, table in router.tables.items()}
        return
    assert isinstance(router, CentreRouter)
    task = router.task
    body = gated_body(task) | {"kind": "centres", "on": router.on, "fields": list(task.run.schema.names)}
    found.body["router"] = body | {"model": model_of(task.run.config.model)}
    take_gated(found, task, "router/")
    found.dense["router/scale"] = router.scale.cpu()
    found.dense["router/centres"] = router.kmeans.centres[router.kmeans.alive].cpu()
    found.keep_exact = ("router/",)
