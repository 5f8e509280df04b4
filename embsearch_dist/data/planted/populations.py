"""Click logs of several hidden populations, so that a search by instances has a right answer.

Every row belongs to a population z that is no column. A few tell-tale fields tell it: each of their values
belongs to one population, and a row draws from the values of its own population with probability ``clarity``.
The click depends, given z, on pairs of fields as in :mod:`embsearch_dist.data.planted.synthetic`, but on each pair with
a rank per population, 0 where it has no effect. The directions of a pair are orthonormal over all populations
together: a pair of ranks (2, 2) has two tables that share no direction, so one model for all rows needs four.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embsearch_dist.data.formats import open_source
from embsearch_dist.data.planted.synthetic import CHUNK_ROWS, TRUTH, Bayes, directions, draw, write_raw, zipf
from embsearch_dist.data.prepare.pipeline import Options, prepare_into, whole_directory
from embsearch_dist.data.prepare.splits import random_split
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.schema import SPLITS, Schema

ROWS = 400_000
POPULATIONS = "populations"
BAYES_OF = (
    "the true P(click | fields, population), over the rows of all populations. from_fields: P(click | fields), the "
    "most that a model can reach, which sees the population only through the tell-tale fields"
)


@dataclass(frozen=True)
class Pair:
    """Two fields that interact: the number of directions in each population (0: none), the number of values of
    each field, and the variance of their part of the logit in each population that has a rank."""

    ranks: tuple[int, ...]
    values: tuple[int, int]
    variance: float


@dataclass(frozen=True)
class Plan:
    """What is planted, in ``len(shares)`` populations.

    Attributes:
        shares: probability of each population.
        intercepts: logit of each population when nothing else speaks.
        tells: numbers of values of the tell-tale fields ``tell<i>``.
        clarity: probability that a tell-tale field shows a value of the row's own population; else it shows one
            of another, each as likely.
        pairs: interacting fields; those of pair ``p`` are called ``p<p>_a`` and ``p<p>_b``.
        idle: numbers of values of the fields that never touch the label and tell nothing.
        main_effects: names of fields of pairs with a main effect as well, of variance ``main_variance``, in the
            populations where the pair has a rank, in each another one.
        zipf: the k-th most frequent value has a frequency proportional to ``k ** -zipf``; of tell-tale fields
            among the values of one population.
    """

    shares: tuple[float, ...]
    intercepts: tuple[float, ...]
    tells: tuple[int, ...]
    clarity: float
    pairs: tuple[Pair, ...]
    idle: tuple[int, ...]
    main_effects: tuple[str, ...]
    main_variance: float
    zipf: float

    @property
    def clarities(self) -> tuple[float, float]:
        """Probability that a tell-tale field shows the row's own population, and any one other."""
        return self.clarity, (1 - self.clarity) / (len(self.shares) - 1)

    def check(self) -> None:
        """Raise ``UserError`` for what cannot be made."""
        k = len(self.shares)
        if not 2 <= k <= 256 or min(self.shares) <= 0 or not math.isclose(sum(self.shares), 1, abs_tol=1e-9):
            raise UserError(f"shares {self.shares} are not those of 2 to 256 populations. Give parts of 1 above 0")
        if len(self.intercepts) != k:
            raise UserError(f"{len(self.intercepts)} intercepts for {k} populations. Give one for each")
        if not 1 / k <= self.clarity <= 1:
            raise UserError(f"clarity {self.clarity:g} is not from 1/{k} (tells nothing) to 1 (tells all). Change it")
        for n in self.tells:
            if n < k:
                raise UserError(f"a tell-tale field of {n} values cannot tell {k} populations. Give it more values")
        for p, pair in enumerate(self.pairs):
            if len(pair.ranks) != k:
                raise UserError(f"pair {p}: {len(pair.ranks)} ranks for {k} populations. Give one for each")
            if min(pair.values) <= sum(pair.ranks):
                raise UserError(
                    f"pair {p}: a field of {min(pair.values)} values cannot have ranks {pair.ranks}, which share no "
                    "direction. Give it more values"
                )
        unknown = sorted(set(self.main_effects) - {f"p{p}_{side}" for p in range(len(self.pairs)) for side in "ab"})
        if unknown:
            raise UserError(f"main effect of {unknown[0]!r}, which is no field of a pair. Name one, e.g. p0_a")


