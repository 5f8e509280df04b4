"""What a reader yields, and the checked conversions from raw cells that all readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from embsearch_dist.data.formats.cells import PLAIN, Spelling, is_hour_of_a_day, text_of
from embsearch_dist.errors import UserError

LABEL, TIME = "__label", "__time"
KEPT = "__kept "  # stands before the name of a column that is only passed on
KINDS = ("categorical", "list", "bucketed", "dense")
MAX_LENGTH = 100
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}


@dataclass(frozen=True)
class Bag:
    """How a cell of a list column holds its values, and what is done with them.

    Attributes:
        pooling: how their embeddings become one; see :class:`embsearch_dist.schema.Field`.
        max_length: the first so many values of a row are kept.
        separator: between the values of a text cell.
        weight_separator: between a value and its weight (``a:0.5``), where they share a cell; else empty.
        weights: column of the weights, where they have one; else empty.
    """

    pooling: str = "sum"
    max_length: int = MAX_LENGTH
    separator: str = "|"
    weight_separator: str = ""
    weights: str = ""

    @property
    def weighted(self) -> bool:
        return bool(self.weights or self.weight_separator)


@dataclass(frozen=True)
class Column:
    """One column of the prepared data.

    ``kind``: ``categorical`` (any text), ``list`` (any number of texts, with a ``bag``), ``bucketed`` (a number,
    turned into a category by :func:`bucket`) or ``dense`` (a number that stays one). ``whole``: texts like ``1.0``
    are the whole number ``1`` (see :meth:`Spelling.whole`). ``log``: of a dense column :func:`log_of` is taken.
    ``hour``: the category is the hour of the day (see :meth:`Rows.hour`).
    """

    name: str
    kind: str = "categorical"
    bag: Bag | None = None
    whole: bool = False
    log: bool = False
    hour: bool = field(default=False, repr=False)  # by the repr a job knows its columns; a format always has it alike


@dataclass(frozen=True)
class Reading:
    """What of the raw rows is wanted.

    Attributes:
        labelled: the label, which must then be there; rows that are to be predicted have none.
        only: names of the columns of the source that are read; ``None``: all.
        kept: columns of the files that are passed on as they are, behind :data:`KEPT` in the frames.
    """

    labelled: bool = True
    only: frozenset[str] | None = None
    kept: tuple[str, ...] = ()

    def wants(self, column: Column) -> bool:
        return self.only is None or column.name in self.only


EVERYTHING = Reading()


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows, cut out of the input but not looked at yet.

    Cutting costs little and goes through the input in order; reading is the work. So threads and ranks
    share a data set by all cutting it alike and each reading some of the chunks.

    Attributes:
        consumed: bytes of the input that they take.
        read: gives every column of the source (text; float64 for bucketed and dense ones; null =
            missing; lists as :meth:`Rows.bag` gives them), ``__label`` float32 and, where there is a time,
            ``__time`` float64.
    """

    consumed: int
    read: Callable[[], pl.DataFrame]

    @property
    def frame(self) -> pl.DataFrame:
        """The rows, read now."""
        return self.read()


@dataclass(frozen=True)
class Source:
    """Raw data opened for reading.

    Attributes:
        dataset: its name.
        columns: fields and dense columns, in the order of the schema.
        files: every file read, for the size of the job and the record of where data came from.
        chunks: starts from the beginning; the same rows always come in the same chunks and order.
        min_count: default for the fewest training rows a value needs to get an id of its own.
        no_time: why a chronological split is impossible; ``None`` when it is possible.
        notes: what was decided while opening, kept in the schema for people.
        recipe: what else decides the rows (the text of a source file): another recipe, other data.
        description: how more such rows are read, see :mod:`embsearch_dist.data.formats.described`; JSON-able.
        coarse: of fields whose values are floats in a file: the number from which on these cannot tell one whole number
            from the next.
        spelling: how cells of text are written.
    """

    dataset: str
    columns: tuple[Column, ...]
    files: tuple[Path, ...]
    chunks: Callable[[], Iterator[Chunk]]
    min_count: int = 1
    no_time: str | None = None
    notes: tuple[str, ...] = ()
    recipe: str = ""
    description: Mapping[str, object] = field(default_factory=dict)
    coarse: Mapping[str, float] = field(default_factory=dict)
    spelling: Spelling = PLAIN

    @property
    def bytes(self) -> int:
        return sum(f.stat().st_size for f in self.files)


