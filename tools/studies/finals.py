"""``auto`` in a comparison: searched and trained as its user does it, up to the model that it chooses.

What other methods find is trained in one way for all. ``auto`` ends with a choice between what it has found and uniform
widths, so its line is that of the chosen model, whatever width and beginning that has, and its cost holds the trainings
that it chooses from.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from embsearch_dist.files import read_sealed
from tools.studies.budget_tables import Trained
from tools.studies.comparable import AUTO
from tools.studies.jobs import Job

FINAL = "final.json"


@dataclass(frozen=True)
class Final:
    """The chain of one seed and budget.

    Attributes:
        name: of the budget, as it stands in a file name.
        run_dir: of its search.
        shared: the ``training.json`` of the widest model in the run directory of other searches with this recipe and
            seed, which serves this one too.
        searched: the job of a search there that leaves this one nothing to do; empty without one.
    """

    seed: int
    budget: str
    name: str
    run_dir: Path
    shared: Path | None = None
    searched: str = ""

    @property
    def file(self) -> Path:
        """What the choice leaves."""
        return self.run_dir / FINAL

    @property
    def job(self) -> str:
        return f"seed{self.seed}-{AUTO}-{self.name}"

    @property
    def search(self) -> str:
        return f"seed{self.seed}-search-{AUTO}-{self.name}"

    def chain(self, options: Sequence[str]) -> list[Job]:
        """Search, then retraining with the choice; nothing when it was made.

        Args:
            options: of the search, its run directory among them.
        """
        if self.file.exists():
            return []
        own = [f"--search.name={AUTO}", f"--search.budget={self.budget}"]
        begin = partial(copy_search, self.shared.parents[1], self.run_dir) if self.shared else None
        search = Job(self.search, "launch/search.py", [*options, *own], None, begin, self.shared)
        return [search, Job(self.job, "launch/retrain.py", ["--run", str(self.run_dir)], self.file)]

    def trained(self) -> Trained:
        """The chosen model; before there is one, a folder that is not there."""
        place = self.run_dir / (read_sealed(self.file)["model"] if self.file.exists() else "retrain/none")
        search = self.searched or self.search
        return Trained(AUTO, self.budget, self.seed, place, self.job, search, 0, self.shared, chooses=True)


def copy_search(source: Path, target: Path) -> None:
    """A run directory with the stages of another one, where that is there and this is not."""
    if source.exists() and not target.exists():
        trainings = {"retrain", "run.lock"}  # checkpoints lie in a folder of the first name, too
        shutil.copytree(source, target, ignore=lambda folder, _: trainings if Path(folder) == source else set())
