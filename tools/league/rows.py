"""The lines of a league: read from CSV files, grouped by data set and model, and gathered into blocks for ranks."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embsearch_dist.errors import UserError
from embsearch_dist.report.verdict import Model
from tools.studies.budget_tables import COLUMNS, Measure, key_of, summarise
from tools.studies.earlier import lines_of
from tools.studies.jobs import write_csv

LEAGUE_COLUMNS = ("data_set", *COLUMNS)
UNIFORM = "uniform"
ROUNDED = 1e-5  # a share of UES-32 as a CSV file has it
Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """All lines of one data set and backbone.

    Attributes:
        name: of the data set.
        backbone: of all its models.
        rows: lines of the CSV.
        models: (method, budget or width) -> the model over its seeds, sizes in parameters.
        reference: parameters of UES-32.
        shares: uniform width -> its size against UES-32 in what budgets count: parameters, or bytes as served where
            the lines have a precision.
    """

    name: str
    backbone: str
    rows: tuple[Row, ...]
    models: Mapping[tuple[str, str], Model]
    reference: float
    shares: Mapping[int, float]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.backbone}"

    @property
    def budgets(self) -> list[str]:
        """Of the searches, small before large where they are shares."""
        found = list(dict.fromkeys(r["budget"] for r in self.rows if r["budget"]))
        return sorted(found, key=lambda b: (share_of(b) is None, share_of(b) or 0.0))

    @property
    def methods(self) -> list[str]:
        """Searched ones."""
        return list(dict.fromkeys(r["method"] for r in self.rows if r["budget"]))

    @property
    def seeds(self) -> list[str]:
        return sorted({r["seed"] for r in self.rows}, key=int)

    def of(self, method: str, label: str) -> list[Row]:
        """Lines of a model, one a seed; ``label``: budget, or width of a uniform one."""
        return [r for r in self.rows if key_of(r) == (method, label)]

    def within(self, budget: str) -> str:
        """The widest uniform width that a budget holds, as text; empty where none was trained, or it is no share."""
        share = share_of(budget)
        # Rows are served in steps of 16 bytes, so several widths may cost the same.
        fits = [w for w, own in self.shares.items() if share is not None and own <= share * (1 + ROUNDED)]
        return str(max(fits)) if fits else ""

    def at(self, method: str, budget: str) -> list[Row]:
        """Lines of a method at a budget; of ``uniform`` those of the widest width that the budget holds."""
        return self.of(method, self.within(budget)) if method == UNIFORM else self.of(method, budget)


def share_of(budget: str) -> float | None:
    """``25%`` -> 0.25; None for a budget that is no share of UES-32."""
    try:
        return float(budget.removesuffix("%")) / 100 if budget.endswith("%") else None
    except ValueError:
        return None


def read_rows(files: Sequence[tuple[str, Path]]) -> list[Row]:
    """Lines of files that ``league.py run`` or ``compare_budgets.py`` wrote; lines that are there twice once.

    Args:
        files: name of the data set and file; without a name a file of ``compare_budgets.py`` has that which the data
            give themselves.

    Raises:
        UserError: a file is missing, empty or lacks a column, or two files tell different figures of one model.
    """
    found: dict[tuple[str, ...], tuple[Row, Path]] = {}
    for name, path in files:
        for row in lines_of(path):
            row["data_set"] = name or row.get("data_set") or row["data"].split(" ")[0]
            key = tuple(row[k] for k in ("data_set", "backbone", "seed", "budget")) + key_of(row)
            if key in found and found[key][0]["test_auc"] != row["test_auc"]:
                raise UserError(
                    f"{path}: {row['method']} {row['budget']} seed {row['seed']} on {row['data_set']} has another "
                    f"test AUC than in {found[key][1]}. Give files of one recipe"
                )
            found.setdefault(key, (row, path))
    return [row for row, _ in found.values()]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write lines as ``league.csv`` has them."""
    write_csv(path, LEAGUE_COLUMNS, ({k: v for k, v in row.items() if k in LEAGUE_COLUMNS} for row in rows))


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """A group for each data set and backbone, in order of appearance. Its sizes are parameters, whatever budgets count.

    Raises:
        UserError: the lines of one group have more than one precision, so a budget of 50% has two meanings.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["data_set"], row["backbone"]), []).append(row)
    groups = []
    for (name, backbone), own in found.items():
        precisions = sorted({r.get("precision") or "" for r in own})
        if len(precisions) > 1:
            told = " and ".join(f"bytes at {p}" if p else "parameters" for p in precisions)
            raise UserError(
                f"{name}, {backbone}: budgets count {told}, so one budget has several meanings. Give files of one "
                "precision, or another name to the data set of each (NAME=FILE)"
            )
        plain, measure = [{**row, "precision": ""} for row in own], Measure.of(own)
        whole, sizes = reference_of(own, measure), dict[int, list[float]]()
        for row in (r for r in own if r["method"] == UNIFORM):
            sizes.setdefault(int(key_of(row)[1]), []).append(float(row[measure.size]))
        shares = {width: statistics.fmean(by_seed) / whole for width, by_seed in sizes.items()}
        reference = reference_of(plain, Measure.of(plain))
        groups.append(Group(name, backbone, tuple(plain), summarise(plain), reference, shares))
    return groups


def reference_of(rows: Sequence[Row], measure: Measure) -> float:
    """Size of UES-32 as a measure counts it."""
    largest = max(rows, key=lambda r: float(r[measure.share]))  # shares are rounded to six places
    return float(round(measure.reference([largest])))


def widths_in(row: Row) -> dict[str, int]:
    """``user=4 movie=8`` -> widths by field."""
    return {name: int(width) for name, width in re.findall(r"(.+?)=(\d+)(?: |$)", row["widths"])}


def shared_seeds(group: Group, budget: str, but: str = "") -> set[str]:
    """Seeds that all methods of a budget have, the widest uniform width inside it among them; ``but`` one method."""
    own = (group.at(m, budget) for m in [*group.methods, UNIFORM] if m != but)
    seeds = [{r["seed"] for r in rows} for rows in own if rows]
    return set.intersection(*seeds) if seeds else set()


def unshared(groups: Sequence[Group], but: str = "") -> list[str]:
    """A line that names the budgets whose methods have no seed in common, so that they cannot be compared; none where
    there is no such budget."""
    found = [f"{g.title}, {budget}" for g in groups for budget in g.budgets if not shared_seeds(g, budget, but)]
    return [f"Left out, because there is no seed that all methods have: {'; '.join(found)}.", ""] if found else []


def blocks_by_budget(groups: Sequence[Group], figure: str) -> dict[str, dict[str, float]]:
    """A block for each data set and budget: method -> mean of a column over the seeds.

    Only the seeds that all methods of the block have count, so that no method is ranked by luckier seeds. ``uniform``
    is the widest uniform width that the budget holds.
    """
    blocks = {}
    for group in groups:
        for budget in group.budgets:
            own = {m: rows for m in [*group.methods, UNIFORM] if (rows := group.at(m, budget))}
            shared = shared_seeds(group, budget)
            if shared:
                blocks[f"{group.title}, {budget}"] = {
                    m: statistics.fmean(float(r[figure]) for r in rows if r["seed"] in shared)
                    for m, rows in own.items()
                }
    return blocks


def blocks_by_data(groups: Sequence[Group], figure: str) -> dict[str, dict[str, float]]:
    """A block for each data set: the mean of its blocks of budgets, of the methods that all of them have."""
    found = {}
    for group in groups:
        parts = list(blocks_by_budget([group], figure).values())
        if parts:
            methods = [m for m in parts[0] if all(m in part for part in parts)]
            found[group.title] = {m: statistics.fmean(part[m] for part in parts) for m in methods}
    return found
