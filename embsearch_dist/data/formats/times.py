"""The time column: numbers, dates as ISO 8601 with or without an offset, or dates of a given format."""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

from embsearch_dist.data.formats.cells import text_of
from embsearch_dist.data.formats.columns import TIME, Rows
from embsearch_dist.errors import UserError

SECONDS = "%Y-%m-%d %H:%M:%S%.f"
ISO = (
    r"^(\d{4}-\d{2}-\d{2})(?:[Tt ](\d{2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?)"
    r" ?([Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?)?$"
)
# Digits of those parts of a date that numbers can be made of.
WIDTHS = {"%Y": 4, "%y": 2, "%m": 2, "%d": 2, "%j": 3, "%H": 2, "%M": 2, "%S": 2}
# Words of a format without %, as people write them.
LETTERS = {"yyyy": "%Y", "yy": "%y", "mm": "%m", "dd": "%d", "HH": "%H", "MM": "%M", "SS": "%S"}


@dataclass(frozen=True)
class TimeColumn:
    """Where the time stands and how it is written.

    Attributes:
        column: its name.
        format: of dates, in the letters of strftime; empty: a number or ISO 8601.
        zone: of dates without an offset; empty: UTC.
    """

    column: str
    format: str = ""
    zone: str = ""

    @property
    def use(self) -> str:
        """What its column of Parquet is for: ``time``, or with a format ``digits`` or ``dates``: dates that a whole
        number can spell, or cannot."""
        if self.format in ("", "%s"):
            return "time"
        return "digits" if digits_of(self.format) else "dates"


def strftime_of(pattern: str) -> str:
    """A format in the letters of strftime; ``dd.mm.yyyy HH:MM`` is translated.

    Raises:
        ValueError: it names no day of a year, or letters that are not known.
    """
    if "%" not in pattern:
        pattern = re.sub("|".join(LETTERS), lambda m: LETTERS[m[0]], pattern)
    left = re.sub(r"%[A-Za-z.]f?", "", pattern)
    if re.search("[A-SU-Za-z]", left) or not re.search("%[YyFDcsx]", pattern):
        raise ValueError("write it like dd.mm.yyyy HH:MM:SS, or in the letters of strftime (%d.%m.%Y)")
    pl.Series(["x"]).str.strptime(pl.Datetime("us"), pattern, strict=False)
    return pattern


def digits_of(pattern: str) -> int:
    """How many digits a date of a format has (``%Y%m%d``: 8); 0: it has other signs or no fixed width."""
    parts = re.findall("%[A-Za-z]|.", pattern)
    return sum(WIDTHS.get(p, 1) for p in parts) if all(p in WIDTHS or p in "0123456789" for p in parts) else 0


def check_zone(zone: str) -> None:
    """Raises ``ValueError`` for a time zone that is not known."""
    try:
        pl.Series([0]).cast(pl.Datetime("us")).dt.replace_time_zone(zone)
    except pl.exceptions.PolarsError as e:
        raise ValueError("write a name such as Europe/Berlin, or UTC") from e


