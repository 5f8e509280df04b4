"""AdaS&S as a method: supernet, then search."""

from __future__ import annotations

from embsearch_dist.methods.adass.config import AdassConfig
from embsearch_dist.methods.adass.searching import SearchStage
from embsearch_dist.methods.adass.supernet import SupernetStage
from embsearch_dist.methods.base import Method, Stage


class AdaSS(Method):
    """AdaS&S: a One-Shot Supernet Approach for Automatic Embedding Size Search (Wei et al. 2023)."""

    config = AdassConfig

    def stages(self) -> list[Stage]:
        return [SupernetStage(), SearchStage()]
