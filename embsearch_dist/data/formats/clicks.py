"""Criteo and Avazu, the two Kaggle click logs, as they come from Kaggle (plain or .gz)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import polars as pl

from embsearch_dist.data.formats.blocks import Block, Layout, parse, read_blocks, read_header
from embsearch_dist.data.formats.cells import is_hour_of_a_day
from embsearch_dist.data.formats.columns import EVERYTHING, LOG_NOTE, TIME, Chunk, Column, Reading, Rows, Source
from embsearch_dist.data.formats.unlabelled import check_kept, layout_of, without_label
from embsearch_dist.errors import UserError

CRITEO_NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
CRITEO = Layout(("label", *CRITEO_NUMBERS, *CRITEO_CATEGORIES), "\t")

AVAZU_FIELDS = (
    *("hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)
AVAZU = Layout(("id", "click", *AVAZU_FIELDS), ",", header=True)


TEXT = (".txt", ".tsv", ".csv", ".gz", "")


def text_files(paths: Sequence[Path], usual: tuple[str, ...]) -> tuple[Path, ...]:
    """The files that ``paths`` name, in that order: a file itself; of a directory the file with a usual
    name, else all its text files in name order (numbers by value: part-2 before part-10).

    Raises:
        UserError: nothing there, no text file in a directory, or a file named twice.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            known = [path / name for name in usual if (path / name).is_file()][:1]
            # Spark and the like leave marks whose names begin with _ or a dot.
            every = [f for f in path.iterdir() if f.is_file() and f.suffix in TEXT and f.name[0] not in "._"]
            found = known or sorted(every, key=by_name)
            if not found:
                raise UserError(
                    f"{path}: neither {', '.join(usual)} nor another text file in this directory. "
                    "Give the files themselves as --input"
                )
            files += found
        elif not path.exists():
            raise UserError(f"{path}: no such file. Check --input")
        else:
            files.append(path)
    seen: set[tuple[int, int]] = set()
    for file in files:
        entry = file.stat()
        if (entry.st_dev, entry.st_ino) in seen:
            raise UserError(f"{file} is named twice in --input. Remove one")
        seen.add((entry.st_dev, entry.st_ino))
    return tuple(files)


def by_name(file: Path) -> list[tuple[int, str]]:
    """A key that sorts names with numbers by their value: part-2 before part-10."""
    return [(int(word), "") if re.fullmatch("[0-9]+", word) else (-1, word) for word in re.split("([0-9]+)", file.name)]


def by_path(file: Path) -> list[list[tuple[int, str]]]:
    """The same for a path, folder by folder."""
    return [by_name(Path(part)) for part in file.parts]


def criteo(paths: Sequence[Path], numbers: str = "bucketed", reading: Reading = EVERYTHING) -> Source:
    """Criteo's train.txt: C1-C26 as they are, and I1-I13.

    ``numbers``: ``bucketed`` makes I1-I13 fields, 39 in all; ``dense`` keeps them numbers, log(max(x, 0) + 1) as in
    DLRM's preprocessing, beside 26 fields (standardised like all dense columns; a blank one is their mean).

    The file has no time column but its rows are in time order, so a chronological split goes by row.
    The minimum count of 10 is that of iHAS and FuxiCTR for the whole 45.8M rows.
    """
    files = text_files(paths, ("train.txt", "train.txt.gz"))
    first = (Column(n, numbers, log=numbers == "dense") for n in CRITEO_NUMBERS)
    columns = (*first, *(Column(n) for n in CRITEO_CATEGORIES))

    def read(layout: Layout, block: Block) -> pl.DataFrame:
        rows = Rows(parse(block, layout, _wanted(layout, "label", columns, reading)), block.where)
        series = [rows.convert(c, c.name) for c in columns if reading.wants(c)]
        if not reading.labelled:
            return pl.DataFrame([*series, *rows.kept(reading.kept)])
        # All times equal: ties go by row number.
        time = pl.repeat(0.0, rows.frame.height, dtype=pl.Float64, eager=True).alias(TIME)
        return pl.DataFrame([rows.label("label"), time, *series])

    notes: tuple[str, ...] = ("time order is row order",)
    if numbers == "dense":
        notes += (f"I1 to I13 are {LOG_NOTE}",)
    chunks = partial(_chunks, files, CRITEO, "label", read, reading)
    return Source("criteo", columns, files, chunks, min_count=10, notes=notes)


def avazu(paths: Sequence[Path], reading: Reading = EVERYTHING) -> Source:
    """Avazu's train.csv: its 22 columns after ``click``, with ``hour`` as the hour of the day (0-23).

    ``id`` names the row and says nothing about it, so it is no field; the date in ``hour`` would be
    unseen in any later data, so only the hour of the day is kept (the whole of it orders the
    chronological split). The minimum count of 4 keeps most of the rare device values that FuxiCTR
    keeps with 2 at a fraction of the rows, where iHAS uses 10.
    """
    files = text_files(paths, ("train.csv", "train.csv.gz", "train.gz", "train"))
    for file in files:
        header = read_header(file, ",", "utf-8")
        if header != AVAZU.columns and (reading.labelled or header != without_label(AVAZU, "click").columns):
            odd = next((n for n in header if n not in AVAZU.columns), None)
            what = f"column {odd!r} is not Avazu's" if odd else f"{len(header)} columns or another order"
            raise UserError(
                f"{file}, line 1: {what}. Expected the header of Kaggle's train.csv: id,click,hour,C1,...,C21"
            )
    columns = tuple(Column(n) for n in AVAZU_FIELDS)

    def read(layout: Layout, block: Block) -> pl.DataFrame:
        rows = Rows(parse(block, layout, _wanted(layout, "click", columns, reading)), block.where)
        series = [rows.convert(c, c.name) for c in columns[1:] if reading.wants(c)]
        if reading.labelled or reading.wants(columns[0]):
            hour = _hour(rows)
            series.insert(0, (hour % 100).cast(pl.String).alias("hour"))
        if not reading.labelled:
            return pl.DataFrame([*series, *rows.kept(reading.kept)])
        return pl.DataFrame([rows.label("click"), hour.cast(pl.Float64).alias(TIME), *series])

    notes = ("hour is the hour of the day",)
    chunks = partial(_chunks, files, AVAZU, "click", read, reading)
    return Source("avazu", columns, files, chunks, min_count=4, notes=notes)


def _hour(rows: Rows) -> pl.Series:
    """Avazu's YYMMDDHH as int64, checked."""
    hour = rows.integer("hour")
    bad = ~is_hour_of_a_day(hour)
    if bad.any():
        row = int(bad.arg_max() or 0)
        raise UserError(f"{rows.where(row)}, column 'hour': {hour[row]} is not YYMMDDHH. Fix that line")
    return hour


def _wanted(layout: Layout, label: str, columns: Sequence[Column], reading: Reading) -> tuple[str, ...]:
    """The columns of a file that are parsed."""
    names = {c.name for c in columns if reading.wants(c)} | set(reading.kept) | ({label} if reading.labelled else set())
    return tuple(n for n in layout.columns if n in names)


def _chunks(
    files: Sequence[Path],
    layout: Layout,
    label: str,
    read: Callable[[Layout, Block], pl.DataFrame],
    reading: Reading,
) -> Iterator[Chunk]:
    for file in files:
        own = layout if reading.labelled else layout_of(file, layout, label)
        check_kept(file, own, reading)
        for block in read_blocks(file, own):
            yield Chunk(block.consumed, partial(read, own, block))
