"""Try searches in a table of allocations that were all trained alone: seconds, no training, and the best is known.

    python tools/studies/search_table.py --space tools/tables/movielens_100k.yaml \\
        --table tools/tables/movielens_100k.csv --out runs/search_table

Each search sees the validation scores of one seed of the table and a budget, and names an allocation. Its regret is
the test AUC, mean over the table's seeds, that the best allocation of at most that size has more. Each search runs
with each seed of the table and with ``--repeats`` random seeds of its own. The best uniform width of at most the
budget stands beside them. Writes OUT/search_table.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from embsearch_dist.methods.adass.config import PolicyConfig
from embsearch_dist.methods.adass.local import Problem, refine, sweep
from embsearch_dist.methods.adass.policy import search
from embsearch_dist.methods.budget import knapsack
from embsearch_dist.width_table import Score, Space, WidthTable
from tools.gpucheck.facts import ROOT, commit, hardware
from tools.studies.jobs import write_csv
from tools.studies.seeds import with_deviation

COLUMNS = ("budget", "search", "table_seed", "seed", "widths", "parameters", "regret", "scored", "seconds")
FACTS = ("allocations", "table_seeds", "noise", "commit", "hardware", "command")  # the same in all lines


@dataclass
class Task:
    """One search in the table: what it may ask, and what it must obey."""

    table: WidthTable
    score: Score
    limit: float
    seed: int

    def allowed(self, choice: Any) -> bool:
        in_space = all(bool(self.table.allowed[g, j]) for g, j in enumerate(choice))
        return in_space and any(self.table.candidates[j] for j in choice) and self.table.size(choice) <= self.limit

    def value(self, choice: Any) -> float:
        return self.score(torch.tensor([list(choice)]))[0]["auc"]

    @property
    def problem(self) -> Problem:
        """The same in the words of AdaS&S's local search."""
        table = self.table
        return Problem(
            lambda _, choices: self.score(choices),
            lambda metrics: metrics["auc"],
            np.zeros(table.costs.shape),
            table.costs.numpy(),
            self.limit,
            table.allowed.numpy(),
            np.array(table.candidates),
        )


class Counted:
    """A score that counts the different allocations it was asked for."""

    def __init__(self, score: Score) -> None:
        self.score, self.seen = score, set[tuple[int, ...]]()

    def __call__(self, choices: torch.Tensor) -> list[dict[str, float]]:
        self.seen.update(map(tuple, choices.tolist()))
        return self.score(choices)


def uniform(task: Task) -> list[int]:
    """The widest uniform width that fits; a group that may not have it takes its next narrower one."""
    table = task.table
    fits = [c for c in (clipped(table, w) for w in table.candidates) if c is not None and task.allowed(c)]
    return fits[-1] if fits else min(table.within(task.limit), key=table.size)


def clipped(table: WidthTable, width: int) -> list[int] | None:
    """Every group at its widest candidate of at most ``width``; None when a group has none."""
    widths = [[w for w in g.widths if w <= width] for g in table.space.groups]
    return table.choice([w[-1] for w in widths]) if all(widths) else None


def additive(task: Task) -> list[int]:
    """Utilities from the widest allocation, one group narrowed at a time, then the exact knapsack."""
    widest = clipped(task.table, task.table.candidates[-1])
    assert widest is not None
    utility = torch.full(task.table.costs.shape, -math.inf, dtype=torch.float64)
    for g, j in task.table.allowed.nonzero().tolist():
        utility[g, j] = task.value([*widest[:g], j, *widest[g + 1 :]])
    return knapsack(utility, task.table.costs, task.limit)


def climbed(task: Task) -> list[int]:
    """The additive knapsack, then AdaS&S's local search over one and two groups."""
    return refine(task.problem, additive(task), task.seed)


def swept(task: Task) -> list[int]:
    """AdaS&S's sweeps over all single changes, from the uniform width."""
    return sweep(task.problem, uniform(task))[0]


