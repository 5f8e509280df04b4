"""NASRec (Zhang et al. 2023): one supernet of architectures, and evolution over what it scores."""

from __future__ import annotations

from embsearch_dist.errors import UserError
from embsearch_dist.methods.base import Method, Run, Stage
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.evolution_stage import EvolutionStage
from embsearch_dist.methods.nasrec.supernet_stage import SupernetStage


class NASRec(Method):
    """Supernet, then evolution; the result is an architecture for uniform tables."""

    config = NASRecConfig

    def check(self, run: Run) -> None:
        if run.config.optim.weight_decay:
            raise UserError("config key optim.weight_decay: must be 0 for a supernet of slices")

    def stages(self) -> list[Stage]:
        return [SupernetStage(), EvolutionStage()]
