"""The lines of a stage in ``metrics.jsonl`` and ``heatmaps.jsonl``: how many, and a checksum of them.

They are appended one by one, so the files have no checksum of their own. A checkpoint and the mark of a finished stage
say what the lines were; who reads them later is told when they are others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS, HEATMAPS = "metrics.jsonl", "heatmaps.jsonl"
Lines = dict[str, tuple[int, str]]


class Sum:
    """A running count and checksum of lines."""

    def __init__(self) -> None:
        self.count, self._found = 0, hashlib.sha256()

    def add(self, line: str) -> None:
        """``line``: with or without its end."""
        self.count += 1
        self._found.update(line.rstrip("\n").encode("utf-8", "surrogateescape") + b"\n")

    @property
    def value(self) -> tuple[int, str]:
        return self.count, self._found.hexdigest()


def stage_of(line: str) -> tuple[str, float] | None:
    """Stage and step of a line; None where it is none of ours: cut off, or damaged."""
    try:
        body = json.loads(line)
        return str(body["stage"]), float(body["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def lines_of(directory: Path, stage: str) -> Lines:
    """File name -> count and checksum of a stage's lines; without the files that have none.

    A file that cannot be read has none: it is not what a search is stopped for.
    """
    found = {}
    for name in (METRICS, HEATMAPS):
        total = Sum()
        try:
            with open(directory / name, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                for line in file:
                    place = stage_of(line)
                    if place is not None and place[0] == stage:
                        total.add(line)
        except OSError:
            pass
        if total.count:
            found[name] = total.value
    return found


def compare_lines(directory: Path, stage: str, known: Any, kept: Lines | None = None) -> list[str]:
    """A sentence for each file whose lines of ``stage`` are not those that ``known`` (from a mark) tells.

    Args:
        kept: what they are; None: to be read from the files.
    """
    if not isinstance(known, Mapping):
        return []  # of an older version
    now = lines_of(directory, stage) if kept is None else kept
    told = {name: tuple(value) for name, value in known.items() if isinstance(value, list | tuple)}
    return [
        f"{directory / name}: the lines of stage {stage!r} are not those that were written (damaged, cut, or of "
        "another run): its curves show what is left"
        for name in (METRICS, HEATMAPS)
        if told.get(name) != now.get(name)
    ]
