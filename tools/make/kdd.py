"""Write made-up logs in the form of KDD Cup 2012 track 2: training.txt and userid_profile.txt.

    python tools/make/kdd.py --out runs/kdd_like --rows 300000
    python tools/make/kdd.py --out runs/kdd_like_full           # the 149,639,105 rows and 23,669,283 profiles, 10 GB
    python launch/prepare.py --format kdd2012 --input runs/kdd_like --out runs/data/kdd_like
    cp runs/kdd_like/truth.json runs/data/kdd_like              # the report then shows found width over planted rank

Row n depends on --seed, --users and n alone, the profile of a user on --seed and the user's id. Ids are drawn with a
frequency proportional to 1 / (rank + offset), each field by itself; the number of ids of a field is that of the real
data, the number of users goes with the rows. Every fifth row has nobody (user 0), a user in thirty-two no profile.

What is planted: an ad and an advertiser shift the logit of a click by themselves, and so do depth and position. Pairs
of fields interact: a value's latent vector is r signs, a pair of rank r adds ``s / sqrt(r) * sum_k a_k(x) b_k(y)`` to
the logit, an inner product of variance ``s ** 2`` over the values. Gender and age take part where the user has a
profile. A row of n impressions has a binomial number of clicks, so `impression` tells as well. truth.json says all
this and is written last; files have a name ending in .partial until all are whole. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.data.formats.kdd2012 import COLUMNS, LARGEST_USER
from embsearch_dist.data.hashing import GOLDEN, mix
from embsearch_dist.data.prepare.progress import Progress
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from tools.make.criteo import whole_files

TRAINING, PROFILES, TRUTH = "training.txt", "userid_profile.txt", "truth.json"
REFERENCE_ROWS, REFERENCE_USERS = 149_639_105, 24_432_805
MOST_ROWS = 1 << 40
CHUNK_ROWS = 65_536
BYTES_PER_ROW, BYTES_PER_USER = 72, 13
SAMPLE_ROWS = 200_000

# Share of the rows that have a click, of the rows without a user, and of the users without a profile.
BASE_RATE, NOBODY, UNTOLD = 0.045, 0.2, 1 / 32
MOST_IMPRESSIONS, AGAIN = 50, 0.15  # an impression is followed by another with probability AGAIN
GENDERS, AGES, DEPTHS = (0.03, 0.52, 0.45), (0.08, 0.17, 0.3, 0.2, 0.17, 0.08), (0.25, 0.35, 0.4)
POSITION_SLOPE, DEPTH_SLOPE = -0.5, 0.15


@dataclass(frozen=True)
class Category:
    """A field of ids.

    Attributes:
        name: of its column.
        values: ids there are; 0: as many as there are users.
        offset: of the popularity, in ids; the larger, the flatter.
        main: variance of the field's own effect on the logit.
    """

    name: str
    values: int
    offset: float
    main: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two fields that interact: ``rank`` directions, ``variance`` of their part of the logit."""

    left: str
    right: str
    rank: int
    variance: float


# Numbers of ids as NASRec counts them in the real file (nasrec/utils/config.py), without its row for missing ones.
CATEGORIES = (
    Category("display_url", 26_273, 2),
    Category("ad_id", 641_707, 5, main=0.15),
    Category("advertiser_id", 14_847, 5, main=0.15),
    Category("query_id", 24_122_076, 50),
    Category("keyword_id", 1_188_089, 2),
    Category("title_id", 3_735_796, 2),
    Category("description_id", 2_934_101, 5),
    Category("user_id", 0, 2000),
)
PAIRS = (
    Pair("keyword_id", "title_id", 8, 0.35),
    Pair("age", "advertiser_id", 2, 0.3),
    Pair("gender", "display_url", 1, 0.25),
)
# Signs of the few genders and ages, by bit: drawn, those of all genders would be alike under one seed in four.
PATTERNS = {"gender": np.array([0, 0, 1], np.uint64), "age": np.array([0, 0, 1, 3, 2, 0, 1], np.uint64)}
RANKS = {c.name: int(c.main > 0) for c in CATEGORIES} | {"gender": 0, "age": 0}
RANKS |= {name: p.rank for p in PAIRS for name in (p.left, p.right)}
RANKS |= dict.fromkeys(("impression", "depth", "position"), 1)
Columns = dict[str, np.ndarray]


