"""Rows like those that a model was trained on, read by what the prepared data tell of their source.

A description is JSON: ``format`` and ``columns`` (name, kind, column of the files, and the keys of a list), of a table
also how text is cut and how cells are spelled. Neither label nor time is read, and of the columns only those that a
model looks at.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embsearch_dist.data.formats import FORMATS, open_rows
from embsearch_dist.data.formats.cells import Spelling
from embsearch_dist.data.formats.columns import Bag, Column, Reading, Source
from embsearch_dist.data.formats.inputs import expand
from embsearch_dist.data.formats.source_file import TableSource, delimiter_of, encoding_of
from embsearch_dist.data.formats.table import DELIMITERS, unlabelled
from embsearch_dist.errors import UserError

HOUR = ("avazu", "hour")  # is YYMMDDHH in Kaggle's files
NOTHING: Mapping[str, str] = {}
KEYS = re.compile(r"(Try|write) `(delimiter|encoding): ([^`]+)`(?: in the source file)?")


def checked(text: Mapping[str, str]) -> dict[str, str]:
    """``delimiter`` and ``encoding`` as they are written, checked.

    Raises:
        UserError: one of them cannot be.
    """
    found = dict(text)
    if (mark := text.get("delimiter")) is not None:
        found["delimiter"] = delimiter_of(mark, f"--delimiter {mark!r}: it")
    if "encoding" in text:
        found["encoding"] = encoding_of(text["encoding"], "--encoding")
    return found


def as_options(told: str) -> str:
    """What a reader advises to write into a source file, as options: rows to be predicted have no source file."""
    return KEYS.sub(lambda found: f"{'Give' if found[1] == 'Try' else 'give'} --{found[2]} {found[3]}", told)


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
                    (body["format"], c["name"]) == HOUR,
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

    def open(self, path: Path, format: str, reading: Reading, text: Mapping[str, str] = NOTHING) -> Source:
        """Raw rows to be predicted.

        Args:
            path: a file or folder in the form ``format``; of a table also a pattern.
            format: that of the training data, or ``table``: CSV, TSV or Parquet with the columns by name.
            text: ``delimiter`` and ``encoding`` of the text files of a table, where they are not those of the training.

        Raises:
            UserError: whatever the reader finds.
        """
        if format == "table":
            return self._table(self.table(path, text), reading)
        if text:
            raise UserError(f"--{next(iter(text))} is for tables, not for {format}. Leave it out")
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

    def _table(self, spec: TableSource, reading: Reading) -> Source:
        """A file may be named .csv and be cut by tabs, as the training's was: `format: tsv` told it then."""
        try:
            return unlabelled(spec, reading)
        except UserError:
            if spec.delimiter or spec.likely not in DELIMITERS:
                raise
            try:
                return unlabelled(replace(spec, delimiter=DELIMITERS[spec.likely]), reading)
            except UserError:
                pass  # what is wrong under the separator of the files' names is told
            raise

    def table(self, path: Path, text: Mapping[str, str] = NOTHING) -> TableSource:
        """The columns by name, from a file, a folder or a pattern; ``text`` as :meth:`open` takes it.

        Raises:
            UserError: nothing is there, or ``text`` cannot be.
        """
        pattern = not path.exists()
        if pattern:
            if not glob.has_magic(str(path)):
                raise UserError(f"--input {path}: no such file or folder. Check the path")
            if not any(Path(p).is_file() for p in glob.iglob(str(path), recursive=True)):
                raise UserError(f"--input {path}: no file fits the pattern. Check the path")
        plain: dict[str, Any] = {"delimiter": "", "encoding": "utf-8", "quoted": True}
        own = (self.text if self.format == "table" else plain) | checked(text)
        return TableSource(
            path=Path("--input"),
            name=path.name,
            files=(str(path if pattern else path.absolute()),),  # the folder one works in is no part of the pattern
            format="",
            delimiter=own["delimiter"],
            encoding="utf-8" if own["encoding"] == "utf-16" else own["encoding"],  # a mark tells UTF-16
            quoted=own["quoted"],
            spelling=self.spelling,
            label=None,
            time=None,
            columns=self.columns,
            raw=self.raw,
            min_count=1,
            likely=own.get("format", ""),
        )
