"""What single cells mean: how a source spells numbers and missing values, and the one text of every value."""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

# Whole floats below this are exact, and written as the whole numbers that they are.
EXACT = 2.0**53


@dataclass(frozen=True)
class Spelling:
    """How the cells of a source are written.

    Attributes:
        missing: texts that mean that there is no value, beside the empty one.
        decimal: the decimal mark, a point or a comma.
        thousands: the mark between groups of three digits; empty: none is allowed.
        trim: blanks around a cell (of a list: around each value) do not belong to it.
    """

    missing: tuple[str, ...] = ()
    decimal: str = "."
    thousands: str = ""
    trim: bool = False

    def present(self, raw: pl.Series) -> pl.Series:
        """The cells, null where they hold one of the missing values (numbers, not as text: a number equal to one)."""
        if self.trim and raw.dtype == pl.String:
            raw = self._bare(raw)
            raw = raw.set(raw == "", None)
        if not self.missing:
            return raw
        if raw.dtype == pl.String:
            return raw.set(raw.is_in(self.missing).fill_null(False), None)
        if not raw.dtype.is_numeric():
            return raw
        texts = pl.Series(self.missing, dtype=pl.String)
        plain = texts.cast(pl.Float64, strict=False)
        numbers = pl.select(pl.coalesce(plain, self.number(texts))).to_series()
        if raw.dtype.is_integer():
            return raw.set(raw.is_in(self._whole_missing(numbers, raw.dtype).implode()).fill_null(False), None)
        numbers = numbers.drop_nulls()
        return raw.set(raw.cast(pl.Float64).is_in(numbers.implode()).fill_null(False), None)

    def _whole_missing(self, numbers: pl.Series, kind: pl.DataType) -> pl.Series:
        """The whole numbers that mean missing, in a type of integers: a float64 would merge those from 2^53 on.

        Args:
            numbers: float64 of each of the missing texts, null where it spells none.
        """
        pairs = [(text, number) for text, number in zip(self.missing, numbers, strict=True) if number is not None]
        exact = [
            int(t) if re.fullmatch(r"[+-]?\d{1,30}", t) else int(x) for t, x in pairs if x % 1 == 0 and abs(x) < 2e19
        ]
        return pl.Series(exact, dtype=pl.Int128).cast(kind, strict=False).drop_nulls()

    def numbers(self, raw: pl.Series) -> tuple[pl.Series, pl.Series]:
        """The cells and the float64 they spell; both null where a text spells the number of a missing value.

        So -999.0 is missing where -999 is, as for numbers of Parquet.
        """
        number = self.number(raw)
        if raw.dtype != pl.String or not self.missing:
            return raw, number
        wanted = self.number(pl.Series(self.missing, dtype=pl.String)).drop_nulls()
        bad = number.is_in(wanted.implode()).fill_null(False)
        return raw.set(bad, None), number.set(bad, None)

    def number(self, raw: pl.Series) -> pl.Series:
        """Text or number to float64; null where a cell spells no number.

        A mark of thousands counts only between groups of three digits, so that 1.5 never becomes 15.
        """
        raw = self._bare(raw)
        if raw.dtype != pl.String or not (self.thousands or self.decimal != "."):
            return raw.cast(pl.Float64, strict=False)
        text: pl.Expr = pl.col("text")
        if self.thousands:
            mark, point = re.escape(self.thousands), re.escape(self.decimal)
            grouped = text.str.contains(rf"^[+-]?\d{{1,3}}(?:{mark}\d{{3}})+(?:{point}\d*)?$")
            bad = text.str.contains(self.thousands, literal=True) & ~grouped
            text = pl.when(~bad).then(text.str.replace_all(self.thousands, "", literal=True))
        if self.decimal != ".":
            text = pl.when(~text.str.contains(".", literal=True)).then(
                text.str.replace(self.decimal, ".", literal=True)
            )
        frame = pl.DataFrame([raw.alias("text")])
        return frame.select(text.cast(pl.Float64, strict=False)).to_series().alias(raw.name)

    def whole(self, text: pl.Series) -> pl.Series:
        """Text of whole numbers without the ``.0`` (or ``,0``) that some programs write behind them.

        Null where only these digits tell the text from a missing value: -1.0 is missing where -1 is.
        """
        mark, digits = re.escape(self.decimal), r"\d+"
        if self.thousands:
            digits = rf"(?:\d{{1,3}}(?:{re.escape(self.thousands)}\d{{3}})+|\d+)"
        pattern = rf"^([+-]?{digits}){mark}0+$"
        found = text.str.replace(pattern, "$1")
        if not self.missing:
            return found
        missing = pl.Series(self.missing, dtype=pl.String).str.replace(pattern, "$1")
        return found.set(found.is_in(missing.implode()).fill_null(False), None)

    def _bare(self, raw: pl.Series) -> pl.Series:
        """The cells without the blanks around them, where these do not count."""
        return raw.str.strip_chars() if self.trim and raw.dtype == pl.String else raw

    def advice(self, value: object) -> str:
        """What key may be missing where a cell was to be a number and is none."""
        if isinstance(value, str) and self.decimal == "." and re.fullmatch(r"[+-]?[\d.]*,\d+", value):
            return ' (a decimal comma? Write `decimal: ","` in the source file)'
        if isinstance(value, str) and value.strip().upper() in ("?", "-", "\\N", "NULL", "NA", "N/A", "NONE"):
            return " (a missing value? Write `missing: [...]` in the source file)"
        return ""


PLAIN = Spelling()


def text_of(raw: pl.Series) -> pl.Series:
    """A column as text in which one value has one text, whatever its type in the file.

    1, 1.0 and 1.00 (decimal) are ``1``; a time does not show the unit it was stored in, and one with a zone is
    that of UTC. NaN is null.
    """
    kind = raw.dtype
    if kind == pl.String:
        return raw
    if kind.is_float():
        whole = (pl.col("x") == pl.col("x").floor()) & (pl.col("x").abs() < EXACT)
        short = pl.when(whole).then(pl.col("x").cast(pl.Int64, strict=False).cast(pl.String))
        frame = pl.DataFrame([raw.fill_nan(None).alias("x")])
        return frame.select(short.otherwise(pl.col("x").cast(pl.String))).to_series().alias(raw.name)
    if kind.is_decimal():
        text = raw.cast(pl.String)
        return text.str.replace(r"(\.\d*?)0+$", "$1").str.strip_suffix(".")
    if isinstance(kind, pl.Datetime):
        utc = raw if kind.time_zone is None else raw.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return utc.dt.to_string("%Y-%m-%d %H:%M:%S%.f")
    return raw.cast(pl.String)


def is_hour_of_a_day(number: pl.Series) -> pl.Series:
    """Whether whole numbers are YYMMDDHH: YYYYMMDDHH, YYMMDD or seconds would be ordered among them, and wrongly."""
    month, day, hour = number // 10_000 % 100, number // 100 % 100, number % 100
    return (number >= 0) & (number < 10**8) & month.is_between(1, 12) & day.is_between(1, 31) & (hour <= 23)