def policy(task: Task) -> list[int]:
    """AdaS&S's policy (REINFORCE, Eq. 8 and 9), then the knapsack over its log-probabilities."""
    config, table = PolicyConfig(steps=100, batch=16, lr=5e-3, reward_weight=50.0), task.table
    relative = (table.costs / table.costs.sum(1).mean()).float()
    p = search(task.score, relative, config, task.seed, table.costs.float(), task.limit, allowed=table.allowed)
    return knapsack(p.log().double().masked_fill(~table.allowed, -math.inf), table.costs, task.limit)


def policy_climbed(task: Task) -> list[int]:
    """The policy and the local search behind it: AdaS&S as it is."""
    return refine(task.problem, policy(task), task.seed)


def random_search(task: Task) -> list[int]:
    """The best of 64 allocations drawn from all that fit."""
    fits, rng = task.table.within(task.limit), np.random.default_rng(task.seed)
    drawn = [fits[k] for k in rng.choice(len(fits), min(64, len(fits)), replace=False)]
    return max(drawn, key=task.value)


def evolution(task: Task) -> list[int]:
    """Regularised evolution (Real et al. 2019): 64 allocations, 16 of them at random, the oldest dies."""
    fits, rng = task.table.within(task.limit), np.random.default_rng(task.seed)
    alive = [fits[k] for k in rng.choice(len(fits), min(16, len(fits)), replace=False)]
    seen = {tuple(c): task.value(c) for c in alive}
    for _ in range(64 - len(alive)):
        parent = max((alive[k] for k in rng.choice(len(alive), min(6, len(alive)), replace=False)), key=task.value)
        near = [c for c in fits if 0 < sum(a != b for a, b in zip(c, parent, strict=True)) <= 2]
        child = near[rng.integers(len(near))] if near else parent
        seen[tuple(child)] = task.value(child)
        alive = [*alive[1:], child]
    return list(max(seen, key=lambda c: seen[c]))


def exhaustive(task: Task) -> list[int]:
    """The best validation score of all that fit: what any search on these scores can reach."""
    return max(task.table.within(task.limit), key=task.value)


SEARCHES: dict[str, Callable[[Task], list[int]]] = {
    "uniform": uniform,
    "additive": additive,
    "additive + local": climbed,
    "sweeps": swept,
    "policy": policy,
    "policy + local": policy_climbed,
    "random 64": random_search,
    "evolution 64": evolution,
    "every allocation": exhaustive,
}
SEEDLESS = {"uniform", "additive", "sweeps", "every allocation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", type=Path, required=True, help="groups of fields and their widths, YAML")
    parser.add_argument("--table", type=Path, required=True, help="CSV of tools/studies/width_table.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", default="10,25,50,80", help="percent of the parameters of the widest allocation")
    parser.add_argument("--repeats", type=int, default=10, help="random seeds of each search")
    args = parser.parse_args()
    table = WidthTable.load(args.table, Space.load(args.space))
    same = facts_of(table, args)
    rows = [row | same for row in compare(table, [float(b) for b in args.budgets.split(",")], args.repeats)]
    write_csv(args.out / "search_table.csv", [*COLUMNS, *FACTS], rows)
    text = markdown(rows)
    (args.out / "search_table.md").write_text(text)
    draw(rows, args.out / "search_table.png")
    print(text)


def facts_of(table: WidthTable, args: argparse.Namespace) -> dict[str, Any]:
    """What every line of the CSV says of the table and the command."""
    told = ["--space", str(args.space), "--table", str(args.table), "--budgets", args.budgets]
    return {
        "allocations": len(table.space.every),
        "table_seeds": len(table.seeds),
        "noise": round(table.noise(), 6),
        "commit": commit(ROOT),
        "hardware": hardware("1 thread"),
        "command": shlex.join(["python", "tools/studies/search_table.py", *told, "--repeats", str(args.repeats)]),
    }


