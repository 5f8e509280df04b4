"""Regularized (aging) evolution over architectures (Real et al. 2019; section 4.3), and random search beside it.

Every draw depends on the seed and the generation alone, so a search that was killed proposes what the unbroken one did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embsearch_dist.errors import UserError
from embsearch_dist.methods.nasrec.config import EvolutionConfig
from embsearch_dist.methods.nasrec.scoring import Score
from embsearch_dist.networks.architecture import FORMAT, KIND, Architecture
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.sampling import draw, mutate, mutations_at
from embsearch_dist.networks.space import Space, check

_STREAM = 0x45564F
TRIES = 200  # proposals in a row that were seen before; then the space has nothing new left, or as good as nothing
LIMITED_TRIES = 20_000  # random networks in a row that were seen before or are outside of the limits of the cost
SCHEME = "single_operator_any_connection"


@dataclass(frozen=True)
class Candidate:
    """A scored architecture; ``fitness`` is what the search minimises."""

    architecture: Architecture
    key: str
    generation: int
    score: Score
    fitness: float

    def to_json(self) -> dict[str, Any]:
        body = {"generation": self.generation, "fitness": self.fitness, "key": self.key, **asdict(self.score)}
        return {**body, "blocks": self.architecture.to_json()["blocks"]}

    @classmethod
    def from_json(cls, body: dict[str, Any], where: str) -> Candidate:
        """Raises:
        UserError: a key is missing or a block is wrong; names ``where``.
        """
        try:
            figures = [body[k] for k in ("logloss", "flops", "parameters", "latency", "fitness", "generation")]
            if not all(isinstance(f, int | float) and math.isfinite(f) for f in figures):
                raise TypeError(f"figures that are no numbers: {figures}")
            score = Score(*figures[:4])
            blocks = {"format": FORMAT, "kind": KIND, "blocks": body["blocks"]}
            found = Architecture.from_json(blocks, where)
            return cls(found, body["key"], body["generation"], score, body["fitness"])
        except (KeyError, TypeError) as e:
            raise UserError(f"{where}: not a scored architecture ({e!r}). Delete the file to search anew") from e


class Limits:
    """What a candidate may cost.

    Args:
        config: whose ``cost_at_least`` and ``cost_at_most`` count.
        cost: of a network.
    """

    def __init__(self, config: EvolutionConfig, cost: Callable[[Architecture], float]) -> None:
        self.config, self.cost = config, cost
        self.least, self.most = math.inf, 0.0  # of all that were asked for

    def hold(self, architecture: Architecture) -> bool:
        """Whether a network is within the limits."""
        cost, c = self.cost(architecture), self.config
        self.least, self.most = min(self.least, cost), max(self.most, cost)
        return cost >= c.cost_at_least and (not c.cost_at_most or cost <= c.cost_at_most)

    def check(self, space: Space, seed: int) -> None:
        """Raises:
        UserError: of many random networks of a space none is within the limits.
        """
        generator = np.random.default_rng([_STREAM, seed])
        if not any(self.hold(draw(space, SCHEME, generator, "uniform")) for _ in range(LIMITED_TRIES)):
            raise UserError(self.refusal())

    def refusal(self) -> str:
        """What to say where none is."""
        c = self.config
        keys = {k: v for k, v in (("cost_at_least", c.cost_at_least), ("cost_at_most", c.cost_at_most)) if v}
        told = ", ".join(f"config key search.evolution.{k} {v:,.10g}" for k, v in keys.items())
        return (
            f"{told}: of {LIMITED_TRIES:,} random networks of the space none has {c.cost} within that; they have "
            f"{self.least:,.10g} to {self.most:,.10g}. Set other limits, or other widths and blocks in search.space"
        )


class Evolution:
    """The search: what to score next, and what came of it.

    Attributes:
        generation: how many generations are done; the random population counts as the first.
        seen: every candidate so far, in the order of proposal.
        population: those that are alive, oldest first, as places in ``seen``.
        start: networks with their keys that the first population is made of, as far as they go; the rest is random.
        limits: of what a candidate may cost; None: there are none.
    """

    def __init__(self, space: Space, config: EvolutionConfig, seed: int) -> None:
        self.space, self.config, self.seed = space, config, seed
        self.limits: Limits | None = None
        self.generation = 0
        self.seen: list[Candidate] = []
        self.population: list[int] = []
        self.start: Sequence[tuple[Architecture, str]] = ()

    @property
    def over(self) -> bool:
        return self.generation > self.config.generations

    def propose(self) -> list[tuple[Architecture, str]]:
        """The architectures of the next generation with their keys: none that was seen before, none twice, none outside
        of the limits of the cost.

        Raises:
            UserError: the first generation finds no network within those limits.
        """
        c, generator = self.config, np.random.default_rng([_STREAM, self.seed, self.generation])
        known = {candidate.key for candidate in self.seen}
        first = self.generation == 0
        parent, count = None, mutations_at(self.generation - 1, c.generations)
        patience = LIMITED_TRIES if self.limits and not self._ran_out() else TRIES
        if not first and c.strategy == "evolution":
            drawn = generator.choice(len(self.population), min(c.parents, len(self.population)), replace=False)
            parent = min((self.seen[self.population[i]] for i in sorted(drawn)), key=lambda x: (x.fitness, x.key))

        def new(parent: Candidate | None) -> tuple[Architecture, str] | None:
            for _ in range(patience if parent is None else TRIES):
                if parent is None:
                    made = draw(self.space, SCHEME, generator, "uniform")
                else:
                    made = mutate(parent.architecture, self.space, count, generator)
                if self.limits and not self.limits.hold(made):
                    continue
                name = key(made)
                if name not in known:
                    known.add(name)
                    return made, name
            return None

        found = list(self.start[: c.population]) if first else []
        known |= {name for _, name in found}
        for _ in range((c.population if first else c.children) - len(found)):
            # A parent all of whose mutations were seen gives way to a random one, or a small space would stall here.
            proposal = (new(parent) if parent is not None else None) or new(None)
            if proposal is None:
                break
            found.append(proposal)
        if first and self.limits and not found:
            raise UserError(self.limits.refusal())
        return found

    def _ran_out(self) -> bool:
        """Whether the last generation had fewer networks than it should: few within the limits are new by now. Told by
        what was scored alone, so that a search that goes on proposes what the unbroken one did."""
        last = sum(c.generation == self.generation - 1 for c in self.seen)
        return self.generation > 0 and last < (self.config.population if self.generation == 1 else self.config.children)

    def record(self, proposed: Sequence[tuple[Architecture, str]], scores: Sequence[Score]) -> None:
        """Take the scores of what was proposed: the new ones join the population, and the oldest ones leave it."""
        for (architecture, name), score in zip(proposed, scores, strict=True):
            self.population.append(len(self.seen))
            self.seen.append(Candidate(architecture, name, self.generation, score, self.fitness(score)))
        self.population = self.population[-self.config.population :]
        self.generation += 1

    def fitness(self, score: Score) -> float:
        """Logloss, and ``beta * (cost / target - 1)`` if a cost is asked for."""
        c = self.config
        if not c.cost_weight:
            return score.logloss
        return score.logloss + c.cost_weight * (getattr(score, c.cost) / c.cost_target - 1)

    def best(self, count: int) -> list[Candidate]:
        """The candidates of least fitness, with distinct loglosses: equal ones are as good as one network."""
        found: dict[float, Candidate] = {}
        for candidate in sorted(self.seen, key=lambda x: (x.fitness, x.key)):
            found.setdefault(candidate.score.logloss, candidate)
        return list(found.values())[:count]

    def pareto(self, cost: str = "flops") -> list[Candidate]:
        """Candidates than which none has both less logloss and less cost, cheapest first."""
        found: list[Candidate] = []
        for c in sorted(self.seen, key=lambda x: (getattr(x.score, cost), x.score.logloss, x.key)):
            if not found or c.score.logloss < found[-1].score.logloss:
                found.append(c)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "population": self.population,
            "seen": [c.to_json() for c in self.seen],
        }

    def load_json(self, body: dict[str, Any], where: str) -> None:
        """Raises:
        UserError: not the state of a search.
        """
        try:
            self.generation, self.population = int(body["generation"]), [int(p) for p in body["population"]]
            self.seen = [Candidate.from_json(c, where) for c in body["seen"]]
            if not all(0 <= place < len(self.seen) for place in self.population):
                raise ValueError("the population has members that were never scored")
            for candidate in self.seen:
                check(self.space, candidate.architecture, searched=True, where=where)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{where}: not the state of a search ({e!r}). Delete it to search anew") from e
