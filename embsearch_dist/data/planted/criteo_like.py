"""Raw click logs in the form of Criteo's train.txt, of any size, with a planted signal and no download.

Everything about row n follows from the seed and n by hashing, so any range of rows can be made alone, in
any order and by any number of processes, and the bytes are the same. (Another numpy or kind of processor may
round exp and log otherwise, which moves a rare cell of the long tails.) Nothing is stored per value: a value
is an index, its name a bijective hash of the index, its latent vector another hash of it.

*Popularity.* Each field has slots, drawn with a frequency proportional to ``(slot + offset) ** -exponent``
(Zipf-Mandelbrot). A slot is held by one value for a while and then by a new one, never seen before: over
``REFERENCE_ROWS`` rows half of the slots of every field with many values change hands, each at a time of
its own and not at once. Together with a logit that rises, falls and has seven days, this is the drift:
time is ``n / REFERENCE_ROWS``, however many rows are asked for.

*Signal.* Fields come in pairs. A value's latent vector is r signs, and a pair of rank r adds
``s / sqrt(r) * sum_k a_k(x) b_k(y)`` to the logit: an inner product of sign vectors, of variance ``s ** 2``
over the values (rows weigh them by popularity). Some fields and numbers also shift the logit by themselves.
A missing cell adds nothing. :mod:`embsearch_dist.data.planted.criteo_crosses` has another signal for the same cells.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from embsearch_dist.data.hashing import GOLDEN, mix
from embsearch_dist.data.planted import criteo_crosses as crosses
from embsearch_dist.errors import UserError

# Rows of the Kaggle file: at this row number drift has gone once through.
REFERENCE_ROWS = 45_840_617
# Value indices are 32 bits wide; the field with most slots reaches their end at some 50 times this.
LAST_ROW = 20 * REFERENCE_ROWS
BASE_RATE = 0.256
BLOCK_ROWS = 16_384

# Share of the slots that get a new value over the reference rows, and the share of one value's time during
# which both values occur. Fields of fewer values are fixed, as a browser's or a country's would be.
TURNOVER, HANDOVER, FEWEST_TO_TURN = 0.5, 0.05, 1000
SLOW_DRIFT, DAILY_DRIFT, DAYS = 0.10, 0.06, 7


@dataclass(frozen=True)
class Number:
    """An integer column.

    Attributes:
        name: I1 to I13.
        missing: share of blank cells.
        zero: share of zeros among the cells that are not blank.
        minus: shares of -1, -2, -3 among them.
        mean, std: of the logarithm of the rest, normal and cut at 3 std, before it is rounded to 1 or more.
        slope: what one ``std`` more of ``log(1 + x)`` adds to the logit; 0: no signal.
    """

    name: str
    missing: float
    zero: float
    mean: float
    std: float
    minus: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slope: float = 0.0


@dataclass(frozen=True)
class Category:
    """A categorical column.

    Attributes:
        name: C1 to C26.
        published: distinct values in the Kaggle file.
        exponent, offset: of the popularity (see the module).
        missing: share of blank cells.
        slots: given for long tails, of which even 45.8M rows see a part, so that they see about ``published``
            values; 0: as many as have ``published`` holders over the reference rows.
        main: variance of the field's own effect on the logit.
    """

    name: str
    published: int
    exponent: float
    offset: float
    missing: float = 0.0
    slots: int = 0
    main: float = 0.0

    @property
    def turns(self) -> bool:
        """Whether slots change hands."""
        return self.published >= FEWEST_TO_TURN

    @property
    def alive(self) -> int:
        """Slots, that is: values alive at one time."""
        return self.slots or int(self.published / (1 + (TURNOVER + HANDOVER) * self.turns))


@dataclass(frozen=True)
class Pair:
    """Two categorical fields that interact: ``rank`` directions, ``variance`` of their part of the logit."""

    left: str
    right: str
    rank: int
    variance: float


# Shares and log-magnitudes as in the first 10,000 rows of the Kaggle file, rounded. Columns of the same
# missing share go missing together there, and here.
NUMBERS = (
    Number("I1", 0.45, 0.475, 1.15, 1.07),
    Number("I2", 0.0, 0.18, 2.7, 2.2, minus=(0.095, 0.003, 0.0002), slope=0.2),
    Number("I3", 0.20, 0.01, 2.0, 1.45),
    Number("I4", 0.198, 0.07, 1.6, 1.07),
    Number("I5", 0.049, 0.02, 7.3, 2.8, minus=(0.0002, 0.0, 0.0)),
    Number("I6", 0.25, 0.06, 3.75, 1.7, slope=-0.35),
    Number("I7", 0.049, 0.25, 1.8, 1.4, slope=0.35),
    Number("I8", 0.001, 0.12, 2.15, 1.15, minus=(0.0002, 0.0, 0.0)),
    Number("I9", 0.049, 0.03, 3.6, 1.7),
    Number("I10", 0.45, 0.50, 0.1, 0.3),
    Number("I11", 0.049, 0.265, 0.7, 0.85, minus=(0.0002, 0.0, 0.0), slope=0.3),
    Number("I12", 0.77, 0.735, 0.65, 0.9, minus=(0.0002, 0.0, 0.0)),
    Number("I13", 0.198, 0.06, 1.75, 1.2, slope=-0.25),
)
CATEGORIES = (
    Category("C1", 1_460, 1.95, 1.0),
    Category("C2", 583, 1.55, 4.0),
    Category("C3", 10_131_227, 1.02, 1.0, 0.036, slots=154_900_000),
    Category("C4", 2_202_608, 1.05, 0.7, 0.036, slots=2_160_000),
    Category("C5", 305, 2.55, 1.0),
    Category("C6", 24, 8.0, 9.0, 0.133),
    Category("C7", 12_517, 0.9, 10.0, main=0.15),
    Category("C8", 633, 2.35, 1.0),
    Category("C9", 3, 4.0, 1.0),
    Category("C10", 93_145, 1.1, 0.5),
    Category("C11", 5_683, 0.85, 4.0),
    Category("C12", 8_351_593, 1.02, 1.0, 0.036, slots=52_900_000),
    Category("C13", 3_194, 0.85, 4.0, main=0.15),
    Category("C14", 27, 5.0, 8.0, main=0.1),
    Category("C15", 14_992, 1.1, 8.0),
    Category("C16", 5_461_306, 1.05, 1.0, 0.036, slots=18_000_000),
    Category("C17", 10, 1.55, 1.0, main=0.15),
    Category("C18", 5_652, 1.35, 8.0),
    Category("C19", 2_173, 1.3, 0.3, 0.45),
    Category("C20", 4, 0.95, 2.0, 0.45),
    Category("C21", 7_046_547, 1.05, 1.0, 0.036, slots=55_300_000),
    Category("C22", 18, 8.0, 9.0, 0.82),
    Category("C23", 15, 2.35, 2.0),
    Category("C24", 286_181, 1.2, 2.0, 0.036, slots=202_000, main=0.15),
    Category("C25", 105, 5.0, 8.0, 0.45),
    Category("C26", 142_572, 1.1, 1.5, 0.45),
)
# Ranks say nothing about the number of values: 0, 1, 2 and 4 have fields of few values and of 100,000s. High
# ranks sit where the head is flat; where one value has half of the rows, most directions are never seen.
PAIRS = (
    Pair("C2", "C15", 16, 0.35),
    Pair("C11", "C13", 8, 0.35),
    Pair("C17", "C18", 4, 0.3),
    Pair("C1", "C4", 4, 0.2),
    Pair("C7", "C23", 2, 0.2),
    Pair("C24", "C25", 2, 0.15),
    Pair("C14", "C26", 2, 0.15),
    Pair("C6", "C19", 1, 0.1),
    Pair("C8", "C21", 1, 0.1),
)
RANKS = {c.name: int(c.slope != 0) for c in NUMBERS} | {c.name: 0 for c in CATEGORIES}
RANKS |= {name: p.rank for p in PAIRS for name in (p.left, p.right)}

_TURN = 0.6180339887498949  # multiples of it fill [0, 1) evenly: when each slot changes hands
Columns = dict[str, np.ndarray]


def value_names(field: int, index: np.ndarray) -> np.ndarray:
    """``[N]`` value indices of categorical field ``field`` -> the ``[N]`` uint32 whose eight hex digits name them.

    Adding, multiplying by an odd number and xor with a right shift can all be undone, so no two of the
    2^32 indices of a field share a name (MurmurHash3's finaliser).
    """
    z = index.astype(np.uint32) + np.uint32((field + 1) * 0x9E3779B9 & 0xFFFFFFFF)
    z ^= z >> np.uint32(16)
    z *= np.uint32(0x85EBCA6B)
    z ^= z >> np.uint32(13)
    z *= np.uint32(0xC2B2AE35)
    z ^= z >> np.uint32(16)
    return z


@dataclass(frozen=True)
class Drawn:
    """Rows as arrays.

    Attributes:
        label: ``[N]`` bool.
        numbers: column -> ``[N]`` int64.
        values: column -> ``[N]`` uint32 value indices.
        missing: column -> ``[N]`` bool, for columns with blanks; the other two hold anything there.
        logit: ``[N]`` float64, the true one.
    """

    label: np.ndarray
    numbers: Columns
    values: Columns
    missing: Columns
    logit: np.ndarray


class CriteoLike:
    """The click model of a seed: draws rows by number, writes them as text, knows their true probability.

    Raises:
        UserError: the seed is negative, or there is no such click model.
    """

    def __init__(self, seed: int, clicks: str = "pairs") -> None:
        if seed < 0:
            raise UserError(f"--seed must be at least 0, got {seed}. Give another")
        if clicks not in crosses.CLICKS:
            raise UserError(f"--clicks {clicks!r} is none of {', '.join(crosses.CLICKS)}")
        self.clicks = clicks
        self.pairs = (
            PAIRS if clicks == "pairs" else tuple(replace(p, variance=p.variance * crosses.PAIR_SHARE) for p in PAIRS)
        )
        columns: tuple[Number | Category, ...] = (*NUMBERS, *CATEGORIES)
        keys = iter(np.random.SeedSequence([seed, 45]).generate_state(3 * len(columns) + 1, np.uint64))
        self._cell = {c.name: next(keys) for c in columns}
        self._latent = {c.name: next(keys) for c in columns}
        self._label = next(keys)
        # Blanks of columns with signal move the logit, so columns without must not share them.
        self._group = {c.name: (c.missing, RANKS[c.name] > 0) for c in columns if c.missing}
        self._blank = {group: next(keys) for group in sorted(set(self._group.values()))}
        self.intercept = 0.0
        self.intercept = self._calibrated()

    def draw(self, rows: np.ndarray) -> Drawn:
        """The rows of these numbers (``[N]`` uint64, in any order)."""
        base = (rows + np.uint64(1)) * GOLDEN
        time = rows / REFERENCE_ROWS
        blanks = {group: mix(base + key) < np.uint64(int(group[0] * 2**64)) for group, key in self._blank.items()}
        missing = {name: blanks[group] for name, group in self._group.items()}
        numbers = {c.name: _number(c, mix(base + self._cell[c.name])) for c in NUMBERS}
        values = {c.name: _value_index(c, mix(base + self._cell[c.name]), time) for c in CATEGORIES}
        logit = self._logit(numbers, values, missing, time)
        uniform = (mix(base + self._label) >> np.uint64(11)) * 2.0**-53
        return Drawn(uniform < expit(logit), numbers, values, missing, logit)

    def _logit(self, numbers: Columns, values: Columns, missing: Columns, time: np.ndarray) -> np.ndarray:
        logit = np.sin(np.pi * time) * SLOW_DRIFT
        logit += np.sin(2 * np.pi * DAYS * time) * DAILY_DRIFT
        logit += self.intercept
        for n in NUMBERS:
            if n.slope:
                # Of the number as written, so that all of the effect can be learned from the file.
                scaled = (np.log1p(np.maximum(numbers[n.name], 0)) - n.mean) * (n.slope / n.std)
                logit += _present(scaled, missing.get(n.name))
        bits = {}
        for c in CATEGORIES:
            if RANKS[c.name]:
                bits[c.name] = mix(values[c.name] * GOLDEN + self._latent[c.name])
            if c.main:
                # 16 further signs summed: nearly normal. The first 32 bits are for the interactions.
                ones = np.bitwise_count(bits[c.name] >> np.uint64(48))
                logit += _present((ones - 8.0) * (c.main / 4) ** 0.5, missing.get(c.name))
        for p in self.pairs:
            unlike = np.bitwise_count((bits[p.left] ^ bits[p.right]) & np.uint64(2**p.rank - 1))
            product = (p.rank - 2.0 * unlike) * (p.variance / p.rank) ** 0.5
            logit += _present(_present(product, missing.get(p.left)), missing.get(p.right))
        if self.clicks == "crosses":
            logit += crosses.parts(bits, missing)
        return logit

    def _logits(self, start: int, stop: int, n: int) -> np.ndarray:
        """``[n]`` logits of rows evenly spread over ``start`` to ``stop``."""
        rows = np.uint64(start) + np.arange(n, dtype=np.uint64) * np.uint64(stop - start) // np.uint64(n)
        return np.concatenate([self.draw(rows[i : i + BLOCK_ROWS]).logit for i in range(0, n, BLOCK_ROWS)])

    def _calibrated(self) -> float:
        """The intercept for ``BASE_RATE`` over the reference rows, from rows spread evenly over them."""
        logit = self._logits(0, REFERENCE_ROWS, 4 * BLOCK_ROWS)
        low, high = -10.0, 10.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if expit(logit + middle).mean() < BASE_RATE else (low, middle)
        # Rounded, so that the last bits of a sum, which differ between machines, cannot matter.
        return round(low, 4)

    def text(self, start: int, stop: int, every: int = 1) -> tuple[bytes, int]:
        """Each ``every``-th row from ``start`` to ``stop`` as Criteo writes them, and the clicks among them."""
        pieces, clicks = [], 0
        for first in range(start, stop, BLOCK_ROWS * every):
            drawn = self.draw(np.arange(first, min(first + BLOCK_ROWS * every, stop), every, dtype=np.uint64))
            pieces.append(_render(drawn))
            clicks += int(drawn.label.sum())
        return b"".join(pieces), clicks

    def bayes_auc(self, start: int = 0, stop: int = REFERENCE_ROWS, sample: int = 200_000) -> float:
        """AUC that the true probabilities reach on rows ``start`` to ``stop``, in expectation over the labels.

        From at most ``sample`` rows, evenly spread.
        """
        p = np.sort(expit(self._logits(start, stop, min(sample, stop - start))))
        below = np.cumsum(1 - p) - (1 - p) / 2
        return float((p * below).sum() / (p.sum() * (1 - p).sum()))


@functools.lru_cache(maxsize=2)
def model(seed: int, clicks: str = "pairs") -> CriteoLike:
    """The click model of a seed, kept: making one calibrates it on 65,536 rows."""
    return CriteoLike(seed, clicks)


def text(seed: int, start: int, stop: int, clicks: str = "pairs", every: int = 1) -> tuple[bytes, int]:
    """:meth:`CriteoLike.text` for a pool of processes, which takes only functions of a module."""
    return model(seed, clicks).text(start, stop, every)


def _present(x: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
    """``x``, in place, with zeros where the cell is missing."""
    if missing is not None:
        x[missing] = 0
    return x


def _number(c: Number, bits: np.ndarray) -> np.ndarray:
    """``[N]`` integers from 64 random bits each: 48 for the magnitude, 16 for which of -3 ... 0 it is, if any."""
    low = np.uint64(0xFFFF)
    # Three uniforms summed have variance 3/12: twice their distance from the mean is nearly standard normal.
    total = (bits >> np.uint64(48)) + ((bits >> np.uint64(32)) & low) + ((bits >> np.uint64(16)) & low)
    x = np.exp((total * 2.0**-15 - 3.0) * c.std + c.mean)
    number = np.rint(np.clip(x, 1, 99_999_999)).astype(np.int64)
    kind, edge = bits & low, c.zero
    number[kind < np.uint64(edge * 65536)] = 0
    for value, share in zip((-1, -2, -3), c.minus, strict=True):
        if share:
            begin, edge = edge, edge + share
            number[(kind >= np.uint64(begin * 65536)) & (kind < np.uint64(edge * 65536))] = value
    return number


def _value_index(c: Category, bits: np.ndarray, time: np.ndarray) -> np.ndarray:
    """``[N]`` value indices from 64 random bits each: 53 say which slot, 11 who holds it during a handover."""
    power = 1 - c.exponent
    first, last = c.offset**power, (c.alive + c.offset) ** power
    # The inverse of the distribution function. exp(log) is several times faster than numpy's power.
    slot = (bits >> np.uint64(11)) * ((last - first) * 2.0**-53) + first
    slot = np.clip(np.floor(np.exp(np.log(slot) * (1 / power)) - c.offset), 0, c.alive - 1)
    if c.turns:
        phase = slot * _TURN
        turned = phase - np.floor(phase) + time * TURNOVER + (bits & np.uint64(0x7FF)) * (HANDOVER / 2048)
        # The k-th holder of slot s has the index s + (k - 1) * slots.
        slot += np.floor(turned) * c.alive
    return slot.astype(np.uint32)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four characters as one uint32: of hex digits 0000 to ffff, of decimals 0000 to 9999, and of -3 to 9999
    without leading zeros (NUL instead)."""
    places = np.arange(65536)[:, None] >> np.array([12, 8, 4, 0]) & 15
    hexadecimal = np.frombuffer(b"0123456789abcdef", np.uint8)[places]
    places = np.arange(10_000)[:, None] // np.array([1000, 100, 10, 1])
    padded = (places % 10 + ord("0")).astype(np.uint8)
    short = np.where((places > 0) | (np.arange(4) == 3), padded, 0).astype(np.uint8)
    minus = np.array([[0, 0, ord("-"), ord("0") + k] for k in (3, 2, 1)], np.uint8)
    short = np.concatenate([minus, short])
    words = [np.ascontiguousarray(t).view(np.uint32)[:, 0] for t in (hexadecimal, padded, short)]
    return words[0], words[1], words[2]


def _render(drawn: Drawn) -> bytes:
    """The rows as text: every cell right-aligned at a fixed place, over NULs that are squeezed out last."""
    hexadecimal, padded, short = _tables()
    wide = {c.name for c in NUMBERS if math.exp(c.mean + 3 * c.std) >= 9_999}
    widths = [1, *(8 if c.name in wide else 4 for c in NUMBERS), *(8 for _ in CATEGORIES)]
    ends = np.cumsum(np.array(widths) + 1)
    line = np.zeros(ends[-1], np.uint8)
    line[ends - 1] = [*(39 * b"\t"), *b"\n"]
    n = len(drawn.label)
    lines = np.tile(line, (n, 1))

    def put(characters: np.ndarray, end: int, missing: np.ndarray | None) -> None:
        np.ndarray((n,), np.uint32, lines, end - 5, (len(line),))[:] = _present(characters, missing)

    lines[:, 0] = drawn.label + np.uint8(ord("0"))
    for c, end in zip(NUMBERS, ends[1:14], strict=True):
        number, missing = drawn.numbers[c.name], drawn.missing.get(c.name)
        if c.name in wide:
            thousands, ones = np.divmod(number, 10_000)
            long = number >= 10_000
            put(np.where(long, short[thousands + 3], np.uint32(0)), end - 4, missing)
            put(np.where(long, padded[ones], short[np.minimum(number, 9_999) + 3]), end, missing)
        else:
            put(short[number + 3], end, missing)
    for i, (category, end) in enumerate(zip(CATEGORIES, ends[14:], strict=True)):
        name, missing = value_names(i, drawn.values[category.name]), drawn.missing.get(category.name)
        put(hexadecimal[name >> np.uint32(16)], end - 4, missing)
        put(hexadecimal[name & np.uint32(0xFFFF)], end, missing)
    return lines.tobytes().translate(None, b"\0")
