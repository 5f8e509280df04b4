"""What a choice between all methods by validation rows would reach on test rows."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from tools.league.rows import UNIFORM, Group, Row, shared_seeds, unshared
from tools.studies.seeds import spread, with_deviation, with_error

CHOOSES = "auto"  # a choice itself
BY = {"validation_auc": ("validation AUC", 1.0), "validation_logloss": ("validation logloss", -1.0)}


def choices(groups: Sequence[Group]) -> list[str]:
    """For each budget the model of the best validation figure among all methods, seed by seed, on the test rows. Only
    the seeds that all of them have count: the best method is none of a luckier seed, and the choice none of fewer."""
    lines = [
        "## A choice between all methods by validation rows",
        "",
        "At each budget and seed the model that is best on the validation split, among those of all methods but "
        f"{CHOOSES} and the widest uniform width that the budget holds; its test AUC beside that of the method with "
        "the highest mean, over the seeds that all of them have. So far a choice by these rows leads, however many "
        "methods are tried.",
        "",
        "| data set | budget | chosen by | test AUC | - best method | chosen |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group in groups:
        for budget in group.budgets:
            for figure, (name, _) in BY.items():
                lines += _line(group, budget, figure, name)
    return [*lines, "", *unshared(groups, CHOOSES)]


def _line(group: Group, budget: str, figure: str, name: str) -> list[str]:
    seeds = shared_seeds(group, budget, but=CHOOSES)
    every = {m: group.at(m, budget) for m in [*group.methods, UNIFORM] if m != CHOOSES}
    rows = {m: [r for r in own if r["seed"] in seeds] for m, own in every.items()}
    by_seed: dict[str, list[Row]] = {}
    for row in (row for own in rows.values() for row in own if row.get(figure)):
        by_seed.setdefault(row["seed"], []).append(row)
    means = {m: statistics.fmean(float(r["test_auc"]) for r in own) for m, own in rows.items() if own}
    if not means or not by_seed:
        return []
    best = max(means, key=lambda m: means[m])
    own = {r["seed"]: float(r["test_auc"]) for r in rows[best]}
    chosen = {seed: max(found, key=lambda r: BY[figure][1] * float(r[figure])) for seed, found in by_seed.items()}
    auc = [float(row["test_auc"]) for row in chosen.values()]
    gains = [float(row["test_auc"]) - own[seed] for seed, row in chosen.items() if seed in own]
    if not gains or any(math.isnan(value) for value in auc):
        return []
    counts = Counter(row["method"] for row in chosen.values())
    picked = ", ".join(f"{m} {n}x" if n > 1 else m for m, n in counts.most_common())
    difference = f"{with_error(spread(gains), len(gains), '.4f')} {best}"
    return [f"| {group.title} | {budget} | {name} | {with_deviation(spread(auc), '.4f')} | {difference} | {picked} |"]
