"""Click logs with planted widths, so that a search has a right answer.

Fields come in pairs. A pair of rank r adds ``s * sum_k a_k(x) b_k(y) / sqrt(r)`` to the logit, where the r
columns of ``a`` and of ``b`` have mean zero and are orthonormal under the distribution of the values. So
all r directions are equally strong, the pair's part of the logit has variance ``s^2``, carries no main
effect, and no embedding narrower than r holds all of it. Fields of rank 0 never touch the label.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embsearch_dist.data.formats import open_source
from embsearch_dist.data.prepare.pipeline import Options, prepare_into, whole_directory
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.schema import Schema

ROWS = 200_000
CHUNK_ROWS = 100_000
TRUTH = "truth.json"
# Bins of the logit over which the Bayes AUC is summed; far finer than the AUC's own error.
BINS, LOGIT_LIMIT = 1 << 16, 16.0


@dataclass(frozen=True)
class Pair:
    """Two fields that interact: ``rank`` directions, ``variance`` of their part of the logit, and the
    number of values of each (chosen independently of the rank)."""

    rank: int
    values: tuple[int, int]
    variance: float


@dataclass(frozen=True)
class Plan:
    """What is planted.

    Attributes:
        pairs: interacting fields; those of pair ``p`` are called ``p<p>_a`` and ``p<p>_b``.
        idle: numbers of values of the fields that never touch the label.
        main_effects: names of fields with a main effect as well, of variance ``main_variance`` each.
        zipf: the k-th most frequent value has a frequency proportional to ``k ** -zipf``.
        intercept: logit when nothing else speaks.
    """

    pairs: tuple[Pair, ...]
    idle: tuple[int, ...]
    main_effects: tuple[str, ...]
    main_variance: float
    zipf: float
    intercept: float


# Cardinality and rank are decorrelated: every rank has a small and a larger field, rank 0 has the largest.
DEFAULT = Plan(
    pairs=(
        Pair(1, (150, 50), 0.5),
        Pair(2, (40, 120), 0.7),
        Pair(4, (100, 60), 1.0),
        Pair(8, (50, 80), 1.4),
        Pair(16, (70, 40), 2.0),
    ),
    idle=(40, 80, 120, 200),
    main_effects=("p0_a", "p2_b"),
    main_variance=0.05,
    zipf=0.5,
    intercept=-0.8,
)


@dataclass(frozen=True)
class _FieldPlan:
    name: str
    frequency: np.ndarray
    rank: int


class Clicks:
    """The click model of a plan and a seed: draws rows and knows their true probability."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
        self.fields: list[_FieldPlan] = []
        self.tables: list[np.ndarray] = []
        for p, pair in enumerate(plan.pairs):
            sides = []
            for side, n in zip("ab", pair.values, strict=True):
                if n <= pair.rank:
                    raise UserError(f"a field of {n} values cannot have rank {pair.rank}. Give it more values")
                self.fields.append(_FieldPlan(f"p{p}_{side}", zipf(n, plan.zipf, rng), pair.rank))
                sides.append(directions(self.fields[-1].frequency, pair.rank, rng))
            self.tables.append(sides[0] @ sides[1].T * (pair.variance / pair.rank) ** 0.5)
        for i, n in enumerate(plan.idle):
            self.fields.append(_FieldPlan(f"idle{i}", zipf(n, plan.zipf, rng), 0))
        self.main = {}
        for name in plan.main_effects:
            frequency = next(f for f in self.fields if f.name == name).frequency
            self.main[name] = directions(frequency, 1, rng)[:, 0] * plan.main_variance**0.5

    def chunks(self, rows: int) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
        """Frames of at most ``CHUNK_ROWS`` rows (column ``click`` and one per field, value numbers) with the
        true logit of each row, ``[N]`` float64."""
        for i, start in enumerate(range(0, rows, CHUNK_ROWS)):
            n = min(CHUNK_ROWS, rows - start)
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, 1, i]))
            drawn = {}
            for f in self.fields:
                drawn[f.name] = draw(f.frequency, n, rng)
            logit = np.full(n, self.plan.intercept)
            for p, table in enumerate(self.tables):
                logit += table[drawn[f"p{p}_a"], drawn[f"p{p}_b"]]
            for name, effect in self.main.items():
                logit += effect[drawn[name]]
            click = rng.random(n) < 1 / (1 + np.exp(-logit))
            # Fields are mixed so that neighbours in the schema are not the planted pairs.
            order = sorted(drawn, key=lambda name: (name[-1] == "b", name))
            yield pl.DataFrame({"click": click.astype(np.int8)} | {name: drawn[name] for name in order}), logit


