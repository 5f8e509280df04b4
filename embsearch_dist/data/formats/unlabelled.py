"""Rows to be predicted, in the forms of public data: the column of the label may be missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from embsearch_dist.data.formats.blocks import Layout, read_start
from embsearch_dist.data.formats.columns import Reading
from embsearch_dist.errors import UserError, nearest_or_all


def without_label(layout: Layout, label: str) -> Layout:
    """The layout of files that lack the label's column."""
    return replace(layout, columns=tuple(n for n in layout.columns if n != label))


def layout_of(file: Path, layout: Layout, label: str) -> Layout:
    """``layout`` with or without the label's column, by the number of columns in the file's first line.

    Any other number is left to whoever parses the rows, who names the line.
    """
    start, encoding = read_start(file, layout.encoding)
    first = start.split(b"\n", 1)[0].decode(encoding, errors="replace")
    short = without_label(layout, label)
    return short if first.count(layout.separator) + 1 == len(short.columns) else layout


def check_kept(file: Path, layout: Layout, reading: Reading) -> None:
    """Raises:
    UserError: a column that is to be passed on is not there.
    """
    for name in reading.kept:
        if name not in layout.columns:
            raise UserError(f"--keep {name}: {file.name} has no such column. {nearest_or_all(name, layout.columns)}")
