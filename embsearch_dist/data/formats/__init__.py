"""Readers of raw data, one per format; :func:`open_source` picks one by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from embsearch_dist.data.formats import clicks, movielens, table
from embsearch_dist.data.formats.columns import LABEL, TIME, Chunk, Column, Source, nearest
from embsearch_dist.errors import UserError

SEVERAL: dict[str, Callable[[Sequence[Path]], Source]] = {"criteo": clicks.criteo, "avazu": clicks.avazu}
ONE: dict[str, Callable[[Path], Source]] = {
    "movielens_1m": movielens.movielens_1m,
    "movielens_100k": movielens.movielens_100k,
    "table": table.table,
}
FORMATS = (*SEVERAL, *ONE)

__all__ = ["FORMATS", "LABEL", "TIME", "Column", "Chunk", "Source", "nearest", "open_source"]


def open_source(name: str, paths: Path | str | Sequence[Path | str]) -> Source:
    """Open raw data of a named format for reading; criteo and avazu take several files or folders.

    Raises:
        UserError: unknown format, or whatever the reader finds wrong with the files.
    """
    several = [Path(paths)] if isinstance(paths, Path | str) else [Path(p) for p in paths]
    if not several:
        raise UserError("no input was named. Give a file or folder")
    if name in SEVERAL:
        return SEVERAL[name](several)
    if name not in ONE:
        raise UserError(f"unknown format {name!r}. {nearest(name, FORMATS)}")
    if len(several) > 1:
        raise UserError(f"format {name} takes one --input, not {len(several)}. A table's source file lists its files")
    return ONE[name](several[0])