# Each population has pairs the other does not look at. Ranks are low enough for 400,000 rows: a pair of rank 8 in the
# smaller population is below what a factorization machine learns from them.
DEFAULT = Plan(
    shares=(0.55, 0.45),
    intercepts=(-0.6, -1.0),
    tells=(60, 60, 60),
    clarity=0.97,
    pairs=(
        Pair((4, 0), (50, 80), 1.4),
        Pair((2, 0), (40, 120), 1.0),
        Pair((0, 4), (80, 50), 1.4),
        Pair((0, 2), (120, 40), 1.0),
        Pair((2, 2), (60, 100), 1.0),
        Pair((1, 3), (100, 60), 1.0),
    ),
    idle=(40, 120, 200),
    main_effects=("p1_a", "p4_b"),
    main_variance=0.05,
    zipf=0.5,
)


@dataclass(frozen=True)
class _FieldPlan:
    name: str
    frequency: np.ndarray
    ranks: tuple[int, ...]
    owner: np.ndarray | None = None  # of a tell-tale field: the population of each value

    def draw(self, plan: Plan, population: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``[N]`` int32: a value for each row, whose population is given."""
        n, k = len(population), len(plan.shares)
        if self.owner is None:
            return draw(self.frequency, n, rng)
        own, other = rng.random(n) < plan.clarity, (population + rng.integers(1, k, n)) % k
        shown = np.where(own, population, other)
        found = np.empty(n, np.int32)
        for z in range(k):
            rows, values = np.flatnonzero(shown == z), np.flatnonzero(self.owner == z)
            found[rows] = values[draw(self.frequency[values], len(rows), rng)]
        return found


class Clicks:
    """The click model of a plan and a seed: draws rows and knows their populations and true probabilities.

    Attributes:
        fields: of the plan, each with its rank in every population.
        tables: of each pair, one ``[values of a, values of b]`` part of the logit per population.
        main: field -> ``[K, values]`` main effect in each population.

    Raises:
        UserError: an impossible plan.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        plan.check()
        self.plan, self.seed, self.k = plan, seed, len(plan.shares)
        nothing = (0,) * self.k
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
        self.fields: list[_FieldPlan] = []
        self.tables: list[list[np.ndarray]] = []
        for i, n in enumerate(plan.tells):
            owner = np.arange(n) % self.k
            frequency = np.empty(n)
            for z in range(self.k):
                frequency[owner == z] = zipf(int((owner == z).sum()), plan.zipf, rng)
            self.fields.append(_FieldPlan(f"tell{i}", frequency, nothing, owner))
        for p, pair in enumerate(plan.pairs):
            ends = np.cumsum(pair.ranks)[:-1]
            sides = []
            for side, n in zip("ab", pair.values, strict=True):
                self.fields.append(_FieldPlan(f"p{p}_{side}", zipf(n, plan.zipf, rng), pair.ranks))
                every = directions(self.fields[-1].frequency, sum(pair.ranks), rng)
                sides.append(np.split(every, ends, axis=1))
            strength = [(pair.variance / max(rank, 1)) ** 0.5 for rank in pair.ranks]
            self.tables.append([a @ b.T * s for a, b, s in zip(*sides, strength, strict=True)])
        for i, n in enumerate(plan.idle):
            self.fields.append(_FieldPlan(f"idle{i}", zipf(n, plan.zipf, rng), nothing))
        self.main: dict[str, np.ndarray] = {}
        for name in plan.main_effects:
            field = next(f for f in self.fields if f.name == name)
            active = np.array([rank > 0 for rank in field.ranks])
            effects = [directions(field.frequency, 1, rng)[:, 0] for _ in range(self.k)]
            self.main[name] = np.stack(effects) * plan.main_variance**0.5 * active[:, None]

    def chunks(self, rows: int) -> Iterator[tuple[pl.DataFrame, np.ndarray, np.ndarray]]:
        """Frames of at most ``CHUNK_ROWS`` rows (column ``click`` and one per field, value numbers), ``[N]`` uint8
        population of each row and ``[K, N]`` float64 true logit that the row has in each population."""
        for i, start in enumerate(range(0, rows, CHUNK_ROWS)):
            n = min(CHUNK_ROWS, rows - start)
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, 1, i]))
            population = draw(np.array(self.plan.shares), n, rng).astype(np.uint8)
            drawn = {f.name: f.draw(self.plan, population, rng) for f in self.fields}
            logits = self.logits(drawn)
            own = logits[population, np.arange(n)]
            click = rng.random(n) < 1 / (1 + np.exp(-own))
            # Fields are mixed so that neighbours in the schema are not the planted pairs.
            order = sorted(drawn, key=lambda name: (name[-1] == "b", name))
            frame = pl.DataFrame({"click": click.astype(np.int8)} | {name: drawn[name] for name in order})
            yield frame, population, logits

    def logits(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """``[K, N]`` float64: the true logit of rows in each population. ``values``: field -> ``[N]`` value numbers."""
        found = np.repeat(np.array(self.plan.intercepts)[:, None], len(next(iter(values.values()))), axis=1)
        for z in range(self.k):
            for p, pair in enumerate(self.plan.pairs):
                if pair.ranks[z]:
                    found[z] += self.tables[p][z][values[f"p{p}_a"], values[f"p{p}_b"]]
            for name, effects in self.main.items():
                found[z] += effects[z][values[name]]
        return found

    def telling(self, frame: pl.DataFrame) -> np.ndarray:
        """``[K, N]``: P(population | fields) of the rows of a frame; only the tell-tale fields speak."""
        shown = [f.owner[frame[f.name].to_numpy()] for f in self.fields if f.owner is not None]
        told = np.array(shown).reshape(-1, frame.height)
        own, other = self.plan.clarities
        joint = [s * np.where(told == z, own, other).prod(axis=0) for z, s in enumerate(self.plan.shares)]
        return np.stack(joint) / np.sum(joint, axis=0)


def telling_accuracy(plan: Plan) -> float:
    """Share of rows whose population is told rightly by who knows the plan and sees the tell-tale fields (Bayes)."""
    k, t = len(plan.shares), len(plan.tells)
    own, other = plan.clarities
    right = 0.0
    # What matters is how many of the fields show each population, not which.
    for shown in itertools.combinations_with_replacement(range(k), t):
        counts = [shown.count(z) for z in range(k)]
        ways = math.factorial(t) // math.prod(map(math.factorial, counts))
        right += ways * max(s * own**n * other ** (t - n) for s, n in zip(plan.shares, counts, strict=True))
    return right


def make_populations(
    prepared_dir: Path | str, rows: int = ROWS, seed: int = 0, plan: Plan = DEFAULT, **options: Any
) -> Schema:
    """Make click logs of several hidden populations and prepare them.

    ``prepared_dir`` becomes a prepared data set with three things more: ``raw/`` (clicks.csv and its source
    file), ``populations/<split>.npy`` (:func:`load_populations`) and ``truth.json``::

        rank            field -> the largest of its ranks in any population
        ranks           population -> field -> rank: what a model of this population alone needs; 0: there the
                        click does not depend on the field
        uniform_rank    field -> directions of all populations together: what one model of all rows needs; of
                        a tell-tale field K - 1, enough to tell K populations
        bayes_auc, bayes_logloss, bayes_of     of the true probabilities given the population
        from_fields     the same without seeing the population
        populations     population -> share of the rows, bayes_auc and bayes_logloss over them
        telling_accuracy    how often the population is told rightly from the fields by who knows the plan
        rows, seed, plan

    ``options``: :class:`embsearch_dist.data.prepare.pipeline.Options`. One core makes 400,000 rows in seconds.

    Raises:
        UserError: too few rows, a plan that is impossible, or ``prepared_dir`` exists.
    """
    if rows < 100:
        raise UserError(f"--rows must be at least 100, got {rows}. Give more")
    checked = Options(seed=seed, **options)
    drawn = _Drawn(Clicks(plan, seed))
    with whole_directory(Path(prepared_dir), checked.overwrite) as partial:
        source = partial / "raw" / "source.yaml"
        names = write_raw(source, "populations", drawn.frames(rows))
        empty = [z for z, bayes in enumerate(drawn.each) if bayes.rows == 0]
        if empty:
            raise UserError(f"none of {rows} rows is of population {empty[0]}. Give more --rows")
        _save_populations(partial / POPULATIONS, np.concatenate(drawn.populations), checked.seed)
        write_json(partial / TRUTH, {**_ranks(drawn.clicks, names), **drawn.truth(rows)})
        return prepare_into(partial, open_source("table", source), checked)


class _Drawn:
    """Rows as they are drawn, and what is learned of their true probabilities on the way."""

    def __init__(self, clicks: Clicks) -> None:
        self.clicks = clicks
        self.given, self.alone = Bayes(), Bayes()
        self.each = [Bayes() for _ in clicks.plan.shares]
        self.populations: list[np.ndarray] = []

    def frames(self, rows: int) -> Iterator[pl.DataFrame]:
        for frame, population, logits in self.clicks.chunks(rows):
            own = logits[population, np.arange(len(population))]
            self.given.add(own)
            for z, bayes in enumerate(self.each):
                bayes.add(own[population == z])
            p = (self.clicks.telling(frame) / (1 + np.exp(-logits))).sum(axis=0)
            self.alone.add(np.log(p / (1 - p)))
            self.populations.append(population)
            yield frame

    def truth(self, rows: int) -> dict[str, object]:
        """What ``truth.json`` says beside the ranks; see :func:`make_populations`."""
        return {
            "bayes_auc": self.given.auc,
            "bayes_logloss": self.given.logloss,
            "bayes_of": BAYES_OF,
            "from_fields": {"bayes_auc": self.alone.auc, "bayes_logloss": self.alone.logloss},
            "populations": {
                str(z): {"share": b.rows / rows, "bayes_auc": b.auc, "bayes_logloss": b.logloss}
                for z, b in enumerate(self.each)
            },
            "telling_accuracy": telling_accuracy(self.clicks.plan),
            "rows": rows,
            "seed": self.clicks.seed,
            "plan": asdict(self.clicks.plan),
        }


def _ranks(clicks: Clicks, names: Sequence[str]) -> dict[str, object]:
    """What ``truth.json`` says of the ranks; see :func:`make_populations`."""
    fields = {f.name: f for f in clicks.fields}
    return {
        "rank": {n: max(fields[n].ranks) for n in names},
        "ranks": {str(z): {n: fields[n].ranks[z] for n in names} for z in range(clicks.k)},
        "uniform_rank": {n: clicks.k - 1 if fields[n].owner is not None else sum(fields[n].ranks) for n in names},
    }


def _save_populations(folder: Path, population: np.ndarray, seed: int) -> None:
    """A split's rows are stored in the order of the input (:mod:`embsearch_dist.data.prepare.encode`)."""
    split = random_split(np.arange(len(population)), seed)
    folder.mkdir()
    for k, name in enumerate(SPLITS):
        np.save(folder / f"{name}.npy", population[split == k], allow_pickle=False)


def load_populations(prepared_dir: Path | str, split: str) -> np.ndarray:
    """``[N]`` uint8: the population of every row of a split, in stored order.

    Raises:
        UserError: the data set has no known populations.
    """
    path = Path(prepared_dir) / POPULATIONS / f"{split}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(
            f"{path}: no populations can be read there ({e}). Only data of prepare.py --format populations have them"
        ) from e
