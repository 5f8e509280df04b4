"""UES: the same width for every field. The baseline of every report, through the same path as the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.options import option
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run


@dataclass
class UESConfig:
    """Uniform embedding size."""

    width: int = option(32, "width of every field", above=0)


class Allocate(Stage):
    """Write the uniform allocation; there is nothing to search."""

    name = "allocate"
    repeatable = True

    def inputs(self, run: Run) -> dict[str, Any]:
        return {"search": run.config.search, "schema": run.schema.fingerprint}

    def run(self, run: Run) -> None:
        allocation = Allocation.uniform(run.schema, run.config.search.width)
        run.context.first("writing allocation.json", lambda: allocation.save(run.dir / "allocation.json"))


class UES(Method):
    config = UESConfig
    trial = {"search": {"width": 4}}

    def stages(self) -> list[Stage]:
        return [Allocate()]