class Clock:
    """Reads the time column as float64; the first rows decide how, and all others are held to it.

    Dates become microseconds (exact in a float64); of numbers beyond 2^53 (nanoseconds since 1970) the
    last bits go, and rows that then tie keep their order in the file.
    """

    def __init__(self, time: TimeColumn, first: Rows) -> None:
        self.time = time
        raw = first.cells(time.column).head(1)
        number = raw.dtype != pl.String or not first.spelling.number(raw).null_count()
        self.how = "number" if number and not time.format else "date"

    def read(self, rows: Rows) -> pl.Series:
        """``[N]`` float64, ``__time``.

        Raises:
            UserError: a blank one, or one that is not written as the first is; names file, row and column.
        """
        raw = rows.cells(self.time.column)
        if raw.dtype.is_temporal():
            time = self._utc(raw.cast(pl.Datetime("us"), strict=False) if raw.dtype == pl.Date else raw)
        elif raw.dtype != pl.String and self.time.use == "digits":
            time = self._dates(self._spelled(raw))
        elif raw.dtype != pl.String or self.how == "number":
            raw, time = rows.spelling.numbers(raw)
        else:
            time = self._dates(raw)
        time = time.cast(pl.Float64).fill_nan(None)
        if time.null_count() or not time.is_finite().all():
            row = int((time.is_null() | time.is_infinite().fill_null(False)).arg_max() or 0)
            self._refuse(rows, raw, row)
        return time.alias(TIME)

    def _refuse(self, rows: Rows, raw: pl.Series, row: int) -> None:
        wanted = "a number" if self.how == "number" else "a date like 2014-10-21 13:00:00, or name its `format`"
        if self.time.format:
            wanted = f"a date of the format {self.time.format}"
        if self.how == "number" and not self._dates(raw[row : row + 1].cast(pl.String)).null_count():
            wanted = "it as in the first row of all, which is a number"
        value = "blank" if raw[row] in (None, "") else repr(raw[row])
        raise UserError(f"{rows.where(row)}, column {self.time.column!r}: the time is {value}. Write {wanted}")

    def _spelled(self, number: pl.Series) -> pl.Series:
        """Dates of digits as text, with the zeros that a number does not show: 1022000 is 01022000 for ``%d%m%Y``.

        Null where the format has fewer digits, or where only a year before 1000 could have lost zeros.
        """
        text, digits = text_of(number), digits_of(self.time.format)
        if not self.time.format.startswith("%Y"):
            text = text.str.zfill(digits)
        return text.set(~text.str.contains(rf"^[0-9]{{{digits}}}$").fill_null(False), None)

    def _dates(self, raw: pl.Series) -> pl.Series:
        """Text to int64 microseconds, null where it is no date."""
        if self.time.format:
            return self._utc(raw.str.strptime(pl.Datetime("us"), self.time.format, strict=False))
        tidy = raw.str.replace("T", " ", literal=True)
        tidy = pl.select(pl.when(tidy.str.len_chars() == 10).then(tidy + " 00:00:00").otherwise(tidy)).to_series()
        time = self._utc(tidy.str.to_datetime(SECONDS, strict=False, time_unit="us"))
        if time.null_count() == raw.null_count():
            return time
        other = self._iso(raw)
        return pl.select(pl.coalesce(time, other)).to_series()

    def _iso(self, raw: pl.Series) -> pl.Series:
        """All forms of ISO 8601 in days, with an offset or not."""
        part = raw.str.extract_groups(ISO).struct.unnest()
        part.columns = ["day", "clock", "offset"]
        clock = pl.col("clock").fill_null("00:00").str.replace(",", ".", literal=True)
        clock = pl.when(clock.str.len_chars() == 5).then(clock + ":00").otherwise(clock)
        part = part.with_columns(
            at=(pl.col("day") + " " + clock).str.to_datetime(SECONDS, strict=False, time_unit="us")
        )
        hours = pl.col("offset").str.extract(r"^[+-](\d{2})").cast(pl.Int64)
        minutes = pl.col("offset").str.extract(r"^[+-]\d{2}:?(\d{2})$").cast(pl.Int64).fill_null(0)
        sign = pl.when(pl.col("offset").str.starts_with("-")).then(-1).otherwise(1)
        shift = (sign * (hours * 60 + minutes)).fill_null(0) * 60_000_000
        bad = (hours > 23) | (minutes > 59)
        fixed = pl.when(~bad.fill_null(False)).then(pl.col("at").cast(pl.Int64) - shift)
        offset = pl.col("offset").is_not_null()
        found = part.select(pl.when(offset).then(fixed)).to_series()
        local = part.select(pl.when(~offset).then(pl.col("at"))).to_series()
        return pl.select(pl.coalesce(found, self._utc(local))).to_series()

    def _utc(self, time: pl.Series) -> pl.Series:
        """Datetimes to int64 microseconds of UTC; those without a zone are in that of the source file."""
        kind = time.dtype
        assert isinstance(kind, pl.Datetime)
        if kind.time_zone is None and self.time.zone:
            time = time.dt.replace_time_zone(self.time.zone, ambiguous="earliest", non_existent="null")
        return time.cast(pl.Datetime("us", time.dtype.time_zone), strict=False).cast(pl.Int64)  # type: ignore[attr-defined]
