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
        try:
            return pl.DataFrame({name: _column(values) for name, values in table.items()})
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as e:
            told = " ".join(str(e).split())[:120]
            raise UserError(f"columns must have one length, and each one type ({told}): {TABLES}") from e
    if type(table).__module__.partition(".")[0] == "pandas":
        return pl.from_pandas(table)
    try:
        found = pl.from_arrow(table)
    except pl.exceptions.PolarsError as e:
        raise unreadable(e) from e
    except (TypeError, ValueError) as e:
        raise UserError(f"{type(table).__name__} is no table: {TABLES}") from e
    if isinstance(found, pl.Series):
        raise UserError(f"one column is no table: {TABLES}")
    return found


def unreadable(e: pl.exceptions.PolarsError) -> UserError:
    """What to raise where polars cannot take a column of a table."""
    return UserError(f"a column cannot be read ({' '.join(str(e).split())[:120]}): {TABLES}")


def _column(values: Any) -> Any:
    """Values as polars takes them: in a list, whole numbers may come before others."""
    if isinstance(values, list) and {type(v) for v in values} - {type(None)} == {int, float}:
        return [None if v is None else float(v) for v in values]
    return values
