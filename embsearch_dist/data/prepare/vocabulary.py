"""Values to ids: counted on the training split, id 0 for everything missing, rare or unseen.

Every field is counted by one thread of one process over all staged parts, so nothing has to be merged.
A field with more values than fit comfortably is counted in several passes, each over the values with some
hashes: no table of all distinct values, most of them rare, is ever built. What a field leaves is its
vocabulary and, for each part, the ids of the part's values; encoding needs only those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.data.prepare.progress import Progress, on_threads
from embsearch_dist.data.prepare.scratch import Arrays, load_record, save_record, write_arrays
from embsearch_dist.data.prepare.staging import Part
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.files import digest, is_whole, temporary

VOCABULARY = "vocabulary"
PASS_VALUES = 8 << 20
BATCH_VALUES = 4 << 20
LONGEST_WORD = 150  # of 255 bytes that a file's name may have; what comes before and behind it needs some


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one field and what was seen of it in the training split.

    Attributes:
        name: the field.
        values: values with an id of their own; the id of ``values[k]`` is ``k + 1``.
        counts: how often each value occurs in the training rows.
        rows: training rows in all.
        missing: training rows without a value.
        seen: values in the training rows, of which a row of a list may have several.
        distinct: distinct values in the training rows, before the minimum count.
    """

    name: str
    values: pl.Series
    counts: pl.Series
    rows: int
    missing: int
    seen: int
    distinct: int

    @property
    def cardinality(self) -> int:
        return len(self.values) + 1

    @property
    def rare_share(self) -> float:
        """Share of the training rows' cells whose value is there but too rare for an id.

        Every value of a list is a cell, and a row without one is a cell.
        """
        return (self.seen - int(self.counts.sum())) / max(self.seen + self.missing, 1)

    @property
    def missing_share(self) -> float:
        return self.missing / max(self.rows, 1)

    def ids(self, values: pl.Series) -> np.ndarray:
        """``[N]`` int32 ids of some values."""
        if len(self.values) == 0:
            return np.zeros(len(values), np.int32)
        code = values.cast(pl.Enum(self.values), strict=False).to_physical().cast(pl.Int32)
        return (code + 1).fill_null(0).to_numpy()

    def save(self, path: Path) -> None:
        """Write a Parquet file of value (string), id (int32), count (int64)."""
        ids = pl.int_range(1, self.cardinality, dtype=pl.Int32, eager=True)
        table = pa.table(
            {
                "value": self.values.to_arrow().cast(pa.large_string()),
                "id": ids.to_arrow(),
                "count": self.counts.cast(pl.Int64).to_arrow(),
            }
        )
        pq.write_table(table, temporary(path), compression="zstd", row_group_size=1 << 20)
        temporary(path).rename(path)


@dataclass(frozen=True)
class Kept:
    """Values that had ids in earlier data and keep them.

    Attributes:
        values: the id of ``values[k]`` is ``k + 1``.
        extend: other values that reach the minimum count get the ids behind; else none does.
    """

    values: pl.Series
    extend: bool


NOTHING_KEPT = Kept(pl.Series("value", [], pl.String), True)


