"""The stage that trains a gated task to its end, and gives it back for what is found from its weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from embsearch_dist.methods.gated import task as gated
from embsearch_dist.methods.gated.task import GatedTask
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run

T = TypeVar("T", bound=GatedTask)


class SelectorStage(Stage, Generic[T]):
    """Trains model and selector by ``search.training``; the last checkpoint, in ``checkpoints/NAME``, is the result."""

    own: ClassVar[tuple[str, ...]] = ()
    """Keys of the ``search`` section that the result depends on, beside ``training`` and ``outer``."""

    @abstractmethod
    def task(self, run: Run, training: bool) -> T:
        """``training``: False for a model that is only read."""

    @abstractmethod
    def line(self, run: Run, task: T) -> str:
        """What is searched, for the terminal."""

    def settings(self, run: Run) -> dict[str, Any]:
        """The method's own settings that the result depends on."""
        return {f"search.{k}": getattr(run.config.search, k) for k in self.own}

    def inputs(self, run: Run) -> dict[str, Any]:
        search = run.config.search
        return gated.inputs_of(run, search.training, {**self.settings(run), "search.outer": search.outer})

    def run(self, run: Run) -> None:
        task = self.task(run, training=True)
        ranks = f"{run.context.world_size} rank(s)"
        gated.train(run, self.name, task, run.config.search.training, [f"{self.name}: {self.line(run, task)}, {ranks}"])

    def finished(self, run: Run) -> T:
        """The task of the finished stage, in evaluation mode."""
        task = self.task(run, training=False)
        gated.load(run, self.name, task, best=False)
        return task
