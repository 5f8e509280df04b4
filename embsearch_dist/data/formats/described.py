"""Rows like those that a model was trained on, read by what the prepared data tell of their source.

A description is JSON: ``format`` and ``columns`` (name, kind, column of the files, and the keys of a list), of a table
also how text is cut and how cells are spelled. Neither label nor time is read, and of the columns only those that a
model looks at.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embsearch_dist.data.formats import FORMATS, open_rows
from embsearch_dist.data.formats.cells import Spelling
from embsearch_dist.data.formats.columns import Bag, Column, Reading, Source
from embsearch_dist.data.formats.inputs import expand
from embsearch_dist.data.formats.source_file import TableSource
from embsearch_dist.data.formats.table import unlabelled
from embsearch_dist.errors import UserError


@dataclass(frozen=True)
class Description:
    """How raw rows are read.

    Attributes:
        format: one of :data:`embsearch_dist.data.formats.FORMATS`.
        columns: fields and dense columns, in the order of the schema.
        raw: the column of the files behind each of them, where rows come as a table.
        spelling: how cells of a table are written.
        text: ``delimiter``, ``encoding`` and ``quoted`` of text files, and ``format`` where the source file named it.
        options: of the format: ``genres`` and ``numbers``.
        given_ids: cells hold ids that were made elsewhere, not values of a vocabulary.
    """

    format: str
    columns: tuple[Column, ...]
    raw: dict[str, str]
    spelling: Spelling
    text: dict[str, Any]
    options: dict[str, str]
    given_ids: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any], where: str) -> Description:
        """From JSON.

        Raises:
            UserError: it is no description; names ``where`` it stands.
        """
        try:
            columns = tuple(
                Column(
                    str(c["name"]),
                    str(c["kind"]),
                    Bag(**c["bag"]) if "bag" in c else None,
                    bool(c.get("whole", False)),
                    bool(c.get("log", False)),
                )
                for c in body["columns"]
            )
            raw = {str(c["name"]): str(c.get("column", c["name"])) for c in body["columns"]}
            spelled = dict(body.get("spelling", {}))
            spelling = Spelling(**spelled | ({"missing": tuple(spelled["missing"])} if "missing" in spelled else {}))
            text = {"delimiter": "", "encoding": "utf-8", "quoted": True} | dict(body.get("text", {}))
            options = {key: str(body[key]) for key in ("genres", "numbers") if key in body}
            if body["format"] not in FORMATS:
                raise ValueError(f"format {body['format']!r}")
            given = bool(body.get("given_ids", False))
            return cls(str(body["format"]), columns, raw, spelling, text, options, given)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{where}: does not describe how rows are read ({e!r}). Export the model again") from e

    def open(self, path: Path, format: str, reading: Reading) -> Source:
        """Raw rows to be predicted.

        Args:
            path: a file or folder in the form ``format``; of a table also a pattern.
            format: that of the training data, or ``table``: CSV, TSV or Parquet with the columns by name.

        Raises:
            UserError: whatever the reader finds.
        """
        if format == "table":
            return unlabelled(self.table(path), reading)
        if not path.exists():
            raise UserError(f"--input {path}: no such file or folder. Check the path")
        return open_rows(format, path, reading=reading, **self.options)

    def files(self, path: Path) -> tuple[Path, ...]:
        """The files of a table behind a file, a folder or a pattern, in the order of their rows.

        Raises:
            UserError: there are none.
        """
        spec = self.table(path)
        return expand(spec.path, spec.files, bool(spec.likely))[0]

    def table(self, path: Path) -> TableSource:
        """The columns by name, from a file, a folder or a pattern.

        Raises:
            UserError: nothing is there.
        """
        pattern = not path.exists()
        if pattern:
            if not glob.has_magic(str(path)):
                raise UserError(f"--input {path}: no such file or folder. Check the path")
            if not any(Path(p).is_file() for p in glob.iglob(str(path), recursive=True)):
                raise UserError(f"--input {path}: no file fits the pattern. Check the path")
        plain: dict[str, Any] = {"delimiter": "", "encoding": "utf-8", "quoted": True}
        own = self.text if self.format == "table" else plain
        return TableSource(
            path=Path("--input"),
            name=path.name,
            files=(str(path if pattern else path.absolute()),),  # the folder one works in is no part of the pattern
            format="",
            delimiter=own["delimiter"],
            encoding=own["encoding"],
            quoted=own["quoted"],
            spelling=self.spelling,
            label=None,
            time=None,
            columns=self.columns,
            raw=self.raw,
            min_count=1,
            likely=own.get("format", ""),
        )
