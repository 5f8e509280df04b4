"""iHAS as a method: gates, what they alone are worth, then groups; ``retrain.py`` trains the groups' models."""

from __future__ import annotations

from embsearch_dist.methods.base import Method, Stage
from embsearch_dist.methods.ihas.config import IHASConfig
from embsearch_dist.methods.ihas.gates_stage import GateStage, MeasureStage
from embsearch_dist.methods.ihas.groups_stage import GroupStage


class IHAS(Method):
    """iHAS: an Instance-wise Hierarchical Architecture Search framework (Yu et al. 2023)."""

    config = IHASConfig

    def stages(self) -> list[Stage]:
        return [GateStage(), MeasureStage(), GroupStage()]
