"""What a method is: a config dataclass, the stages of its search, and how what it finds is trained and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from embsearch_dist.config.sections import Config
from embsearch_dist.errors import UserError
from embsearch_dist.methods.collected import Collected, collect_single, is_single, nothing_there
from embsearch_dist.methods.retraining import Results, Retraining, evaluate_single, predict_single, retrain_models
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.trial import Settings
from embsearch_dist.run import Run
from embsearch_dist.train.figures import Wanted
from embsearch_dist.train.metrics import Predictions


class Method(ABC):
    """A search method: ``config`` is the dataclass of the ``search`` section.

    What most methods have in common is here: a search that ends with one allocation, whose model is trained from
    scratch and measured. A method whose result is another (groups of models, a network) says how it is trained.
    """

    config: ClassVar[type]
    result: ClassVar[str] = "allocation.json"
    """What a search leaves at the top of its run directory for retrain.py; empty: what it has trained is the result."""
    finds: ClassVar[str] = "widths"
    """What its search is for, which the report draws by: ``widths`` of fields, ``groups`` of rows, weights by ``rows``,
    or a ``network``."""
    policy: ClassVar[bool] = False
    """Whether a policy is trained to search, whose curves and probabilities the report shows."""
    planted: ClassVar[Settings | None] = None
    """Settings under which a search of half a minute finds planted widths of 0 to 8 on 60,000 rows: a test holds the
    method to it. None: it claims no such thing, because it does not look at clicks or gives no widths."""
    trial: ClassVar[Settings] = {}
    """Settings of a run of seconds, see :mod:`embsearch_dist.methods.trial`."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The stages in their order; the last one leaves :attr:`result`."""

    def needs_classes(self, config: Config) -> str:
        """Why this search can do nothing with validation rows of one class, and what to set, as an end of a sentence;
        empty where it can."""
        return ""

    def check(self, run: Run) -> None:  # noqa: B027
        """Refuse, before the first stage runs, settings that do not fit the data."""

    def retrain(self, job: Retraining) -> Results:
        """Train and measure what was found; evaluations by the name of their directory under ``RUN/retrain``.

        Raises:
            UserError: the wish is for what this method does not find.
        """
        if job.wish.best:
            raise UserError(
                f"--best {job.wish.best}: {job.run_dir} holds no networks to choose from: its search is one for "
                "widths. Leave --best out",
                everywhere=True,
            )
        return retrain_models(job)

    def check_evaluation(self, directory: Path, router: str, precision: str) -> None:
        """Refuse options of evaluate.py and export.py that the model in ``directory`` has no use for.

        Args:
            router: as given; empty: not given. ``precision`` likewise.
        """
        if router:
            raise UserError(f"--router {router}: {directory} holds one model, not models of groups. Leave it out")

    def evaluate(
        self, run: Run, directory: Path, split: str, router: str, precision: str, wanted: Wanted | None = None
    ) -> dict[str, Any]:
        """Measure a trained model; the figures, which are left in ``directory`` too.

        Args:
            wanted: what is told beside; by default ``train.group`` is.

        Raises:
            UserError: nothing is trained there, or a file is damaged.
        """
        return evaluate_single(run, directory, split, precision, wanted)

    def predictions(self, run: Run, directory: Path, split: str, router: str) -> Predictions:
        """A trained model's answers to the rows of a split, in stored order; all ranks call it.

        Raises:
            UserError: nothing is trained there, or a file is damaged.
        """
        return predict_single(run, directory, split)

    def kind(self, directory: Path) -> str:
        """What a directory under ``RUN/retrain`` holds: ``single``, or another that :meth:`collect` knows.

        Raises:
            UserError: nothing that was trained.
        """
        if not is_single(directory):
            raise nothing_there(directory)
        return "single"

    def collect(self, run: Run, directory: Path, router: str) -> Collected:
        """The trained model of a directory under ``RUN/retrain``, taken apart for serving.

        Args:
            router: of models of groups.

        Raises:
            UserError: nothing is trained there, or a file is damaged.
        """
        with run.context.together("reading the trained model"):
            return collect_single(run, directory)
