"""Evolution over the widths of the fields, under a budget (OptEmbed, section on the search for dimensions)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from embsearch_dist.methods.columns import Cost
from embsearch_dist.methods.optembed.config import EvolutionConfig

Widths = tuple[int, ...]


class Evolution:
    """Candidates are tuples and are never changed.

    Args:
        least: smallest width, 0 or 1.
        most: largest width.
        cost: of the widths of all fields; ``limit`` what they may cost at most.
        score: of candidates, higher is better; called once for each.
    """

    def __init__(
        self,
        config: EvolutionConfig,
        fields: int,
        least: int,
        most: int,
        cost: Cost,
        limit: float,
        score: Callable[[Widths], float],
        seed: list[int],
    ) -> None:
        self.config, self.fields, self.least, self.most = config, fields, least, most
        self.cost, self.limit, self.score = cost, limit, score
        self.rng = np.random.default_rng(seed)
        self.scored: dict[Widths, float] = {}

    def run(self) -> Widths:
        """The best widths; of equal scores the cheapest."""
        c = self.config
        for _ in range(c.mutations + c.crossovers):
            self._add([int(w) for w in self.rng.integers(self.least, self.most + 1, self.fields)])
        for _ in range(c.generations):
            parents = self.best(c.keep)
            for _ in range(c.mutations):
                self._add(self.mutated(parents[self.rng.integers(len(parents))]))
            for _ in range(c.crossovers):
                one, other = (parents[self.rng.integers(len(parents))] for _ in range(2))
                self._add(self.crossed(one, other))
        return self.best(1)[0]

    def best(self, count: int) -> list[Widths]:
        """The best candidates of all that were scored, best first."""
        return sorted(self.scored, key=lambda w: (-self.scored[w], self.cost(w), w))[:count]

    def mutated(self, parent: Widths) -> list[int]:
        """A copy in which each width is redrawn with the probability of the config."""
        redrawn = self.rng.random(self.fields) < self.config.probability
        new = self.rng.integers(self.least, self.most + 1, self.fields)
        return [int(n) if r else w for w, n, r in zip(parent, new, redrawn, strict=True)]

    def crossed(self, one: Widths, other: Widths) -> list[int]:
        """The first fields of one and the rest of the other; at least one field of each where there are two."""
        cut = int(self.rng.integers(1, max(self.fields, 2)))
        return [*one[:cut], *other[cut:]]

    def repaired(self, widths: list[int]) -> Widths:
        """Widths within the limit: fields are drawn and cut until they fit; at least one field is kept.

        Raises:
            ValueError: not even the least widths fit, or no single column where all fields can be dropped.
        """
        widths = list(widths)
        while self.cost(widths) > self.limit:
            wide = [f for f, w in enumerate(widths) if w > self.least]
            if not wide:
                raise ValueError(f"the least widths cost more than {self.limit}")
            f = wide[self.rng.integers(len(wide))]
            widths[f] = int(self.rng.integers(self.least, widths[f]))
        if not any(widths):
            alone = [[int(f == kept) for f in range(self.fields)] for kept in range(self.fields)]
            widths = min(alone, key=self.cost)
            if self.cost(widths) > self.limit:
                raise ValueError(f"one column of the cheapest field costs more than {self.limit}")
        return tuple(widths)

    def _add(self, widths: list[int]) -> None:
        found = self.repaired(widths)
        if found not in self.scored:
            self.scored[found] = self.score(found)
