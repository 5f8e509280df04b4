"""Rows of a request: JSON -> a frame of raw cells -> ids, by the rules by which files are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import polars as pl

from embsearch_dist.data.formats.cells import text_of
from embsearch_dist.data.formats.columns import Column, Rows
from embsearch_dist.errors import UserError
from embsearch_dist.serving.directory import ModelDirectory
from embsearch_dist.serving.encoding import Encoded, RowEncoder


class BadRequest(Exception):
    """What is wrong with a request: the status to answer, and one line for people."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def rows_of(body: bytes, max_rows: int) -> list[dict[str, Any]]:
    """The rows of ``{"rows": [{column: value, ...}, ...]}``.

    Raises:
        BadRequest: anything else.
    """
    try:
        found = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise BadRequest(400, f"the body is not UTF-8 text ({e.reason} at byte {e.start})") from e
    except json.JSONDecodeError as e:
        raise BadRequest(400, f"the body is not JSON ({e.msg} at character {e.pos})") from e
    except (ValueError, RecursionError) as e:
        raise BadRequest(400, f"the body is not JSON ({' '.join(str(e).split())[:80]})") from e
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise BadRequest(400, 'the body must be {"rows": [{column: value, ...}, ...]}')
    if more := [key for key in found if key != "rows"]:
        raise BadRequest(400, f"unknown key {more[0][:40]!r} beside rows")
    rows = found["rows"]
    if not rows:
        raise BadRequest(400, "rows is empty: give at least one row")
    if len(rows) > max_rows:
        raise BadRequest(413, f"{len(rows):,} rows are more than {max_rows:,}: send them in several requests")
    for k, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadRequest(400, f"row {k} is no object of column: value")
    return rows


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {name[:40]!r} is there twice")
        found[name] = value
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


class RequestEncoder:
    """Rows of requests as the model takes them.

    Args:
        directory: of the model.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        source = directory.source
        self.encoder, self.raw, self.spelling = RowEncoder(directory), dict(source.raw), source.spelling
        self.columns = [c for c in source.columns if c.name in directory.columns]
        self.single = {self.raw[c.name] for c in self.columns if c.bag is None}

    @property
    def names(self) -> dict[str, str]:
        """The columns that each row must have, and what each is; one that is read as a single value and as a list takes
        what both take."""
        found: dict[str, str] = {}
        for column in self.columns:
            for name, kind in self._uses(column).items():
                if kind not in ("list", "weights") or name not in self.single:
                    found[name] = kind
        return found

    def _uses(self, column: Column) -> dict[str, str]:
        """The columns of the rows behind one of the model, and what each is to it."""
        name = self.raw[column.name]
        bag = {column.bag.weights: "weights"} if column.bag is not None and column.bag.weights else {}
        return bag | {name: column.kind}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Encoded:
        """Raises:
        BadRequest: a column is missing, or a value is of a kind that its column does not take.
        """
        # Two fields may read one column, each in its way.
        read = [(c, pl.DataFrame([self._column(rows, *use) for use in self._uses(c).items()])) for c in self.columns]
        try:
            cells = [Rows(f, lambda k: f"row {k}", self.spelling).convert(c, self.raw[c.name]) for c, f in read]
            return self.encoder(pl.DataFrame(cells))
        except UserError as e:
            raise BadRequest(400, str(e)) from e
        except pl.exceptions.PolarsError as e:
            raise BadRequest(400, f"a value cannot be read ({' '.join(str(e).split())[:120]})") from e

    def _column(self, rows: Sequence[Mapping[str, Any]], name: str, kind: str) -> pl.Series:
        try:
            return _cells(rows, name, kind, name in self.single)
        except UnicodeEncodeError as e:  # JSON can write half of a character
            raise BadRequest(400, f"column {name!r}: a text is no Unicode text ({e.reason})") from e


def _cells(rows: Sequence[Mapping[str, Any]], name: str, kind: str, single: bool) -> pl.Series:
    """One column of all rows; ``single``: some field takes it as one value, so that a list has it as a text."""
    for k, row in enumerate(rows):
        if name not in row:
            raise BadRequest(400, f"row {k} lacks column {name!r}; write null where there is no value")
    values = [row[name] for row in rows]
    if kind in ("list", "weights"):
        if single:
            values = [v if isinstance(v, list | dict) else _texts([v], name)[0] for v in values]
        return _lists(values, name, kind)
    for k, value in enumerate(values):
        if isinstance(value, list | dict):
            raise BadRequest(400, f"row {k}, column {name!r}: a {kind} column takes a text, a number or null")
    if kind == "categorical":
        return pl.Series(name, _texts(values, name), dtype=pl.String)
    if any(isinstance(v, str) for v in values):
        if any(not isinstance(v, str | None) for v in values):
            raise BadRequest(400, f"column {name!r}: texts and numbers are mixed. Write numbers")
        return pl.Series(name, values, dtype=pl.String)
    return pl.Series(name, [None if v is None else _float(v, name) for v in values], dtype=pl.Float64)


def _lists(values: Sequence[Any], name: str, kind: str) -> pl.Series:
    if all(isinstance(v, str | None) for v in values) and any(isinstance(v, str) for v in values):
        return pl.Series(name, values, dtype=pl.String)
    for k, value in enumerate(values):
        if value is not None and not isinstance(value, list):
            raise BadRequest(400, f"row {k}, column {name!r}: a list of values, or null, is expected")
        if any(isinstance(x, list | dict) for x in value or ()):
            raise BadRequest(400, f"row {k}, column {name!r}: a value of a list is a text, a number or null")
    if kind == "weights":
        numbers = [[None if x is None else _float(x, name) for x in v or ()] for v in values]
        return pl.Series(name, numbers, dtype=pl.List(pl.Float64))
    return pl.Series(name, [_texts(v or (), name) for v in values], dtype=pl.List(pl.String))


def _texts(values: Sequence[Any], name: str) -> list[str | None]:
    """Scalars as the texts that files have for them."""
    return [v if v is None or isinstance(v, str) else _text(v, name) for v in values]


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return str(text_of(pl.Series([_float(value, name)]))[0])


def _float(value: Any, name: str) -> float:
    if isinstance(value, str):
        raise BadRequest(400, f"column {name!r}: {value[:40]!r} is no number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRequest(400, f"column {name!r}: a number is too large")
    return found