class KddLike:
    """The click model of a seed: draws rows and profiles by number, knows their true probability.

    Args:
        seed: another seed plants other effects.
        users: ids of users are 1 to ``users``.

    Raises:
        UserError: the seed is negative.
    """

    def __init__(self, seed: int, users: int) -> None:
        if seed < 0:
            raise UserError(f"--seed must be at least 0, got {seed}. Give another")
        self.users = users
        names = [
            *(c.name for c in CATEGORIES),
            "gender",
            "age",
            "depth",
            "position",
            "impression",
            "click",
            "told",
            "nobody",
        ]
        keys = np.random.SeedSequence([seed, 12]).generate_state(2 * len(names), np.uint64)
        self._cell, self._latent = dict(zip(names, keys)), dict(zip(names, keys[len(names) :]))
        self.intercept = 0.0
        self.intercept = self._calibrated()

    def profiles(self, user: np.ndarray) -> tuple[np.ndarray, Columns]:
        """Whether the users (``[N]`` uint64 ids) have a profile, and gender and age as they would be in it."""
        told = (self._bits("told", user) >= np.uint64(UNTOLD * 2**64)) & (user > 0)
        shares = {"gender": GENDERS, "age": AGES}
        drawn = {name: _one_of(self._bits(name, user), share) for name, share in shares.items()}
        return told, {"gender": drawn["gender"], "age": drawn["age"] + 1}

    def draw(self, rows: np.ndarray) -> tuple[Columns, np.ndarray]:
        """The columns of the rows of these numbers (``[N]`` uint64), and ``[N]`` float64 the probability of a click.

        The probability is that of at least one click in all impressions of a row.
        """
        index = {c.name: self._index(c, self._bits(c.name, rows)) for c in CATEGORIES}
        nobody = self._bits("nobody", rows) < np.uint64(NOBODY * 2**64)
        # Multiplying by a prime mod the number of users is one-to-one: the first ids are not the most frequent.
        index["user_id"] = np.where(nobody, 0, index["user_id"] * np.uint64(2_654_435_761) % np.uint64(self.users) + 1)
        columns = index | {"display_url": mix(index["display_url"] + self._latent["told"])}
        columns["depth"] = _one_of(self._bits("depth", rows), DEPTHS) + 1
        columns["position"] = (_uniform(self._bits("position", rows)) * columns["depth"]).astype(np.int64) + 1
        again = np.log1p(-_uniform(self._bits("impression", rows))) / np.log(AGAIN)
        columns["impression"] = np.minimum(1 + again.astype(np.int64), MOST_IMPRESSIONS)
        p = expit(self._logit(index, columns))
        columns["click"] = np.zeros(len(rows), np.int64)
        left, number = np.arange(len(rows)), 0
        while len(left):
            hit = _uniform(self._bits("click", rows[left] + np.uint64(number << 40))) < p[left]
            columns["click"][left[hit]] += 1
            number += 1
            left = left[columns["impression"][left] > number]
        return {name: columns[name] for name in COLUMNS}, 1 - (1 - p) ** columns["impression"]

    def _logit(self, index: Columns, columns: Columns) -> np.ndarray:
        logit = np.full(len(columns["depth"]), self.intercept)
        logit += POSITION_SLOPE * (columns["position"] - 1) + DEPTH_SLOPE * (columns["depth"] - 1)
        told, profile = self.profiles(index["user_id"])
        values = index | profile
        for c in CATEGORIES:
            if c.main:
                # 16 signs summed: nearly normal. The first 32 bits are for the interactions.
                ones = np.bitwise_count(self._signs(c.name, values) >> np.uint64(48))
                logit += (ones - 8.0) * (c.main / 4) ** 0.5
        for p in PAIRS:
            unlike = self._signs(p.left, values) ^ self._signs(p.right, values)
            product = p.rank - 2.0 * np.bitwise_count(unlike & np.uint64(2**p.rank - 1))
            logit += product * (p.variance / p.rank) ** 0.5 * (told if p.left in profile else 1)
        return logit

    def _signs(self, name: str, values: Columns) -> np.ndarray:
        if name in PATTERNS:
            return PATTERNS[name][values[name]]
        return mix(values[name] * GOLDEN + self._latent[name])

    def _bits(self, name: str, number: np.ndarray) -> np.ndarray:
        return mix((number + np.uint64(1)) * GOLDEN + self._cell[name])

    def _index(self, c: Category, bits: np.ndarray) -> np.ndarray:
        """``[N]`` uint64 ids from 0, with probability proportional to about 1 / (id + offset)."""
        n = c.values or self.users
        x = np.exp(_uniform(bits) * np.log1p(n / c.offset)) * c.offset - c.offset
        return np.clip(x, 0, n - 1).astype(np.uint64)

    def _calibrated(self) -> float:
        """The intercept for ``BASE_RATE``, rounded so that the last bits of a sum cannot matter."""
        columns, p = self.draw(np.arange(CHUNK_ROWS, dtype=np.uint64))
        n = columns["impression"]
        one = 1 - (1 - p) ** (1 / n)
        logit, low, high = np.log(one / (1 - one)), -10.0, 10.0
        for _ in range(30):
            middle = (low + high) / 2
            rate = (1 - (1 - expit(logit + middle)) ** n).mean()
            low, high = (middle, high) if rate < BASE_RATE else (low, middle)
        return round(low, 4)

    def bayes_auc(self, rows: int) -> float:
        """AUC that the true probabilities of ``rows`` rows reach, in expectation over the clicks; from a sample."""
        n = min(rows, SAMPLE_ROWS)
        number = np.arange(n, dtype=np.uint64) * np.uint64(rows) // np.uint64(n)
        p = np.sort(np.concatenate([self.draw(number[i : i + CHUNK_ROWS])[1] for i in range(0, n, CHUNK_ROWS)]))
        below = np.cumsum(1 - p) - (1 - p) / 2
        return float((p * below).sum() / (p.sum() * (1 - p).sum()))


