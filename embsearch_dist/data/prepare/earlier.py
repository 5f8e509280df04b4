"""The prepared data of an earlier day: its ids, and its means and deviations, are kept for later rows.

A value that had an id keeps it, also where today's rows lack it. So a table that was trained on the earlier data fits
the later ones row by row, and a row is encoded as it was. What else turns a raw cell into a number, buckets and
logarithms, is fixed by the kind of the column (:mod:`embsearch_dist.data.formats.columns`), which must be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from embsearch_dist.data.formats import Column
from embsearch_dist.data.formats.source_file import describe_column
from embsearch_dist.data.prepare.vocabulary import VOCABULARY, Kept, file_name, load_values
from embsearch_dist.data.store import manifest
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema

HOW_NEW = ("extend", "freeze")
CURE = "Give the --vocabulary of data with the same columns, or leave it out"


@dataclass(frozen=True)
class Earlier:
    """An earlier prepared data set whose ids are kept.

    Attributes:
        path: of its directory.
        schema: of it.
        new: what becomes of values without an id: ``extend``, those that reach the minimum count get the next ids;
            ``freeze``, they all share id 0.
    """

    path: Path
    schema: Schema
    new: str = "extend"

    @classmethod
    def open(cls, path: Path | str, new: str, columns: Sequence[Column]) -> Earlier:
        """Open it for data of these columns.

        Raises:
            UserError: it is no prepared data set, has no vocabulary or was changed; or a column, which is named, has
                another name or kind.
        """
        if "://" in str(path):
            raise UserError(f"--vocabulary {path}: ids are read from a folder. Copy the data here and give that folder")
        schema = Schema.load(path)
        _check_columns(Path(path), schema, columns)
        manifest.compare_ends(path, VOCABULARY)
        for name in schema.names:
            if not (Path(path) / VOCABULARY / file_name(name)).is_file():
                raise UserError(
                    f"--vocabulary {path}: it has no vocabulary of field {name!r}, as the rows of a group have none. "
                    "Give the data that it was made of, or leave it out"
                )
        return cls(Path(path), schema, new)

    @property
    def data(self) -> str:
        """Identity of the earlier data."""
        return manifest.identity(self.path, self.schema)

    def kept(self, field: str) -> Kept:
        """The values of a field that have an id, by rising id."""
        values = load_values(self.path, field)["value"].cast(pl.String)
        return Kept(values.rechunk(), self.new == "extend")

    def scale(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each dense column."""
        found: Any = self.schema.provenance["dense"]
        return {name: (float(s["mean"]), float(s["std"])) for name, s in found.items()}

    def provenance(self) -> dict[str, object]:
        """For the new schema: whose ids were kept.

        ``keeps`` are the identities of all data whose ids are the first ones here, so that a model of any of them fits
        without their vocabulary.
        """
        before: Any = self.schema.provenance.get("vocabulary", {})
        return {
            "new": self.new,
            "keeps": [self.data, *before.get("keeps", [])],
            "cardinalities": dict(zip(self.schema.names, self.schema.cardinalities, strict=True)),
        }


def _check_columns(path: Path, schema: Schema, columns: Sequence[Column]) -> None:
    """Refuse earlier data whose columns are others than these."""
    source: Any = schema.provenance.get("source")
    if not source or "columns" not in source or "dense" not in schema.provenance:
        raise UserError(f"--vocabulary {path}: it does not tell how its columns were read. Prepare it again")
    if source.get("given_ids"):
        raise UserError(
            f"--vocabulary {path}: its ids were made elsewhere (--format ids), so it has no vocabulary. {CURE}"
        )
    old = {c["name"]: _meaning(c) for c in source["columns"]}
    new = {c.name: _meaning(describe_column(c)) for c in columns}
    for name in [*new, *old]:
        if name not in old or name not in new:
            where = "the earlier data lack" if name not in old else "these data lack"
            raise UserError(f"--vocabulary {path}: {where} field {name!r}. {CURE}")
        for key in new[name]:
            if old[name][key] != new[name][key]:
                told = f"{key} {old[name][key]!r} there, {new[name][key]!r} here"
                raise UserError(f"--vocabulary {path}: field {name!r} is of another type: {told}. {CURE}")
    if list(old) != list(new):
        place = next(n for n, o in zip(new, old, strict=True) if n != o)
        raise UserError(f"--vocabulary {path}: the fields come in another order, from {place!r} on. {CURE}")


def _meaning(body: dict[str, Any]) -> dict[str, object]:
    """Of a column's description all that decides which number a cell becomes, but for how a file spells it."""
    bag = body.get("bag") or {}
    return {
        "kind": body["kind"],
        "whole_numbers": bool(body.get("whole", False)),
        "log": bool(body.get("log", False)),
        "pooling": bag.get("pooling", ""),
        "weighted": bool(bag.get("weights") or bag.get("weight_separator")),
        "max_length": bag.get("max_length", 0),
    }
