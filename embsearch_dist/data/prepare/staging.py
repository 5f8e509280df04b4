"""Raw files -> staged parts: each chunk of input read once, its text turned into small numbers.

A part holds, for every field, the distinct values of its rows and for each row the number of its value
(0: blank, k: the k-th value). So each cell is hashed once. All that follows looks at the values of a part,
which are few, and at integers: counting adds up how often each number occurs, encoding replaces numbers.
A list field has the numbers of all its values, row after row, and how many each row has.

    stage/part-00000.arrays   label, numbers and values of each field, dense columns, time; of lists the lengths
                              and the weights
    stage/part-00000.json     its size, SHA-256 and layout; written after it
    stage/part-00000.split    uint8 split of each row, once that is known
    stage/all.json            written when the last part is there
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from embsearch_dist.data.formats import LABEL, TIME, Chunk, Column, Source
from embsearch_dist.data.formats.columns import bucket
from embsearch_dist.data.prepare.progress import Progress, in_order
from embsearch_dist.data.prepare.scratch import Arrays, load_record, save_record, write_arrays
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.files import is_whole, temporary

ALL = "all.json"


@dataclass(frozen=True)
class Part:
    """A staged part. ``first_row``: the number, over all input, of its first row."""

    arrays: Arrays
    first_row: int

    @property
    def rows(self) -> int:
        return int(self.arrays.record["rows"])

    @property
    def numbers(self) -> np.ndarray:
        """``[N]`` int64 row numbers."""
        return np.arange(self.first_row, self.first_row + self.rows, dtype=np.int64)

    @property
    def times(self) -> tuple[float, float]:
        """The smallest and the largest time."""
        low, high = self.arrays.record["times"]
        return low, high

    def time(self) -> np.ndarray:
        """``[N]`` float64; only a part whose times differ has them."""
        return self.arrays[TIME]

    def label(self) -> np.ndarray:
        """``[N]`` uint8."""
        return self.arrays[LABEL]

    def codes(self, field: str) -> np.ndarray:
        """``[N]`` unsigned: the number of each row's value; of a list ``[E]``, one for each of its values."""
        return self.arrays[f"codes {field}"]

    def lengths(self, field: str) -> np.ndarray | None:
        """``[N]`` unsigned: how many of ``codes`` are each row's, ``None`` when each has exactly one."""
        return self.arrays.get(f"lengths {field}")

    def weights(self, field: str) -> np.ndarray | None:
        """``[E]`` float32: the weight of each of ``codes``, if they have any."""
        return self.arrays.get(f"weights {field}")

    def shortened(self, field: str) -> int:
        """Rows of a list that had more values than are kept."""
        return int(self.arrays.record["shortened"][field])

    def n_values(self, field: str) -> int:
        return int(self.arrays.record["arrays"][f"ends {field}"][2])

    def values(self, field: str) -> pl.Series:
        """The distinct values that ``codes`` numbers from 1 on."""
        ends, text = self.arrays[f"ends {field}"], self.arrays[f"text {field}"]
        offsets = np.concatenate([np.zeros(1, np.int64), ends.astype(np.int64)])
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        return pl.Series(field, pa.Array.from_buffers(pa.large_string(), len(ends), buffers))

    def dense(self, name: str) -> np.ndarray:
        """``[N]`` float64, NaN where blank."""
        return self.arrays[f"dense {name}"]

    def save_split(self, split: np.ndarray) -> None:
        path = self.arrays.path.with_suffix(".split")
        split.tofile(temporary(path))
        temporary(path).rename(path)

    def split(self) -> np.ndarray:
        """``[N]`` uint8: 0 train, 1 validation, 2 test."""
        return np.fromfile(self.arrays.path.with_suffix(".split"), np.uint8)


def stage(source: Source, folder: Path, timed: bool, team: Team, quiet: bool) -> list[Part]:
    """Read the whole input into parts, each by one of the team; whole parts of an earlier start stay.

    ``timed``: times are kept.

    Raises:
        UserError: anything wrong with the input.
    """
    folder.mkdir(exist_ok=True)
    if not team.share("was staged", lambda: bool(load_record(folder / ALL))) or not _still_whole(folder, team):
        team.barrier("staging begins")
        with Progress("read", source.bytes, "bytes", quiet, team) as bar:
            cut = _Cutter(source, folder, timed, team, bar)
            for consumed in in_order(cut.jobs()):
                bar.add(consumed)
        team.barrier("staged")
        if team.rank == 0:
            save_record(folder / ALL, {"parts": cut.parts})
        team.barrier("staging ends")
    found = load_record(folder / ALL)
    assert found is not None
    parts: list[Part] = []
    rows = 0
    for k in range(found["parts"]):
        record = load_record(_path(folder, k, "json"))
        assert record is not None
        parts.append(Part(Arrays(_path(folder, k, "arrays"), record), rows))
        rows += parts[-1].rows
    return parts


