"""Groups of iHAS, widths by measured losses, one budget: gates, groups, the widest model of each group, the widths."""

from __future__ import annotations

from embsearch_dist.config.sections import Config
from embsearch_dist.methods.ihas.gates_stage import GateStage, MeasureStage
from embsearch_dist.methods.ihas.groups_stage import RowGroupStage
from embsearch_dist.methods.ihas.method import IHAS
from embsearch_dist.methods.ihas_widths.config import IHASWidthsConfig
from embsearch_dist.methods.ihas_widths.widest_stage import GroupWidestStage
from embsearch_dist.methods.ihas_widths.widths_stage import GroupWidthsStage, budget_of_run
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run


class IHASWidths(IHAS):
    """iHAS's groups, each with the widths that a budget for all of them buys; trained and served as iHAS's are."""

    config = IHASWidthsConfig
    trial = {
        **IHAS.trial,
        "search": {**IHAS.trial["search"], "candidates": [0, 2, 4], "rows": 300, "basis_rows": 300},
    }

    def stages(self) -> list[Stage]:
        return [GateStage(), MeasureStage(), RowGroupStage(), GroupWidestStage(), GroupWidthsStage()]

    def needs_classes(self, config: Config) -> str:
        return "the method ihas_widths weighs columns by what they save on rows of both"

    def check(self, run: Run) -> None:
        super().check(run)
        budget_of_run(run)
