"""iHAS as a method: gates, what they alone are worth, then groups; ``retrain.py`` trains the groups' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embsearch_dist.config.options import one_of
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods.collected import Collected
from embsearch_dist.methods.gated.method import GatedMethod
from embsearch_dist.methods.ihas.collected import collect_routed
from embsearch_dist.methods.ihas.config import IHASConfig
from embsearch_dist.methods.ihas.gates_stage import GateStage, GatesTask, MeasureStage, load_gates
from embsearch_dist.methods.ihas.groups_stage import GroupStage
from embsearch_dist.methods.ihas.retraining import (
    evaluate_groups,
    load_groups,
    open_routed,
    open_search,
    retrain_groups,
)
from embsearch_dist.methods.ihas.routed_model import ROUTERS, measure
from embsearch_dist.methods.retraining import Results, Retraining
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.run import Run
from embsearch_dist.stores.mirroring import mirroring
from embsearch_dist.train.figures import Wanted
from embsearch_dist.train.metrics import Predictions


class IHAS(GatedMethod):
    """iHAS: an Instance-wise Hierarchical Architecture Search framework (Yu et al. 2023)."""

    config = IHASConfig
    finds = "groups"
    result = GROUPS
    trial = {
        "model": {"backbone": "mlp", "hidden": [8, 4], "unified_width": 4},
        "search": {
            "width": 4,
            "training": TRAINING,
            "outer": {"pretrain_epochs": 0.3, "every": 2, "lr": 0.02},
            "groups": {"batch_size": 120, "min_rows": 20},
        },
    }

    def stages(self) -> list[Stage]:
        return [GateStage(), MeasureStage(), GroupStage()]

    def check(self, run: Run) -> None:
        if run.config.data.source:
            raise UserError(
                "iHAS writes the rows of each group into files of their own, for which it needs prepared data: write "
                "yours with launch/prepare.py, and give --data.path in place of data.source",
                everywhere=True,
            )

    def retrain(self, job: Retraining) -> Results:
        if not isinstance(job.found, GroupedAllocation):  # a uniform width, or the user's own allocation
            return super().retrain(job)
        run = job.run_in()
        search = open_search(job.run_dir, run.config, run.schema, run.context)
        with mirroring(run.config, run.context):
            by_router = retrain_groups(search, run.config, job.found, run.dir)
        return {f"{run.dir.name} (router: {kind})": result for kind, result in by_router.items()}

    def check_evaluation(self, directory: Path, router: str, precision: str) -> None:
        if not holds_groups(directory):
            super().check_evaluation(directory, router, precision)
            return
        one_of("--router", router or ROUTERS[0], ROUTERS)
        if precision:
            raise UserError(
                f"--precision {precision}: {directory} holds models of groups: export them, the card has figures"
            )

    def evaluate(
        self, run: Run, directory: Path, split: str, router: str, precision: str, wanted: Wanted | None = None
    ) -> dict[str, Any]:
        if not holds_groups(directory):
            return super().evaluate(run, directory, split, router, precision, wanted)
        search, grouped, models = _open_groups(run, directory)
        kind = router or ROUTERS[0]
        return evaluate_groups(search, run.config, grouped, directory, models, split, kind, wanted)

    def predictions(self, run: Run, directory: Path, split: str, router: str) -> Predictions:
        if not holds_groups(directory):
            return super().predictions(run, directory, split, router)
        search, grouped, models = _open_groups(run, directory)
        model = open_routed(search, grouped, directory, models, router or ROUTERS[0])
        stream = run.stream(split, run.config.train.eval_batch_size, shuffle=False)
        return measure(model, stream.epoch(0), run.context).predictions

    def searched(self, run: Run) -> GatesTask:
        return load_gates(run)

    def kind(self, directory: Path) -> str:
        return "routed" if holds_groups(directory) else super().kind(directory)

    def collect(self, run: Run, directory: Path, router: str) -> Collected:
        if not holds_groups(directory):
            return super().collect(run, directory, router)
        search = open_search(directory, run.config, run.schema, run.context)
        return collect_routed(run, search, directory, router)


def _open_groups(run: Run, directory: Path) -> tuple[Run, GroupedAllocation, list[SubnetModel]]:
    """The search that a directory of groups belongs to, their widths and their models."""
    with run.context.together("reading the groups"):
        grouped = GroupedAllocation.load(directory / GROUPS, run.schema)
    search = open_search(directory, run.config, run.schema, run.context)
    return search, grouped, load_groups(run.config, grouped, run.context, directory)


def holds_groups(directory: Path) -> bool:
    """Whether models of groups were trained there, rather than one model."""
    return (directory / GROUPS).exists() and (directory / "group-0").exists()
