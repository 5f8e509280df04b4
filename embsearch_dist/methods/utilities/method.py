"""Width utilities as a method: the widest model, then the search."""

from __future__ import annotations

from embsearch_dist.config.sections import Config
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.utilities.config import UtilitiesConfig
from embsearch_dist.methods.utilities.search_stage import UtilitiesStage, budgets_of
from embsearch_dist.methods.widest import WidestStage
from embsearch_dist.run import Run


class Utilities(Method):
    """Widths from one trained model: no supernet, no policy."""

    config = UtilitiesConfig
    planted = {"search": {"candidates": [0, 1, 2, 4, 8], "width": 8, "rows": 6000}}
    trial = {"search": {"candidates": [0, 2, 4], "width": 4, "pareto": ["60%"], "rows": 300, "basis_rows": 300}}

    def stages(self) -> list[Stage]:
        return [WidestStage(), UtilitiesStage()]

    def needs_classes(self, config: Config) -> str:
        return "the method utilities weighs columns by what they save on rows of both"

    def check(self, run: Run) -> None:
        budgets_of(run.config.search, run.schema, run.config.model.extra)
