"""Settings of AutoField (Wang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option
from embsearch_dist.config.widths import check_table_width
from embsearch_dist.methods.gated.config import ChoiceOptions


@dataclass
class AutoFieldConfig(ChoiceOptions):
    """AutoField: gates choose whole fields; what is kept has one width."""

    width: int = option(16, "width of every kept field, in the search and after it")
    k: int = option(0, "without a budget: fields that are kept; 0 = half of them", low=0)

    def check(self) -> None:
        super().check()
        check_table_width(self.width)

    @property
    def candidates(self) -> list[int]:
        return [0, self.width]
