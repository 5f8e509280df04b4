"""What a dry run plans: the tables of allocations and of a supernet, from files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embsearch_dist.allocation import Allocation, physical_width
from embsearch_dist.config.sections import Config, DataConfig
from embsearch_dist.data.sources.registry import open_source, schema_of
from embsearch_dist.errors import UserError, nearest
from embsearch_dist.files import read_json
from embsearch_dist.ranks.quiet import quieten
from embsearch_dist.schema import Field, Schema
from embsearch_dist.sharding.plan import Plan, Topology
from embsearch_dist.sharding.planning import make_plan
from embsearch_dist.sharding.tables import Table
from embsearch_dist.stores.fetch import fetch_schema
from embsearch_dist.stores.urls import is_url

quieten()


@dataclass(frozen=True)
class Subject:
    """Something to plan: its tables at physical width, and the parameters that it counts itself."""

    name: str
    tables: list[Table]
    parameters: int


def make_plans(subjects: Sequence[Subject], topology: Topology, config: Config) -> dict[str, Plan]:
    """A plan per subject; an error names the subject."""
    plans = {}
    known = {t.name for s in subjects for t in s.tables}
    for name in config.dist.tables:
        if name not in known:
            raise UserError(f"dist.tables names {name!r}, which is no table here{nearest(name, sorted(known))}")
    for subject in subjects:
        try:
            plans[subject.name] = make_plan(subject.tables, topology, config.dist, config.optim.embedding)
        except UserError as e:
            raise UserError(f"{subject.name}: {e}") from e
    return plans


def read_schema(data: str, cardinalities: str = "") -> Schema:
    """Fields and their rows from ``name=rows,...``, a ``schema.json``, or the prepared data set it lies in."""
    if cardinalities:
        return Schema("stated", tuple(_field(part) for part in cardinalities.split(",") if part.strip()))
    path = Path(data)
    return Schema.load(path.parent if path.name == "schema.json" else path)


def asked_schema(data: DataConfig, words: Mapping[str, str]) -> Schema:
    """The fields that a command line is about.

    Args:
        data: of its config; a data source is asked, unless the run has written down what it said.
        words: option -> value; ``cardinalities`` and ``data`` come before the config's.

    Raises:
        UserError: none of them gives any.
    """
    if "cardinalities" in words:
        return read_schema("", words["cardinalities"])
    if data.source and "data" not in words:
        told = Path(words.get("run", ""))
        return Schema.load(told) if "run" in words and (told / "schema.json").exists() else schema_of(open_source(data))
    place = words.get("data", data.path)
    return read_schema(str(fetch_schema(place)) if is_url(place) else place)


def _field(text: str) -> Field:
    name, _, rows = (part.strip() for part in text.partition("="))
    try:
        number = float(rows)  # 5e6 is how people write it
    except ValueError:
        number = 0.0
    if not name or number < 1 or number != int(number):
        raise UserError(f"--cardinalities {text!r}: expected NAME=ROWS with a whole number above 0, e.g. user=5e6")
    return Field(name, int(number))


def read_subjects(words: Sequence[str], schema: Schema, any_data: bool = False, extra: int = 0) -> list[Subject]:
    """``ues-WIDTH`` or allocation files; files of one name are told apart by their path.

    Args:
        any_data: take the widths of an allocation that was found on other data with the same fields.
        extra: columns of every table beside its width.
    """
    if not words:
        raise UserError("nothing to plan; give --allocation FILE or ues-WIDTH (several may follow), or --supernet")
    found: dict[str, Subject] = {}
    for word in dict.fromkeys(words):
        uniform = re.fullmatch(r"ues-(\d+)", word)
        if uniform:
            name, allocation = word, Allocation.uniform(schema, int(uniform[1]))
        else:
            allocation = _read_allocation(word, schema, any_data)
            name = str(allocation.provenance.get("name", Path(word).stem))
            name = word if name in found else name
        found[name] = allocation_subject(name, allocation.counted(extra))
    return list(found.values())


def _read_allocation(path: str, schema: Schema, any_data: bool) -> Allocation:
    if not any_data:
        return Allocation.load(path, schema)
    body = read_json(Path(path))
    if not isinstance(body.get("widths"), Mapping):
        raise UserError(f'{path}: not an allocation: key "widths" (field -> width) is missing')
    try:
        return Allocation(schema, dict(body["widths"]), dict(body.get("provenance", {})))
    except UserError as e:
        raise UserError(f"{path} does not fit --cardinalities: {e}") from e


def allocation_subject(name: str, allocation: Allocation) -> Subject:
    """The tables that retraining this allocation makes; a dropped field has none."""
    fields = [(f, allocation.columns(f.name)) for f in allocation.schema.fields]
    tables = [Table.of(f, width, allocation.rows(f.name)) for f, width in fields if width]
    return Subject(name, tables, allocation.total("parameters"))


def supernet_subject(schema: Schema, config: Config) -> Subject:
    """The max-tables of a search: the widest candidate, or all candidates side by side."""
    candidates = getattr(config.search, "candidates", None)
    if not candidates:
        raise UserError(f"--supernet: method {config.method!r} has no supernet (no search.candidates)")
    independent = getattr(config.search, "scheme", "shared") == "independent"
    width = (sum(candidates) if independent else max(candidates)) + config.model.extra
    tables = [Table.of(f, physical_width(width)) for f in schema.fields]
    return Subject("supernet", tables, width * sum(schema.cardinalities))
