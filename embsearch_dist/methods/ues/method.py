"""UES as a method: the uniform allocation is written, and trained as any other."""

from __future__ import annotations

from typing import Any

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.ues.config import UESConfig
from embsearch_dist.run import Run


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