def zipf(n: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """``[n]`` frequencies, in no order."""
    weight = np.arange(1, n + 1) ** -exponent
    return rng.permutation(weight / weight.sum())


def draw(frequency: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """``[n]`` int32 value numbers, each drawn with its frequency."""
    edges = np.cumsum(frequency)
    return np.searchsorted(edges / edges[-1], rng.random(n), side="right").astype(np.int32)


def directions(frequency: np.ndarray, rank: int, rng: np.random.Generator) -> np.ndarray:
    """``[n, rank]``: columns of mean zero, orthonormal under ``frequency``."""
    raw = rng.standard_normal((len(frequency), rank))
    raw -= frequency @ raw
    root = np.sqrt(frequency)[:, None]
    return np.linalg.qr(raw * root)[0] / root


class Bayes:
    """AUC and logloss that the true probabilities themselves reach, in expectation over the labels."""

    def __init__(self) -> None:
        self.positive, self.negative = np.zeros(BINS), np.zeros(BINS)
        self.loss, self.rows = 0.0, 0

    def add(self, logit: np.ndarray) -> None:
        p = 1 / (1 + np.exp(-logit))
        where = ((np.clip(logit / LOGIT_LIMIT, -1, 1) + 1) / 2 * (BINS - 1)).astype(np.int64)
        self.positive += np.bincount(where, weights=p, minlength=BINS)
        self.negative += np.bincount(where, weights=1 - p, minlength=BINS)
        self.loss -= float((p * np.log(p) + (1 - p) * np.log1p(-p)).sum())
        self.rows += len(p)

    @property
    def auc(self) -> float:
        below = np.cumsum(self.negative) - self.negative / 2
        return float((self.positive * below).sum() / (self.positive.sum() * self.negative.sum()))

    @property
    def logloss(self) -> float:
        return self.loss / self.rows


def write_raw(source: Path, name: str, frames: Iterable[pl.DataFrame]) -> list[str]:
    """Write frames (column ``click``, then one per field) to ``clicks.csv`` in a new folder, and the YAML source
    file of them beside it; gives the names of the fields."""
    source.parent.mkdir()
    names: list[str] = []
    with source.with_name("clicks.csv").open("wb") as file:
        for frame in frames:
            frame.write_csv(file, include_header=not names)
            names = frame.columns[1:]
    head = [f"name: {name}", "files: [clicks.csv]", "label: click", "fields:"]
    source.write_text("\n".join([*head, *(f"  {n}: categorical" for n in names)]) + "\n")
    return names


def make_synthetic(
    prepared_dir: Path | str, rows: int = ROWS, seed: int = 0, plan: Plan = DEFAULT, **options: Any
) -> Schema:
    """Make click logs with planted widths and prepare them.

    ``prepared_dir`` becomes a prepared data set with two things more: ``raw/`` (clicks.csv and its source
    file, prepared through the ``table`` format like anybody's) and ``truth.json`` (field -> planted rank,
    the Bayes AUC and logloss, the seed, the plan). ``options``: :class:`embsearch_dist.data.prepare.pipeline.Options`.

    Raises:
        UserError: too few rows, a plan that is impossible, or ``prepared_dir`` exists.
    """
    if rows < 100:
        raise UserError(f"--rows must be at least 100, got {rows}. Give more")
    checked = Options(seed=seed, **options)
    clicks = Clicks(plan, seed)
    bayes = Bayes()
    with whole_directory(Path(prepared_dir), checked.overwrite) as partial:

        def frames() -> Iterator[pl.DataFrame]:
            for frame, logit in clicks.chunks(rows):
                bayes.add(logit)
                yield frame

        source = partial / "raw" / "source.yaml"
        names = write_raw(source, "synthetic", frames())
        ranks = {f.name: f.rank for f in clicks.fields}
        truth = {
            "rank": {name: ranks[name] for name in names},
            "bayes_auc": bayes.auc,
            "bayes_logloss": bayes.logloss,
            "rows": rows,
            "seed": seed,
            "plan": asdict(plan),
        }
        write_json(partial / TRUTH, truth)
        return prepare_into(partial, open_source("table", source), checked)
