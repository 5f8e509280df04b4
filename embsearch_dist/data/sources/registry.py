"""Sources by name, for configs, and the one that a program hands over."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from embsearch_dist.config.own_module import load_module
from embsearch_dist.config.sections import DataConfig
from embsearch_dist.data.formats.columns import Bag
from embsearch_dist.data.formats.source_file import LONGEST
from embsearch_dist.data.sources.source import DataSource
from embsearch_dist.data.sources.split import SourceSplit, named, row_count
from embsearch_dist.errors import UserError, nearest
from embsearch_dist.schema import SPLITS, Schema

GIVEN = "given"
"""``data.source`` of a run whose rows a program hands over (``es.search(data=...)``)."""

Make = TypeVar("Make", bound=Callable[[], Any])
_makers: dict[str, Callable[[], Any]] = {}
_opened: dict[str, DataSource] = {}


def register_source(name: str) -> Callable[[Make], Make]:
    """Give a source a name that configs know it by: ``data: {source: NAME, module: my_source.py}``.

    What is decorated (a class, or a function without arguments that makes a source) is called once a process, on every
    rank.

    >>> @register_source("clicks")
    ... class Clicks: ...

    Raises:
        UserError: the name is taken for what programs hand over.
    """
    if not name or name == GIVEN:
        raise UserError(f"a data source cannot be called {name!r}. Give it another name")

    def keep(make: Make) -> Make:
        _makers[name] = make
        _opened.pop(name, None)
        return make

    return keep


@contextmanager
def handed_over(source: DataSource | None) -> Iterator[None]:
    """Within it ``data.source: given`` is this source."""
    before = _opened.pop(GIVEN, None)
    if source is not None:
        _opened[GIVEN] = source
    try:
        yield
    finally:
        _opened.pop(GIVEN, None)
        if before is not None:
            _opened[GIVEN] = before


def open_source(data: DataConfig) -> DataSource:
    """The source that ``data.source`` names, made once a process.

    Raises:
        UserError: nothing has that name, its module cannot be imported, or it is no source.
    """
    name = data.source
    if name in _opened:
        return _opened[name]
    if name == GIVEN:
        raise UserError(
            "the rows of this run were handed over by a program (data.source: given). Hand them over again, "
            "es.retrain(RUN, data=source), or register the source and name it: --data.source NAME --data.module FILE"
        )
    load_module(data.module, "config key data.module")
    if name not in _makers:
        where = f"{data.module} registers none of that name" if data.module else "--data.module FILE.py may register it"
        raise UserError(f"config key data.source: {name!r} is not registered{nearest(name, list(_makers))}: {where}")
    _opened[name] = _makers[name]()
    return _opened[name]


def open_split(data: DataConfig, schema: Schema, split: str) -> SourceSplit:
    """A split of that source; ``schema``: of :func:`schema_of`."""
    return SourceSplit(open_source(data), schema, split)


def schema_of(source: DataSource) -> Schema:
    """A source's schema with the rows of its splits, its identity, and how predictions read its columns.

    Raises:
        UserError: it lacks what :class:`DataSource` asks for.
    """
    if not isinstance(source, DataSource):
        lacks = [key for key in ("schema", "fingerprint", "rows", "read") if not hasattr(source, key)]
        raise UserError(f"{type(source).__name__} is no data source: it lacks {', '.join(lacks)}. See es.DataSource")
    schema, mark = source.schema, source.fingerprint
    if not isinstance(schema, Schema):
        raise UserError(f"{type(source).__name__}.schema must be an es.Schema, got {type(schema).__name__}")
    if not isinstance(mark, str) or not mark:
        raise UserError(f"{named(source)}: fingerprint must be a text that changes with the rows, got {mark!r}")
    rows = {split: row_count(source, split) for split in SPLITS}
    text = json.dumps([schema.fingerprint, rows, mark])
    told = {**_described(schema), **schema.provenance}
    return dataclasses.replace(schema, rows=rows, provenance=told, data=hashlib.sha256(text.encode()).hexdigest()[:16])


def _described(schema: Schema) -> dict[str, object]:
    """How an exported model takes the columns of its rows: ids and numbers as they are."""
    columns: list[dict[str, object]] = []
    for f in schema.fields:
        body: dict[str, object] = {"name": f.name, "kind": "categorical", "whole": True}
        if f.is_list:
            bag = Bag(f.pooling, LONGEST, weights=f.weights_column if f.weighted else "")
            body |= {"kind": "list", "bag": dataclasses.asdict(bag)}
        columns.append(body)
    columns += [{"name": name, "kind": "dense"} for name in schema.dense]
    scale = {name: {"mean": 0.0, "std": 1.0} for name in schema.dense}
    return {"source": {"format": "table", "columns": columns, "given_ids": True}, "dense": scale}
