"""Any table in memory as a polars frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from embsearch_dist.errors import UserError

TABLES = "give a pandas or polars frame, a pyarrow table or {column: values}"


def frame_of(table: Any) -> pl.DataFrame:
    """A polars or pandas frame, a pyarrow table, or a mapping of columns.

    Raises:
        UserError: it is none of them.
    """
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, Mapping):
        return pl.DataFrame(dict(table))
    if type(table).__module__.partition(".")[0] == "pandas":
        return pl.from_pandas(table)
    try:
        found = pl.from_arrow(table)
    except (TypeError, ValueError) as e:
        raise UserError(f"{type(table).__name__} is no table: {TABLES}") from e
    if isinstance(found, pl.Series):
        raise UserError(f"one column is no table: {TABLES}")
    return found
