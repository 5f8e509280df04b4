"""NASRec (Zhang et al. 2023): one supernet of architectures, and evolution over what it scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.nasrec.choosing import candidate_files, refitted, train_best
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.evolution_stage import EvolutionStage, limits_of
from embsearch_dist.methods.nasrec.supernet_stage import SupernetStage
from embsearch_dist.methods.retraining import Results, Retraining
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import TRAINING
from embsearch_dist.networks.architecture import RESULT
from embsearch_dist.run import Run
from embsearch_dist.train.figures import Wanted


class NASRec(Method):
    """Supernet, then evolution; the result is an architecture for uniform tables."""

    config = NASRecConfig
    finds = "network"
    result = RESULT
    trial = {
        "model": {"init_std": 0.1},
        "optim": {"embedding": "adagrad", "embedding_lr": 0.05, "dense": "adagrad", "dense_lr": 0.05, "clip_norm": 5},
        "search": {
            "space": {"blocks": 2, "dense_widths": [8], "sparse_widths": [4], "tokens": 2, "width": 8},
            "supernet": TRAINING,
            "scoring": {"rows": 100, "tune_rows": 100, "tune_steps": 2, "tune_batch": 50},
            "evolution": {"population": 3, "generations": 2, "parents": 2, "children": 1, "keep": 2},
        },
    }

    def check(self, run: Run) -> None:
        if run.config.optim.weight_decay:
            raise UserError("config key optim.weight_decay: must be 0 for a supernet of slices")
        if run.config.model.precision != "float32":
            raise UserError("config key model.precision: NASRec's networks have products in float32 alone")
        space = run.config.search.space.make()
        if limits := limits_of(run, space):  # before a supernet is trained that none can be found in
            limits.check(space, run.config.run.seed)

    def stages(self) -> list[Stage]:
        return [SupernetStage(), EvolutionStage()]

    def retrain(self, job: Retraining) -> Results:
        if not job.wish.best or not isinstance(job.found, Allocation):
            return super().retrain(job)
        with job.run.context.together("looking for the candidates"):
            files = candidate_files(job.run_dir, job.wish.best)
        directory = job.run_in().dir
        return {directory.name: train_best(job.run, job.found, files, directory, job.wish.refit)}

    def evaluate(
        self, run: Run, directory: Path, split: str, router: str, precision: str, wanted: Wanted | None = None
    ) -> dict[str, Any]:
        result = super().evaluate(run, directory, split, router, precision, wanted)
        if split == "validation" and run.context.rank == 0 and refitted(directory):
            print(
                f"note: {directory} was trained on the validation split too (--refit): these figures do not say how "
                "good it is on rows that it has not seen. --split test does",
                file=sys.stderr,
            )
        return result