@dataclass(frozen=True)
class LabelColumn:
    """Where the label stands and which cells are clicks.

    Attributes:
        column: its name.
        threshold: clicks are the numbers greater than it; ``None``: the cell itself is 0 or 1.
        positive: texts that are clicks, ``negative``: those that are none; both empty, or both not.
    """

    column: str
    threshold: float | None = None
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Raw cells of consecutive rows and how to say where row ``i`` of them is in its file."""

    frame: pl.DataFrame
    where: Callable[[int], str]
    spelling: Spelling = PLAIN

    def cells(self, column: str) -> pl.Series:
        """The raw cells, null where they hold what means missing."""
        raw = self.frame[column]
        if raw.dtype in (pl.Categorical, pl.Enum):
            raw = raw.cast(pl.String)
        return self.spelling.present(raw)

    def label(self, column: str, threshold: float | None = None) -> pl.Series:
        """The label as float32 0 or 1: the cell itself, or whether it is greater than ``threshold``.

        Raises:
            UserError: a blank, a non-number, or (without a threshold) anything but 0 and 1, true and false, yes and
                no (in any case).
        """
        raw, number = self._numbers(column)
        if threshold is None:
            if raw.dtype == pl.String and number.null_count():
                words = raw.str.to_lowercase().replace_strict(WORDS, default=None, return_dtype=pl.Float64)
                number = pl.select(pl.coalesce(number, words)).to_series()
            bad = ((number != 0) & (number != 1)) | number.is_null() | number.is_nan()
            fix = "Write 0 or 1 (a source file can give a threshold, or which values are `positive` and `negative`)"
            expected = "neither 0 nor 1"
        else:
            bad = number.is_null() | number.is_nan()
            fix, expected = "Write a number", "not a number"
        self._refuse(bad.fill_null(True), raw, column, f"the label is {expected}", fix)
        values = number if threshold is None else number > threshold
        return values.cast(pl.Float32).alias(LABEL)

    def label_of(self, label: LabelColumn) -> pl.Series:
        """The label as float32 0 or 1.

        Raises:
            UserError: a cell that says neither.
        """
        if not label.positive:
            return self.label(label.column, label.threshold)
        text = self.category(label.column)
        yes, no = text.is_in(label.positive), text.is_in(label.negative)
        wrong = f"the label is none of {', '.join(map(repr, label.positive + label.negative))}"
        self._refuse(~(yes | no).fill_null(False), text, label.column, wrong, "Add it to `positive` or `negative`")
        return yes.cast(pl.Float32).alias(LABEL)

    def number(self, column: str) -> pl.Series:
        """The column as float64; blank and NaN are null.

        Raises:
            UserError: a cell that is not a finite number.
        """
        raw, number = self._numbers(column)
        if number.null_count() > raw.null_count() or not number.is_finite().all():
            number = number.fill_nan(None)
            bad = number.is_infinite().fill_null(False) | (number.is_null() & ~_is_blank(raw))
            advice = self.spelling.advice(raw[int(bad.arg_max() or 0)])
            self._refuse(bad, raw, column, "not a finite number", f"Write a number or leave the cell empty{advice}")
        return number

    def bag(self, column: str, bag: Bag, whole: bool = False) -> pl.Series:
        """The column as lists of text or, with weights, of ``{value: text, weight: float32}``; never null.

        A text cell is cut at the separator, a list is one already. Blank values are left out, with their
        weights; a blank cell is an empty list. Nothing is cut to ``max_length`` yet.

        Raises:
            UserError: a cell that is no list, a weight that is missing, negative or no number, another
                number of weights than of values.
        """
        values, lengths = self._elements(column, bag)
        row = np.repeat(np.arange(len(lengths)), lengths)
        weights = None
        if bag.weights:
            weights, others = self._elements(bag.weights, bag)
            if (differ := lengths != others).any():
                i = int(differ.argmax())
                raise UserError(
                    f"{self.where(i)}, column {column!r}: {lengths[i]} values but {others[i]} weights in column "
                    f"{bag.weights!r}. Write one weight for each value"
                )
        elif bag.weight_separator:
            # The last separator counts: a value may hold others.
            mark, joined = f"\\x{ord(bag.weight_separator):02x}", self._text(values, column)
            weights = joined.str.extract(f"(?s){mark}([^{mark}]*)$")
            values = joined.str.extract(f"(?s)^(.*){mark}").fill_null(joined)
        values = self._text(values, column)
        values = self.spelling.whole(values) if whole else values
        kept = values.is_not_null()
        counts = np.bincount(row[kept.to_numpy()], minlength=len(lengths))
        parts = pl.DataFrame({"value": values})
        if weights is not None:
            parts = parts.with_columns(weight=self._weights(weights, kept, row, column))
        kept_parts = parts.filter(kept)
        content = (kept_parts.to_struct() if bag.weighted else kept_parts["value"]).rechunk().to_arrow()
        offsets = pa.array(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
        return pl.Series(column, pa.LargeListArray.from_arrays(offsets, content))

    def _elements(self, column: str, bag: Bag) -> tuple[pl.Series, np.ndarray]:
        """The elements of a list column, row after row, and how many each row has (``[N]`` int64)."""
        raw = self.cells(column)
        if raw.dtype == pl.String:
            raw = raw.set(raw == "", None).str.split(bag.separator)
        elif raw.dtype == pl.Null:
            raw = raw.cast(pl.List(pl.String))
        elif raw.dtype == pl.Array:
            raw = raw.arr.to_list()
        if raw.dtype != pl.List:
            raise UserError(f"{self.where(0)}, column {column!r}: type {raw.dtype} is no list. Make it one, or text")
        lengths = raw.list.len().fill_null(0).to_numpy().astype(np.int64)
        return raw.filter(pl.Series(lengths > 0)).explode(), lengths

    def _weights(self, raw: pl.Series, kept: pl.Series, row: np.ndarray, column: str) -> pl.Series:
        """``[E]`` float32 weights of the kept values; ``row`` tells where each stands."""
        number = self._as_float(raw, column).cast(pl.Float32, strict=False)
        good = (number.is_finite() & (number >= 0)).fill_null(False)
        bad = kept & ~good
        if bad.any():
            i = int(bad.arg_max() or 0)
            shown = "there is none" if raw[i] is None or raw[i] == "" else repr(raw[i])
            raise UserError(
                f"{self.where(int(row[i]))}, column {column!r}: the weight of a value must be a number from 0 on: "
                f"{shown}. Write one for each value"
            )
        return number

    def _numbers(self, column: str) -> tuple[pl.Series, pl.Series]:
        """The raw cells and the float64 they spell, null where they spell none."""
        raw = self.cells(column)
        self._check_number(raw, column)
        return self.spelling.numbers(raw)

    def _as_float(self, raw: pl.Series, column: str) -> pl.Series:
        self._check_number(raw, column)
        return self.spelling.number(raw)

    def _check_number(self, raw: pl.Series, column: str) -> None:
        if not (raw.dtype.is_numeric() or raw.dtype in (pl.String, pl.Boolean, pl.Null)):
            raise UserError(f"{self.where(0)}, column {column!r}: type {raw.dtype} is no number. Make it one")

    def integer(self, column: str) -> pl.Series:
        """The column as int64, without blanks.

        Raises:
            UserError: a cell that is not a whole number.
        """
        raw = self.frame[column]
        number = raw.cast(pl.Int64, strict=False)
        self._refuse(number.is_null(), raw, column, "not a whole number", "Write a whole number")
        return number

    def hour(self, column: str) -> pl.Series:
        """The hour of the day as text, 0 to 23, of Avazu's YYMMDDHH or of such an hour; an empty cell is null.

        Raises:
            UserError: a cell that is neither.
        """
        text = self.category(column)
        number = text.cast(pl.Int64, strict=False)
        good = number.is_between(0, 23) | is_hour_of_a_day(number)
        bad = text.is_not_null() & ~good.fill_null(False)
        self._refuse(bad, text, column, "not YYMMDDHH", "Write it like 14102113, or the hour alone")
        return (number % 100).cast(pl.String)

    def category(self, column: str) -> pl.Series:
        """The column as text; an empty cell is null."""
        return self._text(self.cells(column), column)

    def _text(self, raw: pl.Series, column: str) -> pl.Series:
        if raw.dtype.is_nested() or raw.dtype in (pl.Binary, pl.Object):
            raise UserError(f"{self.where(0)}, column {column!r}: type {raw.dtype} is no category. Make it text")
        text = text_of(self.spelling.present(raw))
        if not (raw.dtype == pl.String or raw.dtype.is_numeric()):
            text = self.spelling.present(text)  # a date may be missing, too, and has no text before
        return text.set(text == "", None) if (text == "").any() else text

    def convert(self, column: Column, raw: str) -> pl.Series:
        """The raw column as text, list or number, under the name of ``column``.

        A bucketed one stays a number here: its few distinct numbers are cheaper to bucket than its rows.
        """
        if column.bag is not None:
            return self.bag(raw, column.bag, column.whole).alias(column.name)
        if column.kind != "categorical":
            number = self.number(raw).alias(column.name)
            return log_of(number) if column.log else number
        if column.hour:
            return self.hour(raw).alias(column.name)
        text = self.category(raw)
        return (self.spelling.whole(text) if column.whole else text).alias(column.name)

    def kept(self, columns: Sequence[str]) -> list[pl.Series]:
        """Columns of the files as they are, under the names that they have in a frame."""
        return [self.frame[name].alias(f"{KEPT}{name}") for name in columns]

    def _refuse(self, bad: pl.Series, raw: pl.Series, column: str, wrong: str, fix: str) -> None:
        if bad.any():
            row = int(bad.arg_max() or 0)
            value = raw[row]
            shown = "blank" if value is None or value == "" else repr(value)
            if isinstance(value, str) and value != value.strip():
                fix += ". If the blanks around it do not count, write `spaces: trim` in the source file"
            raise UserError(f"{self.where(row)}, column {column!r}: {wrong}: {shown}. {fix}")


def _is_blank(raw: pl.Series) -> pl.Series:
    """Where a cell holds no number by intent: null, empty or "nan" in any case."""
    if raw.dtype != pl.String:
        return raw.is_null() | (raw.is_nan().fill_null(False) if raw.dtype.is_float() else False)
    return raw.str.to_lowercase().is_in(["", "nan"]).fill_null(True)


def bucket(number: pl.Series) -> pl.Series:
    """Number to category, as the CTR papers do it: ``floor(ln(x)^2)`` for x > 2, else ``floor(x)``.

    The two ranges share small results (3 and 1 both give 1), as in FuxiCTR. Null stays null.
    """
    small = number.clip(-(2.0**53), 2.0)
    large = number.clip(lower_bound=2.0).log() ** 2
    both = pl.DataFrame({"x": number, "small": small, "large": large}).select(
        pl.when(pl.col("x") > 2).then(pl.col("large")).otherwise(pl.col("small")).floor().cast(pl.Int64)
    )
    return both.to_series().cast(pl.String)


LOG_NOTE = "log(max(x, 0) + 1)"


def log_of(number: pl.Series) -> pl.Series:
    """A count as a dense column, :data:`LOG_NOTE`, as in DLRM's preprocessing. Null stays null."""
    return number.clip(lower_bound=0).cast(pl.Float64).log1p()
