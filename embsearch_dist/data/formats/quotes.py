"""Where records end and which quotes protect what, strictly by RFC 4180, from a few numpy passes over the bytes.

An opening quote stands only at the start of a cell, a closing one only before a separator or the end of a line,
and a doubled one inside a quoted cell is a quote. So the odd and the even quotes of valid text open and close,
each can be checked by the byte beside it, and there is one way to read it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

QUOTE, LINE_END, RETURN = ord('"'), ord("\n"), ord("\r")


def count(data: bytes, byte: int, stop: int | None = None) -> int:
    """How often a byte occurs before offset ``stop``."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8)[:stop] == byte))


class Records:
    """Bytes that begin at a record, and offsets in them.

    Attributes:
        data: the bytes.
        quoted: whether quotes protect separators and line ends.
    """

    def __init__(self, data: bytes, quoted: bool) -> None:
        self.data, self.quoted = data, quoted
        self._view = np.frombuffer(data, dtype=np.uint8)

    @cached_property
    def quotes(self) -> np.ndarray:
        """Offsets of quotes; none where they protect nothing."""
        if not self.quoted or b'"' not in self.data:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self._view == QUOTE)

    @cached_property
    def ends(self) -> np.ndarray:
        """Offsets of the line ends that end a record."""
        return self.outside(LINE_END)

    def outside(self, byte: int) -> np.ndarray:
        """Offsets at which a byte stands outside quotes."""
        places = np.flatnonzero(self._view == byte)
        if len(self.quotes):
            places = places[np.searchsorted(self.quotes, places) % 2 == 0]
        return places

    def offence(self, separator: str) -> tuple[int, str] | None:
        """Offset of the first quote that RFC 4180 does not allow there, and what is wrong with it.

        The last quote of an odd number opens a cell that is not closed: that is no offence here.
        """
        opening, closing = self.quotes[::2], self.quotes[1::2]
        if not len(opening):
            return None
        bounds = np.zeros(256, bool)
        bounds[[ord(separator), LINE_END, QUOTE]] = True
        bad_open = opening[~bounds[self._before(opening)]]
        after = self._beside(closing, 1)
        good = bounds[after]
        if (returns := after == RETURN).any():
            good |= returns & (self._beside(closing, 2) == LINE_END)
        bad_close = closing[~good]
        found = [(int(bad[0]), k) for k, bad in enumerate((bad_open, bad_close)) if len(bad)]
        if not found:
            return None
        place, k = min(found)
        return place, self._reason(place, closes=k == 1)

    @property
    def starts(self) -> np.ndarray:
        """Offsets of the quotes with which a cell begins, in text without :meth:`offence`."""
        opening = self.quotes[::2]
        return opening[self._before(opening) != QUOTE]

    def _before(self, places: np.ndarray) -> np.ndarray:
        return np.where(places > 0, self._view[places - 1], LINE_END)

    def _beside(self, places: np.ndarray, step: int) -> np.ndarray:
        beside = places + step
        return np.where(beside < len(self._view), self._view.take(beside, mode="clip"), LINE_END)

    def _reason(self, place: int, closes: bool) -> str:
        text = self.data[place - 1 : place] if place else b""
        escaped = "; a backslash does not escape it" if text == b"\\" else ""
        if not closes:
            return f'a quote (") stands inside a cell that does not begin with one{escaped}'
        start = int(self.starts[np.searchsorted(self.starts, place) - 1])
        back = self.data.count(b"\n", start, place)
        cell = f" (of the cell that begins {back:,} line{'s'[: back > 1]} before)" if back else ""
        next_one = self.data[place + 1 : place + 5].decode(errors="replace")[:1]
        return f'a quote ("){cell} is followed by {next_one!r}, neither a separator nor the end of the line{escaped}'

    def lone_return(self) -> int | None:
        """Offset of the first carriage return outside quotes that no line feed follows."""
        if b"\r" not in self.data:
            return None
        returns = np.flatnonzero(self._view == RETURN)
        alone = returns[self._beside(returns, 1) != LINE_END]
        if len(alone) and len(self.quotes):
            alone = alone[np.searchsorted(self.quotes, alone) % 2 == 0]
        return int(alone[0]) if len(alone) else None


def last_end(data: bytes, quoted: bool) -> int:
    """Offset of the last line end outside quotes, -1 if there is none; ``data`` begins at a record.

    Only quotes are counted, and only the last quoted cells are looked at: this runs in one thread for all.
    """
    end = data.rfind(b"\n")
    inside = quoted and end >= 0 and b'"' in data and count(data, QUOTE, end) % 2 == 1
    while inside and end >= 0:
        opening = data.rfind(b'"', 0, end)
        before = data.rfind(b"\n", 0, opening)
        inside = data.count(b'"', max(before, 0), end) % 2 == 0
        end = before
    return end