def _path(folder: Path, part: int, kind: str) -> Path:
    return folder / f"part-{part:05d}.{kind}"


def _done(folder: Path, part: int) -> bool:
    """Whether a part is there and whole."""
    record = load_record(_path(folder, part, "json"))
    return record is not None and is_whole(_path(folder, part, "arrays"), record)


def _still_whole(folder: Path, team: Team) -> bool:
    """Check the parts of a staging that was finished; one that is damaged makes it unfinished."""
    found = load_record(folder / ALL)
    assert found is not None
    mine = range(team.rank, found["parts"], team.size)
    bad = sum(not whole for whole in in_order(partial(_done, folder, k) for k in mine))
    team.add("damaged parts", bad)
    team.barrier("parts checked")
    return team.add("damaged parts", 0) == 0


class _Cutter:
    """Goes through the input and makes a job of every chunk that is this process's to do."""

    def __init__(self, source: Source, folder: Path, timed: bool, team: Team, bar: Progress) -> None:
        self.source, self.folder, self.timed, self.team, self.bar = source, folder, timed, team, bar
        self.parts = 0

    def jobs(self) -> Iterator[Callable[[], int]]:
        for chunk in self.source.chunks():
            k, self.parts = self.parts, self.parts + 1
            if k % self.team.size == self.team.rank:
                yield partial(self._do, k, chunk)

    def _do(self, k: int, chunk: Chunk) -> int:
        if _done(self.folder, k):
            self.bar.add(chunk.consumed, found=True)
            return 0
        frame = chunk.frame
        arrays, times, shortened = _arrays(frame, self.source.columns, self.timed)
        written = write_arrays(_path(self.folder, k, "arrays"), arrays)
        record = {"rows": frame.height, "times": times, "shortened": shortened, **written}
        save_record(_path(self.folder, k, "json"), record)
        return chunk.consumed


def _arrays(
    frame: pl.DataFrame, columns: tuple[Column, ...], timed: bool
) -> tuple[dict[str, np.ndarray], tuple[float, float] | None, dict[str, int]]:
    """What to keep of some rows, the range of their times, and how many rows of each list were shortened."""
    arrays: dict[str, np.ndarray] = {LABEL: frame[LABEL].to_numpy().astype(np.uint8)}
    times, shortened = None, {}
    if timed:
        time = frame[TIME].to_numpy()
        times = (float(time.min()), float(time.max()))
        if times[0] != times[1]:
            arrays[TIME] = time
    for column in columns:
        series = frame[column.name]
        if column.kind == "dense":
            arrays[f"dense {column.name}"] = series.fill_null(float("nan")).to_numpy()
            continue
        if column.bag is not None:
            series, lengths, shortened[column.name] = leading(series, column.bag.max_length)
            arrays[f"lengths {column.name}"] = lengths.astype(np.min_scalar_type(column.bag.max_length))
            if column.bag.weighted:
                arrays[f"weights {column.name}"] = series.struct.field("weight").to_numpy()
                series = series.struct.field("value")
        codes, values = numbered(series)
        if column.kind == "bucketed":
            # Several numbers fall into one bucket, so the buckets are numbered once more.
            renumber, values = numbered(bucket(pl.Series(values)))
            codes = np.concatenate([np.zeros(1, np.int32), renumber])[codes]
        text = values.cast(pa.large_string())
        _, offsets, data = text.buffers()
        ends = np.frombuffer(offsets, np.int64)[1 : len(text) + 1] if len(text) else np.zeros(0, np.int64)
        arrays[f"codes {column.name}"] = codes.astype(np.min_scalar_type(len(text)))
        arrays[f"ends {column.name}"] = ends.astype(np.uint32)
        arrays[f"text {column.name}"] = np.frombuffer(data or b"", np.uint8)[: int(ends[-1]) if len(ends) else 0]
    return arrays, times, shortened


def leading(series: pl.Series, most: int) -> tuple[pl.Series, np.ndarray, int]:
    """The elements of lists, at most the first ``most`` of each, ``[N]`` how many that are, and the rows cut."""
    lengths = series.list.len().to_numpy().astype(np.int64)
    elements = series.filter(pl.Series(lengths > 0)).explode()
    cut = int((lengths > most).sum())
    if cut:
        place = np.arange(len(elements)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        elements, lengths = elements.filter(pl.Series(place < most)), np.minimum(lengths, most)
    return elements, lengths, cut


def numbered(series: pl.Series) -> tuple[np.ndarray, pa.Array]:
    """Number the distinct values from 1 on as they come (0: null), and give them."""
    coded = series.rechunk().to_arrow().dictionary_encode()
    return coded.indices.fill_null(-1).to_numpy() + 1, coded.dictionary
