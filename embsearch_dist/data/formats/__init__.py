"""Readers of raw data, one per format; :func:`open_source` picks one by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from embsearch_dist.data.formats import clicks, kdd2012, movielens, table
from embsearch_dist.data.formats.columns import EVERYTHING, LABEL, TIME, Chunk, Column, Reading, Source
from embsearch_dist.data.formats.source_file import describe_column
from embsearch_dist.errors import UserError, nearest_or_all

SEVERAL: dict[str, Callable[..., Source]] = {"criteo": clicks.criteo, "avazu": clicks.avazu}
ONE = ("movielens_1m", "movielens_100k", "kdd2012", "table")
FORMATS = (*SEVERAL, *ONE)
LISTS = {"movielens_1m": movielens.movielens_1m, "movielens_100k": movielens.movielens_100k}
GENRES = ("one", "list")
NUMBERS = ("bucketed", "dense")

__all__ = ["FORMATS", "GENRES", "LABEL", "NUMBERS", "TIME", "Column", "Chunk", "Source", "nearest", "open_source"]


def _describe(source: Source, name: str, genres: str, numbers: str) -> dict[str, object]:
    """How more rows of a source are read, JSON-able; :mod:`embsearch_dist.data.formats.described` reads it."""
    if source.description:
        return dict(source.description)
    return {
        "format": name,
        "columns": [describe_column(c) for c in source.columns],
        "genres": genres,
        "numbers": numbers,
    }


def open_source(
    name: str, paths: Path | str | Sequence[Path | str], genres: str = "one", numbers: str = "bucketed"
) -> Source:
    """Open raw data of a named format for reading, described for those who read more of it later; criteo and avazu take
    several files or folders.

    ``genres``: what MovieLens's column of that name becomes, ``one`` value a movie or a ``list``.
    ``numbers``: what Criteo's I1-I13 become, ``bucketed`` fields or ``dense`` columns.

    Raises:
        UserError: unknown format, or whatever the reader finds wrong with the files.
    """
    source = open_rows(name, paths, genres, numbers)
    return replace(source, description=_describe(source, name, genres, numbers))


def open_rows(
    name: str,
    paths: Path | str | Sequence[Path | str],
    genres: str = "one",
    numbers: str = "bucketed",
    reading: Reading = EVERYTHING,
) -> Source:
    """As :func:`open_source`, but a part of it: see :class:`Reading`, which ``table`` does not take."""
    several = [Path(paths)] if isinstance(paths, Path | str) else [Path(p) for p in paths]
    if not several:
        raise UserError("no input was named. Give a file or folder")
    if genres not in GENRES:
        raise UserError(f"--genres {genres!r} is none of {', '.join(GENRES)}. Write one of them")
    if genres == "list" and name in FORMATS and name not in LISTS:
        raise UserError(f"--genres list is for {' and '.join(LISTS)}, not for {name}. Leave it out")
    if numbers not in NUMBERS:
        raise UserError(f"--numbers {numbers!r} is none of {', '.join(NUMBERS)}. Write one of them")
    if numbers == "dense":
        if name != "criteo":
            raise UserError(f"--numbers dense is for criteo, not for {name}. Leave it out")
        return clicks.criteo(several, numbers, reading)
    if name in SEVERAL:
        return SEVERAL[name](several, reading=reading)
    if name not in ONE:
        raise UserError(f"unknown format {name!r}. {nearest_or_all(name, FORMATS)}")
    if len(several) > 1:
        raise UserError(f"format {name} takes one --input, not {len(several)}. A table's source file lists its files")
    if name == "table":
        return table.table(several[0])
    if name in LISTS:
        return LISTS[name](several[0], genres == "list", reading)
    return kdd2012.kdd2012(several[0], reading)
