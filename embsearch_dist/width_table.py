"""A table of allocations that were all trained alone, in which a search can be tried in seconds.

A *space* (``tools/tables/*.yaml``) puts fields into groups of one width and lists the widths of each group. A
*table* (``tools/tables/*.csv``, made by ``tools/studies/width_table.py``) has a line for every allocation of the space
and every seed: what the model of that allocation scored on validation and test rows. The idea is that of the tabulated
architecture benchmarks (NAS-Bench-101, Ying et al. 2019): whoever searches pays a look-up for a training.

    table = WidthTable.load("tools/tables/movielens_100k.csv", Space.load("tools/tables/movielens_100k.yaml"))
    found = my_search(table.score(seed=0), table.costs, table.allowed, budget)     # [groups] indices of widths
    table.regret(found, budget)                                                    # test AUC below the best there is
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema

FIGURES = ("validation_auc", "validation_logloss", "test_auc", "test_logloss")
FACTS = ("steps", "seconds", "commit", "hardware", "command")
Score = Callable[[torch.Tensor], list[dict[str, float]]]


@dataclass(frozen=True)
class Group:
    """Fields that have one width, and the widths it may have, ascending."""

    name: str
    fields: tuple[str, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """Every choice of a width per group, but the one that drops all fields.

    Attributes:
        config: the config whose recipe trains each allocation.
        overrides: settings on top of it, ``section.key`` -> value.
    """

    config: str
    overrides: dict[str, Any]
    groups: tuple[Group, ...]

    @classmethod
    def load(cls, path: Path | str) -> Space:
        """Read a space file.

        Raises:
            UserError: it lacks a key or says something impossible; names the key.
        """
        try:
            body = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as e:
            raise UserError(f"{path}: cannot be read: {e}") from e
        if not isinstance(body, dict) or not {"config", "groups"} <= set(body) <= {"config", "overrides", "groups"}:
            raise UserError(f"{path}: needs the keys config and groups, and may have overrides")
        groups = []
        for name, entry in body["groups"].items():
            if not isinstance(entry, dict) or set(entry) != {"fields", "widths"}:
                raise UserError(f"{path}: groups.{name}: needs fields and widths, and nothing else")
            widths = entry["widths"]
            if not widths or widths != sorted(set(widths)) or widths[0] < 0:
                raise UserError(f"{path}: groups.{name}.widths: must ascend from 0 or more, got {widths}")
            groups.append(Group(str(name), tuple(entry["fields"]), tuple(widths)))
        return cls(str(body["config"]), dict(body.get("overrides") or {}), tuple(groups))

    def check(self, schema: Schema) -> None:
        """Raises:
        UserError: a field of the data set is in no group or in two, or a group names another field.
        """
        named = [f for g in self.groups for f in g.fields]
        for field in [*schema.names, *named]:
            if named.count(field) != 1 or field not in schema.names:
                raise UserError(
                    f"field {field!r} is in {named.count(field)} groups of the space; data set {schema.dataset!r} has "
                    f"the fields {', '.join(schema.names)}, and each belongs to one group"
                )

    @property
    def every(self) -> list[tuple[int, ...]]:
        """All allocations as widths per group."""
        return [w for w in itertools.product(*(g.widths for g in self.groups)) if any(w)]

    def widths(self, of_groups: Sequence[int]) -> dict[str, int]:
        """Field -> width."""
        return {f: w for g, w in zip(self.groups, of_groups, strict=True) for f in g.fields}


class WidthTable:
    """What every allocation of a space scored, by seed.

    Attributes:
        candidates: the union of all groups' widths, ascending: T of them.
        allowed: ``[groups, T]`` bool: the widths that a group may have.
        costs: ``[groups, T]`` float64: embedding parameters of a group at a width.
        seeds: the seeds that every allocation was trained with.
    """

    def __init__(self, space: Space, rows: Sequence[dict[str, str]], where: str = "the table") -> None:
        self.space = space
        self.candidates = sorted({w for g in space.groups for w in g.widths})
        self.allowed = torch.tensor([[w in g.widths for w in self.candidates] for g in space.groups])
        self._found: dict[tuple[int, ...], dict[int, dict[str, float]]] = {}
        parameters: dict[tuple[int, ...], int] = {}
        try:
            for row in rows:
                widths = tuple(int(row[g.name]) for g in space.groups)
                self._found.setdefault(widths, {})[int(row["seed"])] = {key: float(row[key]) for key in FIGURES}
                parameters[widths] = int(row["parameters"])
        except (KeyError, ValueError) as e:
            raise UserError(f"{where}: a line lacks or spoils a column of the space: {e}") from e
        missing = [w for w in space.every if w not in self._found]
        if missing:
            raise UserError(
                f"{where}: {len(missing)} of {len(space.every)} allocations are missing, first {missing[0]}; "
                "go on with tools/studies/width_table.py"
            )
        self.seeds = sorted(set.intersection(*(set(self._found[w]) for w in space.every)))
        if not self.seeds:
            raise UserError(f"{where}: no seed has every allocation")
        self.costs = torch.tensor(
            [[self._cost(k, w, parameters) for w in self.candidates] for k in range(len(space.groups))]
        )

    @classmethod
    def load(cls, path: Path | str, space: Space) -> WidthTable:
        """Read a table.

        Raises:
            UserError: it does not hold every allocation of ``space`` with one seed at least.
        """
        return cls(space, read_rows(Path(path)), str(path))

    def _cost(self, group: int, width: int, parameters: dict[tuple[int, ...], int]) -> float:
        """Parameters are linear in a group's width, so two allocations tell the price of a column."""
        widths = self.space.groups[group].widths
        if width not in widths:
            return 0.0
        other = [g.widths[-1] for g in self.space.groups]
        low, high = ((*other[:group], w, *other[group + 1 :]) for w in (widths[0], widths[-1]))
        columns = widths[-1] - widths[0]
        if not columns:
            raise UserError(f"group {self.space.groups[group].name!r} has one width only: there is nothing to search")
        return width * (parameters[high] - parameters[low]) / columns

    def choice(self, widths: Sequence[int]) -> list[int]:
        """Widths per group as candidate indices."""
        return [self.candidates.index(w) for w in widths]

    def widths(self, choice: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.candidates[j] for j in choice)

    def size(self, choice: Sequence[int]) -> float:
        """Embedding parameters."""
        return float(sum(self.costs[g, j] for g, j in enumerate(choice)))

    def score(self, seed: int) -> Score:
        """A function from ``[K, groups]`` candidate indices to validation metrics of that seed, like a supernet's
        scorer. What drops every field scores as a constant would: AUC 0.5.

        Raises:
            KeyError: the seed is not in the table, or a choice is none of the space.
        """
        nothing = {"auc": 0.5, "logloss": math.log(2), "accuracy": 0.5}

        def scored(choices: torch.Tensor) -> list[dict[str, float]]:
            found = []
            for choice in choices.tolist():
                widths = self.widths(choice)
                row = self._found[widths][seed] if any(widths) else None
                found.append({"auc": row["validation_auc"], "logloss": row["validation_logloss"]} if row else nothing)
            return found

        return scored

    def of_seed(self, choice: Sequence[int], seed: int, figure: str = "test_auc") -> float:
        """A figure of one allocation trained with one seed.

        Raises:
            KeyError: the table has no such seed, figure or choice.
        """
        return self._found[self.widths(choice)][seed][figure]

    def truth(self, choice: Sequence[int], figure: str = "test_auc") -> float:
        """A figure of one allocation, its mean over the seeds."""
        return statistics.fmean(self.of_seed(choice, s, figure) for s in self.seeds)

    def within(self, limit: float) -> list[list[int]]:
        """All choices of at most ``limit`` parameters."""
        choices = [self.choice(w) for w in self.space.every]
        return [c for c in choices if self.size(c) <= limit]

    def regret(self, choice: Sequence[int], limit: float) -> float:
        """Test AUC that the best allocation of at most ``limit`` parameters has more, both means over the seeds."""
        return max(self.truth(c) for c in self.within(limit)) - self.truth(choice)

    def noise(self, figure: str = "test_auc") -> float:
        """Standard deviation of a figure between seeds of one allocation, pooled over all; NaN of one seed."""
        if len(self.seeds) < 2:
            return math.nan
        each = [[by_seed[s][figure] for s in self.seeds] for by_seed in self._found.values()]
        return math.sqrt(statistics.fmean(statistics.variance(values) for values in each))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a table; none when the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
