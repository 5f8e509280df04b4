"""iHAS as a method: gates, what they alone are worth, then groups; ``retrain.py`` trains the groups' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embsearch_dist.config.options import one_of
from embsearch_dist.errors import UserError
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.ihas.config import IHASConfig
from embsearch_dist.methods.ihas.gates_stage import GateStage, MeasureStage
from embsearch_dist.methods.ihas.groups_stage import GroupStage
from embsearch_dist.methods.ihas.retraining import evaluate_groups, load_groups, open_search, retrain_groups
from embsearch_dist.methods.ihas.routed_model import ROUTERS
from embsearch_dist.methods.retraining import Results, Retraining
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.run import Run
from embsearch_dist.stores.mirroring import mirroring


class IHAS(Method):
    """iHAS: an Instance-wise Hierarchical Architecture Search framework (Yu et al. 2023)."""

    config = IHASConfig
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

    def evaluate(self, run: Run, directory: Path, split: str, router: str, precision: str) -> dict[str, Any]:
        if not holds_groups(directory):
            return super().evaluate(run, directory, split, router, precision)
        config, context = run.config, run.context
        with context.together("reading the groups"):
            grouped = GroupedAllocation.load(directory / GROUPS, run.schema)
        search = open_search(directory, config, run.schema, context)
        models = load_groups(config, grouped, context, directory)
        return evaluate_groups(search, config, grouped, directory, models, split, router or ROUTERS[0])


def holds_groups(directory: Path) -> bool:
    """Whether models of groups were trained there, rather than one model."""
    return (directory / GROUPS).exists() and (directory / "group-0").exists()
