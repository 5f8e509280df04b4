"""The table of a page from the comparison.csv that compare_methods.py leaves: means over seeds, gains paired by seed.

Results that are numbered from 1 on, as ``found-1`` and ``found-2``, are a pool: in their place stand their mean and, of
each seed, the one of least validation logloss with the weights that are measured. ``ues-8`` and ``ues-16`` are none.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from tools.studies.seeds import spread, with_deviation, with_error

NUMBERED = re.compile(r"(.+)-\d+")
FIGURES = ("test_auc", "test_logloss", "dense_parameters", "flops_per_sample")
Line = Mapping[str, str]
Figures = dict[str, float]


def markdown(lines: Sequence[Line], against: str) -> str:
    """What was compared, and a row per result or pool, the highest test AUC first. A result that some seed lacks says
    how many it has.

    Args:
        lines: of the CSV file.
        against: result that the others are compared with, seed by seed.

    Raises:
        SystemExit: there is no such result.
    """
    by_seed = {seed: results_of([r for r in lines if r["seed"] == seed]) for seed in sorted({r["seed"] for r in lines})}
    names = list(dict.fromkeys(name for found in by_seed.values() for name in found))
    if against not in names:
        raise SystemExit(f"a page compares with {against!r}; its file has {', '.join(names)}")
    rows = [row_of(name, by_seed, against) for name in names]
    head = [
        f"| model | test AUC | logloss | AUC - {against} | dense parameters | kFLOPs a row |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*told(lines), "", *head, *(text for _, text in sorted(rows, reverse=True))]) + "\n"


def told(lines: Sequence[Line]) -> list[str]:
    """Data, seeds, commits and machines of all lines."""
    data, commits, machines = (", ".join(dict.fromkeys(r[k] for r in lines)) for k in ("data", "commit", "hardware"))
    seeds = ", ".join(sorted({r["seed"] for r in lines}, key=int))
    return [f"{data}, seeds {seeds}, commit {commits}; {machines}."]


def results_of(lines: Sequence[Line]) -> dict[str, Figures]:
    """Figures of each result of one seed, and of each pool in place of its members."""
    found: dict[str, Figures] = {}
    pools: dict[str, list[Line]] = {}
    for line in lines:
        numbered = NUMBERED.fullmatch(line["model"])
        pools.setdefault(numbered[1] if numbered else line["model"], []).append(line)
    for name, members in pools.items():
        if {m["model"] for m in members} != {f"{name}-{k + 1}" for k in range(len(members))}:
            found |= {member["model"]: figures_of(member) for member in members}
            continue
        each = [figures_of(member) for member in members]
        best = min(members, key=lambda member: float(member["validation_logloss"]))
        found[f"{name}: mean of {len(members)}"] = {k: statistics.fmean(e[k] for e in each) for k in FIGURES}
        found[f"{name}: by validation"] = figures_of(best)
    return found


def figures_of(line: Line) -> Figures:
    return {key: float(line[key]) for key in FIGURES}


def row_of(name: str, by_seed: Mapping[str, Mapping[str, Figures]], against: str) -> tuple[float, str]:
    """Mean test AUC of a result and its row."""
    here = [found for found in by_seed.values() if name in found]
    auc, loss, dense, flops = (spread([found[name][key] for found in here]) for key in FIGURES)
    pairs = [found[name]["test_auc"] - found[against]["test_auc"] for found in here if against in found]
    gain = "" if name == against else with_error(spread(pairs), len(pairs), ".4f")
    label = name if len(here) == len(by_seed) else f"{name} ({len(here)} of {len(by_seed)} seeds)"
    figures = [with_deviation(auc, ".4f"), with_deviation(loss, ".4f"), gain]
    return auc[0], f"| {label} | {' | '.join(figures)} | {dense[0]:,.0f} | {flops[0] / 1000:,.0f} |"
