"""Settings of AutoDim (Zhao et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option
from embsearch_dist.config.widths import check_table_candidates
from embsearch_dist.methods.gated.config import ChoiceOptions

ORDERS = ("first", "second")


@dataclass
class AutoDimConfig(ChoiceOptions):
    """AutoDim: a relaxed choice of each field's width."""

    candidates: list[int] = option(
        [2, 4, 8, 16, 32], "candidate widths, ascending, the widest a multiple of 4; a leading 0 may drop fields"
    )
    order: str = option(
        "first",
        "held-out rows are scored with the weights as they are (first) or after a virtual step of the head (second)",
        choices=ORDERS,
    )

    def check(self) -> None:
        super().check()
        check_table_candidates(self.candidates)
