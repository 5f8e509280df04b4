"""Settings of groups of rows with widths under one budget."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option, require
from embsearch_dist.methods.ihas.config import IHASConfig
from embsearch_dist.methods.utilities.config import MeasuredSearch
from embsearch_dist.precision import MIXED


@dataclass
class IHASWidthsConfig(MeasuredSearch, IHASConfig):
    """Groups of iHAS, widths by what each group loses, one budget for the tables of all groups; ``groups.keep`` is not
    read."""

    name: str = option("ihas_widths", "name of the result")
    candidates: list[int] = option([0, 2, 4, 8, 16], "candidate widths, ascending; a leading 0 may drop fields")
    width: int = option(16, "width of every field while searching: of the gates' model and of each group's widest one")

    def check(self) -> None:
        IHASConfig.check(self)
        MeasuredSearch.check(self)
        require(
            self.precision != MIXED,
            "search.precision",
            "mixed is for one model; groups have one precision for all tables",
        )
