"""KDD Cup 2012, track 2: Tencent's log of search advertising, its users joined with their profiles.

``training.txt`` has 149.6M rows and ``userid_profile.txt`` 23.7M, both without a header. What a join needs of the
profiles is one byte a user, in a table as long as the largest user id (24 MB for the whole file), so rows are joined
as they are read, in any order and by any number of processes. Sources: the description of the data on Kaggle; NASRec
(https://github.com/facebookresearch/NasRec) for what is an integer and what a category.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from embsearch_dist.data.formats.blocks import Block, Layout, parse, read_blocks
from embsearch_dist.data.formats.columns import (
    EVERYTHING,
    LABEL,
    LOG_NOTE,
    Chunk,
    Column,
    Reading,
    Rows,
    Source,
    log_of,
)
from embsearch_dist.data.formats.unlabelled import check_kept, layout_of
from embsearch_dist.errors import UserError

IDS = ("display_url", "ad_id", "advertiser_id", "query_id", "keyword_id", "title_id", "description_id", "user_id")
NUMBERS = ("impression", "depth", "position")
COLUMNS = ("click", "impression", *IDS[:3], "depth", "position", *IDS[3:])
TRAINING = Layout(COLUMNS, "\t")
PROFILES = Layout(("user_id", "gender", "age"), "\t")
LARGEST_USER = (1 << 28) - 1
TRAINING_FILES = ("training.txt", "training.txt.gz")
PROFILE_FILES = ("userid_profile.txt", "userid_profile.txt.gz")


def kdd2012(path: Path, reading: Reading = EVERYTHING) -> Source:
    """KDD Cup 2012 track 2: a directory with training.txt and userid_profile.txt (or the training file itself).

    Fields: the eight ids as they stand, then gender and age of the user, both missing where ``user_id`` is 0 (nobody
    knows who it was, so the field itself is missing too) or has no profile; gender 0, a profile that does not tell, is
    a value. Dense: ``log(max(x, 0) + 1)`` of impression, depth and position. Label: click > 0; a row of several
    impressions stays one row. The minimum count of 10 is AutoInt's for these data.

    Raises:
        UserError: no training file or no profiles beside it; while reading also bad rows and cells of either.
    """
    training = path if path.is_file() else _training_file(path)
    profiles = next((f for name in PROFILE_FILES if (f := training.parent / name).is_file()), None)
    if profiles is None:
        raise UserError(
            f"{training.parent / PROFILE_FILES[0]}: no such file. {training.name} needs it for gender and age: "
            "put the file of that name from the same archive beside it"
        )
    columns = (*(Column(n) for n in (*IDS, "gender", "age")), *(Column(n, "dense", log=True) for n in NUMBERS))
    users = Profiles(profiles)
    layout = TRAINING if reading.labelled else layout_of(training, TRAINING, "click")
    check_kept(training, layout, reading)

    def read(block: Block) -> pl.DataFrame:
        rows = Rows(parse(block, layout), block.where)
        numbers = [log_of(rows.integer(n)) for n in NUMBERS]
        *others, (text, user) = (_identifier(rows, n) for n in IDS)
        ids = [*(other for other, _ in others), text.set(user == 0, None)]
        series = [*ids, *users.of(user), *numbers]
        if not reading.labelled:
            wanted = [s for s, c in zip(series, columns, strict=True) if reading.wants(c)]
            return pl.DataFrame([*wanted, *rows.kept(reading.kept)])
        return pl.DataFrame([(rows.integer("click") > 0).cast(pl.Float32).alias(LABEL), *series])

    def chunks() -> Iterator[Chunk]:
        before = profiles.stat().st_size  # they are read before the first rows
        for block in read_blocks(training, layout):
            yield Chunk(before + block.consumed, partial(read, block))
            before = 0

    no_time = f"{training.name} has no time column; use --split random"
    notes = (
        "label is click > 0",
        f"{', '.join(NUMBERS)} are {LOG_NOTE}",
        "user_id 0 is missing, and with it gender and age",
    )
    return Source("kdd2012", columns, (training, profiles), chunks, min_count=10, no_time=no_time, notes=notes)


class Profiles:
    """Gender and age of the users of a profile file, which is read when they are asked for first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._codes: np.ndarray | None = None
        self._error: UserError | None = None

    def of(self, users: pl.Series) -> list[pl.Series]:
        """``gender`` and ``age`` as text for ``[N]`` uint64 user ids; null for a null, for 0 and without a profile.

        Raises:
            UserError: a bad row of the profile file.
        """
        codes = self._read()
        nobody = len(codes) - 1
        code = pl.DataFrame({"code": codes[users.clip(upper_bound=nobody).fill_null(nobody).to_numpy()]})
        known = pl.when(pl.col("code") > 0)
        digits = {"gender": (pl.col("code") - 1) // 10, "age": (pl.col("code") - 1) % 10}
        return code.select(
            known.then(digit).cast(pl.String).alias(name) for name, digit in digits.items()
        ).get_columns()

    def _read(self) -> np.ndarray:
        with self._lock:
            if self._error is not None:  # other threads wait for the table: they need not find the same once more
                raise self._error
            if self._codes is None:
                try:
                    self._codes = self._load()
                except UserError as e:
                    self._error = e
                    raise
            return self._codes

    def _load(self) -> np.ndarray:
        """``[users + 2]`` uint8: at a user's id ``1 + 10 * gender + age``, or 0 without a profile; the last is 0."""
        codes = np.zeros(LARGEST_USER + 2, np.uint8)  # takes memory only where something is written
        last = 0
        for block in read_blocks(self.path, PROFILES):
            rows = Rows(parse(block, PROFILES), block.where)
            user = _between(rows, "user_id", LARGEST_USER)
            code = (1 + 10 * _between(rows, "gender", 9) + _between(rows, "age", 9)).astype(np.uint8)
            before = codes[user]
            codes[user] = code
            # A repeated line does no harm. In one block the last one was kept, so an earlier one differs from it.
            differ = (codes[user] != code) | ((before != 0) & (before != code))
            if differ.any():
                row = int(differ.argmax())
                raise UserError(
                    f"{block.where(row)}: user_id {user[row]} is there twice, with another gender or age. "
                    "Remove one of the lines"
                )
            last = max(last, int(user.max()))
        codes[0] = 0
        return codes[: last + 2]


def _training_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory. Check --input")
    for name in TRAINING_FILES:
        if (directory / name).is_file():
            return directory / name
    raise UserError(
        f"{directory}: no {' or '.join(TRAINING_FILES)} in this directory. Unpack track 2 of KDD Cup 2012 there"
    )


def _identifier(rows: Rows, column: str) -> tuple[pl.Series, pl.Series]:
    """A column of ids as text and as uint64; a blank is null.

    Raises:
        UserError: a cell that is not a whole number from 0 to 2^64 - 1.
    """
    text = rows.category(column)
    number = text.cast(pl.UInt64, strict=False)
    if number.null_count() > text.null_count():
        row = int((number.is_null() & text.is_not_null()).arg_max() or 0)
        raise UserError(
            f"{rows.where(row)}, column {column!r}: not a whole number from 0 to 2^64 - 1: {text[row]!r}. "
            "Write such a number"
        )
    return text, number


def _between(rows: Rows, column: str, most: int) -> np.ndarray:
    """``[N]`` int64: a column of whole numbers from 0 to ``most``."""
    number = rows.integer(column).to_numpy()
    bad = (number < 0) | (number > most)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{rows.where(row)}, column {column!r}: {number[row]} is not from 0 to {most:,}. Write such a number"
        )
    return number