def _uniform(bits: np.ndarray) -> np.ndarray:
    return (bits >> np.uint64(11)) * 2.0**-53


def _one_of(bits: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """``[N]`` int64 from 0, each with its share."""
    return np.searchsorted(np.cumsum(shares[:-1]), _uniform(bits), side="right")


def _lines(columns: Columns) -> bytes:
    text = io.BytesIO()
    pl.DataFrame(columns).write_csv(text, include_header=False, separator="\t")
    return text.getvalue()


def training_text(model: KddLike, start: int, stop: int) -> tuple[bytes, int]:
    """Rows ``start`` to ``stop`` of training.txt, and how many of them have a click."""
    columns, _ = model.draw(np.arange(start, stop, dtype=np.uint64))
    return _lines(columns), int((columns["click"] > 0).sum())


def profile_text(model: KddLike, start: int, stop: int) -> tuple[bytes, int]:
    """The lines of userid_profile.txt for users ``start`` to ``stop``, and how many they are."""
    user = np.arange(start, stop, dtype=np.uint64)
    told, profile = model.profiles(user)
    return _lines({"user_id": user[told]} | {name: x[told] for name, x in profile.items()}), int(told.sum())


def make(
    out: Path, rows: int = REFERENCE_ROWS, *, users: int | None = None, seed: int = 0, quiet: bool = False
) -> list[Path]:
    """Write both files and ``truth.json`` into directory ``out``; gives the two.

    Raises:
        UserError: impossible numbers, something is there already, or the disk is full or read-only.
    """
    if users is None:
        users = min(max(round(rows * REFERENCE_USERS / REFERENCE_ROWS), 1), LARGEST_USER)
    for option, value, most in (("rows", rows, MOST_ROWS), ("users", users, LARGEST_USER)):
        if not 1 <= value <= most:
            raise UserError(f"--{option} must be from 1 to {most:,}, got {value}. Give another")
    files, truth = [out / TRAINING, out / PROFILES], out / TRUTH
    model = KddLike(seed, users)
    auc = model.bayes_auc(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        need, free = rows * BYTES_PER_ROW + users * BYTES_PER_USER, shutil.disk_usage(out).free
        if need > free:
            raise UserError(f"{rows:,} rows take {need / 1e9:.1f} GB, {free / 1e9:.1f} are free. Give fewer --rows")
        with whole_files(files, truth) as (training, profiles), Progress("write", rows + users, "lines", quiet) as bar:
            clicked = known = 0
            for start, stop in _ranges(1, users + 1):
                data, n = profile_text(model, start, stop)
                profiles.write(data)
                known += n
                bar.add(stop - start)
            for start, stop in _ranges(0, rows):
                data, n = training_text(model, start, stop)
                training.write(data)
                clicked += n
                bar.add(stop - start)
    except OSError as e:
        raise UserError(f"{e.filename or out}: {e.strerror or e}. Check the disk and its permissions") from e
    body = {"rank": RANKS, "bayes_auc": auc, "bayes_auc_rows": min(rows, SAMPLE_ROWS), "base_rate": clicked / rows}
    body |= {"rows": rows, "users": users, "profiles": known, "seed": seed, "files": [f.name for f in files]}
    body |= {"categories": [asdict(c) for c in CATEGORIES], "pairs": [asdict(p) for p in PAIRS]}
    write_json(truth, body)
    return files


def _ranges(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, CHUNK_ROWS):
        yield first, min(first + CHUNK_ROWS, stop)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    parser.add_argument("--rows", type=int, default=REFERENCE_ROWS, metavar="N", help="default %(default)s")
    parser.add_argument("--users", type=int, metavar="N", help="default: as many to a row as in the real data")
    parser.add_argument("--seed", type=int, default=0, help="another seed plants other effects (default 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        files = make(**vars(args))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; no data file was left", file=sys.stderr)
        return 130
    if not args.quiet:
        seconds, gigabytes = time.monotonic() - began, sum(f.stat().st_size for f in files) / 1e9
        speed = f"{seconds:.1f} s ({args.rows / seconds:,.0f} rows/s)"
        print(f"{args.out}: {args.rows:,} rows, {gigabytes:.2f} GB in {speed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
