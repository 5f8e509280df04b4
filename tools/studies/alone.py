"""Subnets that were trained alone: what scores of a supernet are judged by.

A file of them (``subnets.csv`` of tools/studies/consistency.py) has a line for each training, so that a study whose run
directories are gone can go on with further seeds, subnets or settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.schema import Schema
from embsearch_dist.width_table import WidthTable
from tools.studies.budget_tables import best_validation
from tools.studies.jobs import read_csv

FILE = "subnets.csv"
FIGURES = ("validation_auc", "test_auc")
COLUMNS = ("subnet", "seed", "widths", "parameters", *FIGURES, "commit", "hardware", "command")


@dataclass
class Truth:
    """Figures of K subnets.

    Attributes:
        choices: ``[K, fields]`` indices of candidates.
        validation: ``[seeds, K]`` AUC on the validation split, of the best weights.
        test: ``[seeds, K]`` AUC of the same weights on the test split.
    """

    choices: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def ceiling(self) -> float:
        """What one more training alone is worth as a score; NaN of a single seed."""
        return self._against_others(self.validation)

    def noise(self) -> float:
        """Tau of the test AUC of one seed and the mean of the others; NaN of a single seed."""
        return self._against_others(self.test)

    def _against_others(self, of_one: np.ndarray) -> float:
        seeds = range(len(self.test))
        if len(seeds) < 2:
            return float("nan")
        others = [np.delete(self.test, k, axis=0).mean(0) for k in seeds]
        return statistics.fmean(tau(of_one[k], others[k]) for k in seeds)


def tau(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau-b of two scores of the same subnets."""
    return float(kendalltau(a, b).statistic)


def of_table(table: WidthTable, schema: Schema) -> Truth:
    """Every allocation of a table as a subnet, with a candidate for each field of its groups."""
    found = [table.choice(widths) for widths in table.space.every]
    of_field = [next(g for g, group in enumerate(table.space.groups) if n in group.fields) for n in schema.names]
    figures = (np.array([[table.of_seed(c, seed, name) for c in found] for seed in table.seeds]) for name in FIGURES)
    return Truth(np.array(found)[:, of_field], *figures)


def line_of(directory: Path) -> dict[str, Any]:
    """Figures of a training: of the weights that it kept."""
    evaluated = read_json(directory / "evaluation.json")
    kept = best_validation(directory / "metrics.jsonl", read_json(directory / "training.json")["best_step"])
    figures = zip(FIGURES, (kept["auc"], evaluated["auc"]), strict=True)
    return {"parameters": evaluated["embedding_parameters"], **{name: f"{auc:.6f}" for name, auc in figures}}


def told(widths: Mapping[str, int]) -> str:
    """Widths as they stand in a line: ``user_id=8 movie_id=16``."""
    return " ".join(f"{name}={width}" for name, width in widths.items())


def read_lines(path: Path, subnets: Sequence[str]) -> dict[tuple[int, int], dict[str, Any]]:
    """Lines of an earlier study by (subnet, seed).

    Args:
        subnets: the widths of each, as :func:`told` writes them.

    Raises:
        UserError: the file is missing, lacks a column, or its subnets are others.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file. Give the subnets.csv that a study left")
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for n, line in enumerate(read_csv(path), start=2):
        if missing := [column for column in COLUMNS if line.get(column) is None]:
            raise UserError(f"{path}: column {missing[0]} is missing. Give the subnets.csv that a study left")
        subnet = int(line["subnet"])
        if subnet < len(subnets) and line["widths"] != subnets[subnet]:
            raise UserError(
                f"{path}, line {n}: subnet {subnet} has the widths {line['widths']}, and the one of this study "
                f"has {subnets[subnet]}. Give the --config, --draw and data that the file was made with"
            )
        found[subnet, int(line["seed"])] = line
    return found
