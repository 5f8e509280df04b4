"""What the columns of a prepared data set are; saved as ``schema.json`` beside the shards.

A prepared data set is a directory::

    schema.json              this file, written last: without it the directory does not count
    vocabulary/<field>.parquet   value, id, count
    train/ validation/ test/     part-00000.parquet ...; columns: label, every field, every dense column

Every row has a bag of ids in every field: of most fields exactly one id, of a list any number of them, also
none. The embeddings of a bag are pooled to one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embsearch_dist.errors import UserError, script
from embsearch_dist.files import read_sealed, write_sealed

SPLITS = ("train", "validation", "test")
POOLINGS = ("sum", "mean")
LIST_KEYS = ("pooling", "weighted", "mean_length")
FORMAT = 1
RAW_VALUES = "raw_values"
"""In a schema's provenance: the hash of how a data source has made ids and numbers of raw values."""


@dataclass(frozen=True)
class Field:
    """One categorical (or bucketed numeric) column.

    Attributes:
        name: of its column in the shards, its table and its key in a batch.
        cardinality: number of ids, id 0 (rare or unseen, and missing where a row has exactly one id)
            included: valid ids are ``0 <= id < cardinality``.
        pooling: how the embeddings of a list become one, ``sum`` or ``mean`` (none: zeros); empty: every row
            has exactly one id.
        weighted: every id of the list comes with a weight, by which its embedding is multiplied (``sum`` only).
        mean_length: ids a row has on average in the training split; how much is looked up, for planning.
    """

    name: str
    cardinality: int
    pooling: str = ""
    weighted: bool = False
    mean_length: float = 1.0

    def __post_init__(self) -> None:
        if self.cardinality < 1:
            raise UserError(f"field {self.name!r}: cardinality must be at least 1, got {self.cardinality}")
        if self.pooling not in ("", *POOLINGS):
            raise UserError(f"field {self.name!r}: pooling {self.pooling!r} is none of {', '.join(POOLINGS)}")
        if self.weighted and self.pooling != "sum":
            raise UserError(f"field {self.name!r}: weights need pooling sum, not {self.pooling or 'a single id'!r}")

    @property
    def is_list(self) -> bool:
        """Whether a row may have any number of ids, not exactly one."""
        return bool(self.pooling)

    @property
    def weights_column(self) -> str:
        """Column of a weighted list's weights in the shards."""
        return f"{self.name} weights"

    def to_dict(self) -> dict[str, object]:
        """For JSON; a field of one id a row is its name and cardinality, as before there were lists."""
        body = asdict(self)
        return body if self.is_list else {key: body[key] for key in ("name", "cardinality")}


@dataclass(frozen=True)
class Schema:
    """The fields of a data set in their fixed order, its dense columns and its split sizes.

    Attributes:
        dataset: name for people, e.g. ``movielens_1m``.
        fields: categorical fields; tables, allocations and batches keep this order.
        dense: names of float columns, standardised on the training split.
        rows: rows of each split.
        provenance: how it was prepared (source files, options), for people.
        data: identity of the prepared bytes (:func:`embsearch_dist.data.store.manifest.identity`), where known: two
            preparations with one :attr:`fingerprint` may give the same ids to other values.
    """

    dataset: str
    fields: tuple[Field, ...]
    dense: tuple[str, ...] = ()
    rows: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    data: str = ""

    def __post_init__(self) -> None:
        names = [f.name for f in self.fields] + list(self.dense) + [f.weights_column for f in self.fields if f.weighted]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise UserError(f"schema {self.dataset!r}: column {twice[0]!r} is named twice")
        if not self.fields:
            raise UserError(f"schema {self.dataset!r} has no categorical field; at least one is needed")

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.fields]

    @property
    def cardinalities(self) -> list[int]:
        return [f.cardinality for f in self.fields]

    @property
    def fingerprint(self) -> str:
        """Short hash of the fields and cardinalities: two data sets with the same one fit the same tables."""
        fields = [[f.name, f.cardinality, *([f.pooling, f.weighted] if f.is_list else [])] for f in self.fields]
        text = json.dumps([*fields, list(self.dense)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write ``schema.json`` into ``directory`` in one step, so that a reader never sees half of it."""
        body = {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}
        body["fields"] = [f.to_dict() for f in self.fields]
        if not self.data:
            del body["data"]
        write_sealed(Path(directory) / "schema.json", body)

    @classmethod
    def load(cls, directory: Path | str) -> Schema:
        """Read ``DIRECTORY/schema.json``.

        Raises:
            UserError: the directory is not a whole prepared data set.
        """
        path = Path(directory) / "schema.json"
        if not path.exists():
            raise UserError(
                f"{directory} is not a prepared data set: {path.name} is missing there. "
                f"Make one with: {script('prepare')} --help"
            )
        body = read_sealed(path, "Copy it back, or prepare the data again")
        try:
            return cls(
                dataset=body["dataset"],
                fields=tuple(_field(f) for f in body["fields"]),
                dense=tuple(body["dense"]),
                rows=dict(body["rows"]),
                provenance=dict(body["provenance"]),
                data=str(body.get("data", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{path}: not a schema of format {FORMAT} ({e}); prepare the data again") from e


def _field(body: dict) -> Field:
    return Field(body["name"], body["cardinality"], **{key: body[key] for key in LIST_KEYS if key in body})


def differs(old: str, new: str) -> bool:
    """Whether two identities of data are known and not the same."""
    return bool(old and new and old != new)
