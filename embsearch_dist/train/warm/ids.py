"""Which row of an earlier table each id of today begins with: that of the same value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embsearch_dist.data.store import manifest
from embsearch_dist.errors import UserError
from embsearch_dist.schema import RAW_VALUES, Schema, differs

if TYPE_CHECKING:
    import polars as pl

# What reads vocabularies is imported where it is used: polars starts threads, and a rank that is forked must have none.


@dataclass(frozen=True)
class IdMap:
    """Of one field.

    Attributes:
        rows: ``[cardinality]`` int64 by today's id: the earlier row, or -1 for a value without one.
    """

    rows: torch.Tensor

    @property
    def new(self) -> int:
        """How many ids begin without a row of their own."""
        return int((self.rows < 0).sum())

    @property
    def same(self) -> bool:
        """Whether every id is what it was."""
        return torch.equal(self.rows, torch.arange(len(self.rows)))


@dataclass(frozen=True)
class Data:
    """A prepared data set as a model saw it: where it lies (or lay), and the schema with its identity."""

    path: Path
    schema: Schema

    @property
    def given_ids(self) -> bool:
        """Whether ids were made elsewhere, so that the number itself is the value."""
        source: Any = self.schema.provenance.get("source") or {}
        return bool(source.get("given_ids"))

    @property
    def raw(self) -> str:
        """Where a data source has made the ids of values that nobody has kept: what tells its vocabulary from others,
        and with it the scale of its dense columns. Empty elsewhere."""
        return str(self.schema.provenance.get(RAW_VALUES) or "")

    @property
    def keeps(self) -> list[str]:
        """Identities of the earlier data whose ids are the first ones here."""
        told: Any = self.schema.provenance.get("vocabulary") or {}
        return list(told.get("keeps", []))

    def cardinality(self, field: str) -> int:
        return {f.name: f.cardinality for f in self.schema.fields}[field]

    def values(self, field: str) -> pl.Series:
        """The values of ids 1, 2, ... in their order."""
        import polars as pl

        from embsearch_dist.data.prepare.vocabulary import load_values

        return load_values(self.path, field)["value"].cast(pl.String)


def check_values(old: Data, new: Data) -> None:
    """See that ids can be compared: they were kept, or are the values, or both vocabularies are there.

    Raises:
        UserError: they cannot; says which data are missing or have changed.
    """
    from embsearch_dist.data.prepare.vocabulary import VOCABULARY

    if same_ids(old, new):
        return
    if old.given_ids != new.given_ids:
        raise UserError(
            f"--from: of {old.path} and {new.path} one has ids that were made elsewhere (--format ids), the other a "
            "vocabulary: no id can be found again. Prepare both alike"
        )
    if old.raw != new.raw:
        raise UserError(
            "--from (start): a data source has made ids of raw values by its own training rows, so one id is one value "
            "in the data of the earlier model and another one here. Make the new source with "
            "es.ArraySource(..., raw=True, vocabulary=EARLIER), where EARLIER is the source of that model"
        )
    if old.given_ids:
        return
    cure = "Copy it back, or prepare today's rows with --vocabulary (docs/daily.md)"
    for data, kind in ((old, "the data of the earlier model"), (new, "the data to train on")):
        if not (data.path / VOCABULARY).is_dir() or not (data.path / "schema.json").exists():
            raise UserError(
                f"{data.path}: {kind} and their {VOCABULARY}/ are not there, so no value can be found. {cure}"
            )
        found = manifest.identity(data.path, Schema.load(data.path))
        if differs(found, data.schema.data):
            raise UserError(f"{data.path}: {kind} were {data.schema.data}, there is {found} by now. {cure}")
        manifest.compare_ends(data.path, VOCABULARY)


def same_ids(old: Data, new: Data) -> bool:
    """Whether the ids of the earlier data are known to be the first ones of the new data."""
    return bool(old.schema.data) and old.schema.data in (new.schema.data, *new.keeps)


def id_map(old: Data, new: Data, field: str) -> IdMap:
    """Map the ids of a field that both data sets have. Id 0, everything rare or unseen, stays id 0."""
    import polars as pl

    count, before = new.cardinality(field), old.cardinality(field)
    if same_ids(old, new) or old.given_ids:
        rows = torch.arange(count)
        return IdMap(torch.where(rows < before, rows, -1))
    known = pl.DataFrame({"value": old.values(field)}).with_row_index("row", 1)
    found = pl.DataFrame({"value": new.values(field)}).join(known, on="value", how="left", maintain_order="left")
    rows = torch.from_numpy(found["row"].cast(pl.Int64).fill_null(-1).to_numpy().copy())
    return IdMap(torch.cat([torch.zeros(1, dtype=torch.int64), rows]))


def occurrences(new: Data, field: str) -> torch.Tensor:
    """``[cardinality]`` float64: how often each id occurs in the training rows as far as it is known, at least 1."""
    import polars as pl

    from embsearch_dist.data.prepare.vocabulary import load_values

    found = torch.ones(new.cardinality(field), dtype=torch.float64)
    if _counted(new):
        found[1:] = torch.from_numpy(load_values(new.path, field)["count"].cast(pl.Float64).to_numpy().copy())
    return found.clamp(min=1)


def shares(new: Data, field: str) -> torch.Tensor:
    """How often each id of a field is looked up in a training row on average, ``[cardinality]`` float64, as far as it
    is known; where a row's values are pooled by their mean, what share of that mean is each."""
    counts, known = occurrences(new, field), _counted(new)
    kind = next(f for f in new.schema.fields if f.name == field)
    rows = new.schema.rows.get("train", 0)
    if known:  # what has no id of its own has the first one
        counts[0] = max(0.0, rows * kind.mean_length - float(counts[1:].sum()))
    return counts / (max(rows, 1) if known and kind.pooling == "sum" else counts.sum())


def _counted(data: Data) -> bool:
    """Whether its vocabulary says how often values occur."""
    from embsearch_dist.data.prepare.vocabulary import VOCABULARY

    return not data.given_ids and (data.path / VOCABULARY).is_dir()