def build(
    parts: Sequence[Part], name: str, min_count: int, tick: Callable[[int], None], before: Kept = NOTHING_KEPT
) -> Vocabulary:
    """Count the values of one field over the training rows of all parts and number them.

    Values that had ids ``before`` keep them. Further ids go by falling count, equal counts by value, so they depend on
    nothing but the rows and the ids before. ``tick`` is called now and then with the number of values that were dealt
    with.
    """
    place = pl.DataFrame({"value": before.values, "place": pl.int_range(len(before.values), eager=True)})
    passes = -(-sum(part.n_values(name) for part in parts) // PASS_VALUES) or 1
    kept: list[pl.DataFrame] = []
    rows = missing = seen = distinct = 0
    for k in range(passes):
        frames = []
        for part in parts:
            train, lengths = part.split() == 0, part.lengths(name)
            of_train = train if lengths is None else np.repeat(train, lengths)
            counts = np.bincount(part.codes(name)[of_train], minlength=part.n_values(name) + 1)
            frame = pl.DataFrame([part.values(name).alias("value"), pl.Series("count", counts[1:])])
            mine = pl.col("count") > 0
            if passes > 1:
                mine &= pl.col("value").hash() % passes == k
            frames.append(frame.filter(mine))
            if k == 0:
                rows, seen = rows + int(train.sum()), seen + int(counts[1:].sum())
                missing += int(counts[0] if lengths is None else (lengths[train] == 0).sum())
            tick(part.n_values(name) if k == 0 else 0)
        counted = pl.concat(frames).group_by("value").agg(pl.col("count").sum())
        distinct += counted.height
        counted = counted.join(place, on="value", how="left")
        enough = pl.lit(before.extend) & (pl.col("count") >= min_count)
        kept.append(counted.filter(enough | pl.col("place").is_not_null()))
    book = pl.concat(kept)
    old = book.drop_nulls("place")
    new = book.filter(pl.col("place").is_null()).sort(["count", "value"], descending=[True, False])
    counts = np.zeros(len(before.values), np.int64)
    counts[old["place"].to_numpy()] = old["count"].to_numpy()
    values = pl.concat([before.values.rename("value"), new["value"]]).rechunk()
    all_counts = pl.concat([pl.Series("count", counts), new["count"].cast(pl.Int64)]).rechunk()
    return Vocabulary(name, values, all_counts, rows, missing, seen, distinct)


def _ids(parts: Sequence[Part], book: Vocabulary, tick: Callable[[int], None]) -> np.ndarray:
    """Part after part, the id of each of its codes: 0 for blank, then those of its values.

    Several parts at a time: a vocabulary is hashed once for each look-up.
    """
    found: list[np.ndarray] = []
    batch: list[pl.Series] = []
    waiting = 0
    for i, part in enumerate(parts):
        batch.append(part.values(book.name))
        waiting += len(batch[-1])
        if waiting < BATCH_VALUES and i + 1 < len(parts):
            continue
        ids, start = book.ids(pl.concat(batch)), 0
        for values in batch:
            found += [np.zeros(1, np.int32), ids[start : start + len(values)]]
            start += len(values)
        batch, waiting = [], 0
        tick(0)
    return np.concatenate(found)


def build_all(
    parts: Sequence[Part],
    fields: Sequence[str],
    directory: Path,
    stage: Path,
    min_count: int,
    team: Team,
    quiet: bool,
    before: Callable[[str], Kept] = lambda name: NOTHING_KEPT,
) -> list[dict]:
    """Vocabularies of all fields in ``directory``, ids of the parts' values in ``stage``; a record of each field.

    ``before`` gives the ids of earlier data that a field keeps. What an earlier start finished is kept. The fields with
    the most values come first, so that none begins when all others are done.
    """
    if team.rank == 0:
        directory.mkdir(exist_ok=True)
    team.barrier("vocabularies begin")
    sizes = {name: sum(part.n_values(name) for part in parts) for name in fields}
    bar = Progress("count", sum(sizes.values()), "values", quiet, team)

    def work(name: str) -> None:
        target, ids, note = directory / file_name(name), _ids_file(stage, name), _note(stage, name)
        record = load_record(note)
        if record is not None and is_whole(target, record["file"]) and is_whole(ids, record["ids"]):
            bar.add(sizes[name], found=True)
            return
        earlier = before(name)
        book = build(parts, name, min_count, bar.add, earlier)
        book.save(target)
        body = {
            "cardinality": book.cardinality,
            "distinct": book.distinct,
            "new": book.cardinality - 1 - len(earlier.values),
            "rare_share": round(book.rare_share, 6),
            "missing_share": round(book.missing_share, 6),
            "mean_length": round(book.seen / max(book.rows, 1), 4),
            "file": {"rows": book.cardinality - 1, **digest(target)},
            "ids": write_arrays(ids, {"ids": _ids(parts, book, bar.add)}),
        }
        save_record(note, body)

    on_threads(team, bar, sorted(fields, key=lambda name: (-sizes[name], name)), work)
    records = [load_record(_note(stage, name)) for name in fields]
    return [record for record in records if record is not None]


def _note(stage: Path, name: str) -> Path:
    return stage / f"field-{file_word(name)}.json"


def _ids_file(stage: Path, name: str) -> Path:
    return stage / f"field-{file_word(name)}.arrays"


def file_word(name: str) -> str:
    """A field's name as a part of a file's name: itself, or with every other character than letters, digits, ``_`` and
    ``-`` as its bytes (``%C3%BC``); what is too long for a file system ends in a hash."""
    word = quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    if len(word) <= LONGEST_WORD:
        return word
    return f"{word[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def file_name(name: str) -> str:
    """Of a field's vocabulary, inside ``vocabulary/``."""
    return f"{file_word(name)}.parquet"


class Ids:
    """The ids of the values of every part, read piecewise from what :func:`build_all` left."""

    def __init__(self, parts: Sequence[Part], fields: Sequence[str], stage: Path) -> None:
        self._arrays = {}
        self._start = {}
        for name in fields:
            record = load_record(_note(stage, name))
            assert record is not None
            self._arrays[name] = Arrays(_ids_file(stage, name), record["ids"])
            self._start[name] = np.cumsum([0, *(part.n_values(name) + 1 for part in parts)])

    def of(self, field: str, part: int) -> np.ndarray:
        """``[values + 1]`` int32: the id of each code of a part."""
        start, stop = self._start[field][part : part + 2]
        return self._arrays[field].slice("ids", int(start), int(stop))


def load_values(prepared_dir: Path | str, name: str) -> pl.DataFrame:
    """The saved vocabulary of a field: columns value, id, count, by rising id (id 0 has no row)."""
    return pl.read_parquet(Path(prepared_dir) / VOCABULARY / file_name(name))
