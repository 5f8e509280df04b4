"""NASRec (Zhang et al. 2023): one supernet of architectures, and evolution over what it scores."""

from __future__ import annotations

from embsearch_dist.methods.base import Method, Stage
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.searching import EvolutionStage
from embsearch_dist.methods.nasrec.supernet import SupernetStage


class NASRec(Method):
    """Supernet, then evolution; the result is an architecture for uniform tables."""

    config = NASRecConfig

    def stages(self) -> list[Stage]:
        return [SupernetStage(), EvolutionStage()]
