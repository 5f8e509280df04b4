"""Staged parts -> shards. A shard is a fixed range of the rows of its split, so any process can write any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from embsearch_dist.data.prepare.progress import Progress, on_threads
from embsearch_dist.data.prepare.scratch import load_record, save_record
from embsearch_dist.data.prepare.staging import Part
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.data.prepare.vocabulary import Ids
from embsearch_dist.data.store.bags import Bags, offsets_of
from embsearch_dist.data.store.shards import ShardWriter, column_types
from embsearch_dist.errors import UserError
from embsearch_dist.files import digest, is_whole, temporary
from embsearch_dist.schema import SPLITS, Field


@dataclass(frozen=True)
class Shard:
    """Rows ``start`` to ``stop`` of a split, in the order of the input."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}/part-{self.number:05d}.parquet"

    def note(self, stage: Path) -> Path:
        return stage / f"shard-{self.split}-{self.number:05d}.json"


def cut(rows: dict[str, int], rows_per_shard: int, row_group_rows: int) -> list[Shard]:
    """The shards of all splits, each of whole row groups (but the last)."""
    size = -(-rows_per_shard // row_group_rows) * row_group_rows
    return [
        Shard(split, k, start, min(start + size, n))
        for split, n in rows.items()
        for k, start in enumerate(range(0, n, size))
    ]


def scales(parts: Sequence[Part], dense: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of dense columns over the training split.

    Part by part in order (Chan's update), because a parallel sum would depend on the number of threads. The deviation
    of a constant is 0: what rounding makes of it instead would blow up any other value to come.

    Raises:
        UserError: values beyond what squares can hold.
    """
    total = dict.fromkeys(dense, (0, 0.0, 0.0))
    ends = dict.fromkeys(dense, (np.inf, -np.inf))
    for part in parts if dense else []:
        train = part.split() == 0
        for name in dense:
            x = part.dense(name)[train]
            x = x[~np.isnan(x)]
            if len(x) == 0:
                continue
            n, mean, m2 = total[name]
            delta, both = float(x.mean()) - mean, n + len(x)
            m2 += float(((x - x.mean()) ** 2).sum()) + delta**2 * n * len(x) / both
            total[name] = (both, mean + delta * len(x) / both, m2)
            ends[name] = (min(ends[name][0], float(x.min())), max(ends[name][1], float(x.max())))
    found = {name: (mean, (m2 / n) ** 0.5 if n else 0.0) for name, (n, mean, m2) in total.items()}
    found |= {name: (low, 0.0) for name, (low, high) in ends.items() if low == high}
    for name, scale in found.items():
        if not np.isfinite(scale).all():
            raise UserError(f"dense column {name!r}: its values are too large to standardise. Scale or bucket them")
    return found


class Encoder:
    """Writes shards.

    Args:
        parts: all staged parts, their splits known.
        counts: ``[parts, 3]`` rows of each split in each part.
        ids: of the fields' values.
        fields: in the order of the schema.
        scale: mean and standard deviation of each dense column.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        counts: np.ndarray,
        ids: Ids,
        fields: Sequence[Field],
        scale: dict[str, tuple[float, float]],
    ) -> None:
        self.parts, self.counts, self.ids, self.fields, self.scale = parts, counts, ids, fields, scale
        types = column_types(fields, list(scale))
        self.schema = pa.schema([pa.field(n, t, nullable=False) for n, t in types.items()])

    def write(self, shard: Shard, path: Path, row_group_rows: int, bar: Progress) -> int:
        """Write one shard; gives the sum of its labels.

        Raises:
            UserError: a number that is too large once it is standardised; names column, value and row.
        """
        k, labels = SPLITS.index(shard.split), 0
        ends = np.cumsum(self.counts[:, k])
        first, last = np.searchsorted(ends, [shard.start, shard.stop - 1], side="right")
        writer = ShardWriter(path, self.schema, row_group_rows)
        try:
            for i in range(int(first), int(last) + 1):
                begin = int(ends[i] - self.counts[i, k])
                rows = np.flatnonzero(self.parts[i].split() == k)[max(shard.start - begin, 0) : shard.stop - begin]
                columns = self._columns(i, rows)
                label = columns[0]
                assert isinstance(label, np.ndarray)
                labels += int(label.sum(dtype=np.float64))
                writer.write(columns)
                bar.add(len(rows))
        finally:
            writer.close()
        return labels

    def _columns(self, i: int, rows: np.ndarray) -> list[np.ndarray | Bags]:
        part = self.parts[i]
        columns: list[np.ndarray | Bags] = [part.label().take(rows).astype(np.float32)]
        for name in (field.name for field in self.fields):
            # mode="clip" leaves out a check of bounds that codes cannot leave.
            codes, ids, lengths = part.codes(name), self.ids.of(name, i), part.lengths(name)
            if lengths is None:
                columns.append(ids.take(codes.take(rows), mode="clip"))
            else:
                bags = Bags(codes, offsets_of(lengths), part.weights(name)).take(rows)
                columns.append(replace(bags, ids=ids.take(bags.ids, mode="clip")))
        for name, (mean, std) in self.scale.items():
            x = part.dense(name).take(rows)
            scaled = standardised(x, mean, std)
            if (far := np.flatnonzero(~np.isfinite(scaled))).size:
                row = part.first_row + int(rows[far[0]]) + 1
                raise UserError(
                    f"dense column {name!r}: {x[far[0]]:g} in row {row:,} of the input is too large for float32 once "
                    f"standardised (mean {mean:g}, deviation {std:g}). Correct it, leave it empty, or make the column "
                    "bucketed"
                )
            columns.append(scaled)
        return columns


def standardised(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    """A dense column ``[N]`` float64 as the models see it, float32.

    A missing value (NaN) sits at the mean; a constant column carries nothing and becomes zeros. What is too large for
    float32 becomes infinite, which is for the caller to refuse."""
    with np.errstate(over="ignore"):
        scaled = (x - mean) / std if std > 0 else np.zeros_like(x)
        return np.nan_to_num(scaled, nan=0.0).astype(np.float32)


def encode(
    encoder: Encoder,
    shards: Sequence[Shard],
    directory: Path,
    stage: Path,
    row_group_rows: int,
    team: Team,
    quiet: bool,
) -> list[dict]:
    """Write all shards into ``directory``, except those that an earlier start finished; a record of each."""
    if team.rank == 0:
        for split in SPLITS:
            (directory / split).mkdir(exist_ok=True)
    team.barrier("shards begin")
    bar = Progress("encode", sum(s.stop - s.start for s in shards), "rows", quiet, team)

    def work(shard: Shard) -> None:
        record, path = load_record(shard.note(stage)), directory / shard.name
        if record is not None and is_whole(path, record["file"]):
            bar.add(shard.stop - shard.start, found=True)
            return
        unfinished = temporary(stage / f"shard-{shard.split}-{shard.number:05d}")
        labels = encoder.write(shard, unfinished, row_group_rows, bar)
        unfinished.rename(path)
        file = {"rows": shard.stop - shard.start, **digest(path)}
        save_record(shard.note(stage), {"labels": labels, "file": file})

    on_threads(team, bar, shards, work)
    records = [load_record(shard.note(stage)) for shard in shards]
    return [record for record in records if record is not None]
