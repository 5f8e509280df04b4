"""Readers of raw data, one per format; :func:`open_source` picks one by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from embsearch_dist.data.formats import clicks, movielens, table
from embsearch_dist.data.formats.columns import LABEL, TIME, Chunk, Column, Source, nearest
from embsearch_dist.errors import UserError

FORMATS: dict[str, Callable[[Path], Source]] = {
    "criteo": clicks.criteo,
    "avazu": clicks.avazu,
    "movielens_1m": movielens.movielens_1m,
    "movielens_100k": movielens.movielens_100k,
    "table": table.table,
}

__all__ = ["FORMATS", "LABEL", "TIME", "Chunk", "Column", "Source", "nearest", "open_source"]


def open_source(name: str, path: Path | str) -> Source:
    """Open raw data of a named format for reading.

    Raises:
        UserError: unknown format, or whatever the reader finds wrong with the files.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}. {nearest(name, FORMATS)}")
    return FORMATS[name](Path(path))