def compare(table: WidthTable, budgets: list[float], repeats: int) -> list[dict[str, Any]]:
    """A row for every budget, search, seed of the table and seed of the search."""
    torch.set_num_threads(1)
    widest = sum(float(row.max()) for row in table.costs)
    plan = [
        (percent, name, table_seed, seed)
        for percent in budgets
        for name in SEARCHES
        for table_seed in table.seeds
        for seed in range(1 if name in SEEDLESS else repeats)
    ]
    rows = []
    for percent, name, table_seed, seed in tqdm(plan, unit="search", disable=not sys.stderr.isatty()):
        score = Counted(table.score(table_seed))
        task = Task(table, score, percent / 100 * widest, seed)
        begun = time.monotonic()
        choice = SEARCHES[name](task)
        seconds = time.monotonic() - begun
        assert task.allowed(choice), f"{name} at {percent:g}%: {choice} does not fit"
        row = {"budget": f"{percent:g}%", "search": name, "table_seed": table_seed, "seed": seed}
        row |= {"widths": "-".join(map(str, table.widths(choice))), "parameters": int(table.size(choice))}
        regret = table.regret(choice, task.limit)
        rows.append(row | {"regret": round(regret, 6), "scored": len(score.seen), "seconds": round(seconds, 2)})
    return rows


def summary(rows: list[dict[str, Any]], budget: str, name: str) -> tuple[float, float, float]:
    """Mean regret, its standard error over the runs (NaN for one), and the mean number of allocations scored."""
    chosen = [r for r in rows if (r["budget"], r["search"]) == (budget, name)]
    regret = [float(r["regret"]) for r in chosen]
    error = statistics.stdev(regret) / math.sqrt(len(regret)) if len(regret) > 1 else math.nan
    return statistics.fmean(regret), error, statistics.fmean(float(r["scored"]) for r in chosen)


def markdown(rows: list[dict[str, Any]]) -> str:
    budgets, first = list(dict.fromkeys(r["budget"] for r in rows)), rows[0]
    lines = [
        f"Test AUC below the best allocation of the budget, x 1000 (+- standard error over runs). "
        f"{first['allocations']} allocations, {first['table_seeds']} seeds; one allocation's test AUC differs by "
        f"{1000 * float(first['noise']):.2f} between seeds (standard deviation).\n",
        "| search | scored | " + " | ".join(budgets) + " |",
        "| --- | --- |" + " --- |" * len(budgets),
    ]
    for name in dict.fromkeys(r["search"] for r in rows):
        each = [summary(rows, b, name) for b in budgets]
        cells = " | ".join(with_deviation([1000 * mean, 1000 * error], ".2f") for mean, error, _ in each)
        lines.append(f"| {name} | {statistics.fmean(e[2] for e in each):.0f} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Regret of each search at each budget; a band as wide as the noise between seeds."""
    noise = 1000 * float(rows[0]["noise"])
    budgets, names = (list(dict.fromkeys(r[key] for r in rows)) for key in ("budget", "search"))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
        axis = figure.subplots()
        for k, name in enumerate(names):
            each = [summary(rows, b, name) for b in budgets]
            places = np.arange(len(budgets)) + (k - (len(names) - 1) / 2) * 0.09
            means = [1000 * e[0] for e in each]
            errors = [0.0 if math.isnan(e[1]) else 1000 * e[1] for e in each]
            axis.errorbar(places, means, yerr=errors, fmt="os^vD<>pX"[k % 9], capsize=2, markersize=5, label=name)
        if math.isfinite(noise):
            axis.axhspan(0, noise, color="0.9", zorder=0, label="noise between seeds (1 s.d.)")
        axis.set_xticks(range(len(budgets)), [f"at most {b}" for b in budgets])
        axis.set_xlabel("embedding parameters, of the widest allocation")
        axis.set_ylabel("test AUC below the best, x 1000")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8, ncols=2)
        figure.savefig(path)


if __name__ == "__main__":
    main()
