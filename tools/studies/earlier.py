"""Lines of an earlier comparison.csv: what it tells is not run again, and stands in the new tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema
from tools.studies.budget_tables import data_told, key_of
from tools.studies.jobs import read_csv

Key = tuple[int, str, str]
NEEDED = ("data", "backbone", "seed", "budget", "method", "widths", "parameters", "test_auc", "test_logloss")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of a file that ``compare_budgets.py`` or ``league.py run`` wrote.

    Raises:
        UserError: it is missing, empty or lacks a column.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file. Give the league.csv or comparison.csv of a run")
    rows: list[dict[str, Any]] = list(read_csv(path))
    if not rows:
        raise UserError(f"{path}: no line below the head. Wait until a training of the run is finished")
    for column in NEEDED:
        if column not in rows[0]:
            raise UserError(f"{path}: column {column} is missing. Give the league.csv or comparison.csv of a run")
    return rows


@dataclass(frozen=True)
class Earlier:
    """Lines of a file; ``rows`` is empty where none was given."""

    path: Path | None = None
    rows: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, path: Path | None, data: Path, data_set: str = "") -> Earlier:
        """
        Args:
            data: prepared data of the new comparison.
            data_set: only its lines, of a file that has several (league.csv).

        Raises:
            SystemExit: the file is missing, no comparison, or of other data.
        """
        if path is None:
            return cls()
        try:
            lines = lines_of(path)
        except UserError as e:
            raise SystemExit(f"--earlier {e}") from e
        rows = [row for row in lines if not data_set or row.get("data_set", data_set) == data_set]
        told = data_told(Schema.load(data))
        for row in rows:
            if row["data"] != told:
                raise SystemExit(
                    f"--earlier {path}: seed {row['seed']} of {row['method']} was trained on {row['data']}, and "
                    f"{data} is {told}. Give the file of this data"
                )
        # A comparison is of one data set: the league puts its name in front again.
        own = [{k: v for k, v in row.items() if k != "data_set"} for row in rows]
        return cls(path, tuple({**row, "seed": int(row["seed"])} for row in own))

    @cached_property
    def keys(self) -> frozenset[Key]:
        """(seed, method, budget or width) of each line."""
        return frozenset((row["seed"], *key_of(row)) for row in self.rows)

    def with_new(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines and new ones, by seed; a new one takes the place of an old one of its key.

        Raises:
            SystemExit: they are of another backbone, or judged at another precision.
        """
        for column in ("backbone", "precision"):
            told = {row.get(column) or "" for row in [*self.rows, *rows]}
            if self.rows and len(told) > 1:
                raise SystemExit(f"--earlier {self.path}: lines of more than one {column}: {', '.join(sorted(told))}")
        new = {(row["seed"], *key_of(row)) for row in rows}
        kept = [row for row in self.rows if (row["seed"], *key_of(row)) not in new]
        return sorted([*kept, *rows], key=lambda row: row["seed"])
