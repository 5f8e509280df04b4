"""Sizes of uniform widths as a report counts them: with the columns that every table has beside its width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embsearch_dist.allocation import REFERENCE_WIDTH
from embsearch_dist.report.runs import Run

ROUNDING = 1e-9  # of mean sizes


@dataclass(frozen=True)
class UniformSizes:
    """Embedding parameters of uniform widths.

    Attributes:
        values: of all fields together; rows of all tables.
        extra: columns of a table beside its width (``ModelConfig.extra``).
    """

    values: float
    extra: int = 0

    def of(self, width: int) -> float:
        """Parameters of a uniform width."""
        return self.values * (width + self.extra)

    @property
    def reference(self) -> float:
        """Parameters of UES-32."""
        return self.of(REFERENCE_WIDTH)

    def not_smaller(self, parameters: float) -> int:
        """The narrowest width, at least 1, whose tables have at least so many parameters."""
        return max(1, math.ceil(parameters / self.values * (1 - ROUNDING)) - self.extra)


def sizes_of(runs: Sequence[Run]) -> UniformSizes | None:
    """Of the data and models of these runs; None where none of them has a schema."""
    schema = next((run.schema for run in runs if run.schema is not None), None)
    return None if schema is None else UniformSizes(sum(schema.cardinalities), extra_of(runs))


def extra_of(runs: Sequence[Run]) -> int:
    """Columns beside the width, by the first run that tells."""
    return next((run.extra for run in runs if run.extra is not None), 0)
