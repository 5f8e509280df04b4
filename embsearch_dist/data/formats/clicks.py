"""Criteo and Avazu, the two Kaggle click logs, as they come from Kaggle (plain or .gz)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from embsearch_dist.data.formats.blocks import Layout, parse, read_blocks, read_header
from embsearch_dist.data.formats.columns import TIME, Chunk, Column, Rows, Source
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


def one_file(path: Path, usual: tuple[str, ...]) -> Path:
    """``path`` itself, or the file of a usual name in the directory ``path``.

    Raises:
        UserError: nothing there, or no such file in the directory.
    """
    if path.is_dir():
        for name in usual:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: none of {', '.join(usual)} in this directory. Give the file itself as --input")
    if not path.exists():
        raise UserError(f"{path}: no such file. Check --input")
    return path


def criteo(path: Path) -> Source:
    """Criteo's train.txt: 39 fields, I1-I13 bucketed and C1-C26 as they are.

    The file has no time column but its rows are in time order, so a chronological split goes by row.
    The minimum count of 10 is that of iHAS and FuxiCTR for the whole 45.8M rows.
    """
    file = one_file(path, ("train.txt", "train.txt.gz"))
    columns = (*(Column(n, "bucketed") for n in CRITEO_NUMBERS), *(Column(n) for n in CRITEO_CATEGORIES))

    def chunks() -> Iterator[Chunk]:
        for block in read_blocks(file, CRITEO):
            rows = Rows(parse(block, CRITEO), block.where)
            series = [rows.convert(c, c.name) for c in columns]
            # All times equal: ties go by row number.
            time = pl.repeat(0.0, rows.frame.height, dtype=pl.Float64, eager=True).alias(TIME)
            yield Chunk(pl.DataFrame([rows.label("label"), time, *series]), block.consumed)

    return Source("criteo", columns, (file,), chunks, min_count=10, notes=("time order is row order",))


def avazu(path: Path) -> Source:
    """Avazu's train.csv: its 22 columns after ``click``, with ``hour`` as the hour of the day (0-23).

    ``id`` names the row and says nothing about it, so it is no field; the date in ``hour`` would be
    unseen in any later data, so only the hour of the day is kept (the whole of it orders the
    chronological split). The minimum count of 4 keeps most of the rare device values that FuxiCTR
    keeps with 2 at a fraction of the rows, where iHAS uses 10.
    """
    file = one_file(path, ("train.csv", "train.csv.gz", "train.gz", "train"))
    header = read_header(file, ",", "utf-8")
    if header != AVAZU.columns:
        odd = next((n for n in header if n not in AVAZU.columns), None)
        what = f"column {odd!r} is not Avazu's" if odd else f"{len(header)} columns or another order"
        raise UserError(f"{file}, line 1: {what}. Expected the header of Kaggle's train.csv: id,click,hour,C1,...,C21")
    columns = tuple(Column(n) for n in AVAZU_FIELDS)

    def chunks() -> Iterator[Chunk]:
        for block in read_blocks(file, AVAZU):
            wanted = tuple(n for n in AVAZU.columns if n != "id")
            rows = Rows(parse(block, AVAZU, wanted), block.where)
            hour = rows.integer("hour")
            bad = (hour % 100 > 23) | (hour < 0)
            if bad.any():
                row = int(bad.arg_max() or 0)
                raise UserError(f"{rows.where(row)}, column 'hour': {hour[row]} is not YYMMDDHH. Fix that line")
            series = [(hour % 100).cast(pl.String).alias("hour")]
            series += [rows.convert(c, c.name) for c in columns[1:]]
            yield Chunk(pl.DataFrame([rows.label("click"), hour.cast(pl.Float64).alias(TIME), *series]), block.consumed)

    return Source("avazu", columns, (file,), chunks, min_count=4, notes=("hour is the hour of the day",))
