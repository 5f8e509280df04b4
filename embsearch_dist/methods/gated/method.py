"""A method whose search trains a model that is a result itself: how that model is measured and taken apart."""

from __future__ import annotations

import copy
from abc import abstractmethod
from pathlib import Path
from typing import Any

from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.collected import Collected
from embsearch_dist.methods.gated.collected import collect_gated, is_gated, search_of
from embsearch_dist.methods.gated.result import evaluate_gated
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.methods.retraining import leave_evaluation
from embsearch_dist.run import Run
from embsearch_dist.train.figures import Wanted
from embsearch_dist.train.metrics import Predictions, predictions


class GatedMethod(Method):
    """Beside what is retrained, ``RUN/retrain`` has a directory in which the searched model itself was measured."""

    @abstractmethod
    def searched(self, run: Run) -> GatedTask:
        """The trained model of a search's run directory, to be read."""

    def check_evaluation(self, directory: Path, router: str, precision: str) -> None:
        super().check_evaluation(directory, router, precision)
        if precision and is_gated(directory):
            raise UserError(
                f"--precision {precision}: {directory} holds the model of a search itself: export it, the card has "
                "figures"
            )

    def evaluate(
        self, run: Run, directory: Path, split: str, router: str, precision: str, wanted: Wanted | None = None
    ) -> dict[str, Any]:
        if not is_gated(directory):
            return super().evaluate(run, directory, split, router, precision, wanted)
        task, stream = self._open(run, directory, split)
        result = evaluate_gated(task, stream, run.context, run.config, directory.name, wanted)
        return leave_evaluation(run.context, directory, split, result)

    def predictions(self, run: Run, directory: Path, split: str, router: str) -> Predictions:
        if not is_gated(directory):
            return super().predictions(run, directory, split, router)
        task, stream = self._open(run, directory, split)
        task.model.eval()
        return predictions(task.predict, stream.epoch(0), run.context).in_stored_order(run.context)

    def kind(self, directory: Path) -> str:
        return "gated" if is_gated(directory) else super().kind(directory)

    def collect(self, run: Run, directory: Path, router: str) -> Collected:
        if not is_gated(directory):
            return super().collect(run, directory, router)
        with run.context.together("reading the trained model"):
            return collect_gated(self.searched(run), directory)

    def _open(self, run: Run, directory: Path, split: str) -> tuple[GatedTask, BatchStream]:
        config = copy.deepcopy(run.config)
        config.run.dir = str(search_of(directory))
        search = Run(config, run.schema, run.context)
        return self.searched(search), search.stream(split, config.search.training.eval_batch_size, shuffle=False)
