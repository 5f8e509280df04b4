"""The table and the picture of ``daily.py``, from the lines of its CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tools.gpucheck.facts import hardware

Line = dict[str, Any]


def write_tables(out: Path, lines: Sequence[Line]) -> None:
    """Leave ``daily.csv``, ``daily.md`` and ``daily.png``."""
    with (out / "daily.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], "hardware"])
        writer.writeheader()
        writer.writerows({**line, "hardware": hardware("1 thread")} for line in lines)
    (out / "daily.md").write_text(table(lines))
    draw(out / "daily.png", lines)


def of(lines: Sequence[Line], arm: str, day: int, key: str) -> np.ndarray:
    """A figure of all seeds, by rising seed."""
    return np.array([r[key] for r in sorted(lines, key=lambda r: r["seed"]) if (r["arm"], r["day"]) == (arm, day)])


def table(lines: Sequence[Line]) -> str:
    """Markdown: per day and model the mean over seeds, and what it has over ``cold`` of the same seed."""
    arms, days = list(dict.fromkeys(r["arm"] for r in lines)), sorted({r["day"] for r in lines})
    seeds = len({r["seed"] for r in lines})
    head = [
        f"{seeds} seed{'s' * (seeds > 1)}. AUC and logloss on all rows of the next day; +- is the standard error, over "
        "seeds, of the paired difference.",
        "",
        "| day | model | AUC | over cold | logloss | over cold | steps | training s | prepare s |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    body = []
    for day in days:
        for arm in arms:
            cells = [str(day), arm]
            for key in ("auc", "logloss"):
                cells += [f"{of(lines, arm, day, key).mean():.5f}", difference(lines, arm, day, key)]
            cells += [f"{of(lines, arm, day, 'steps').mean():,.0f}"]
            cells += [f"{of(lines, arm, day, key).mean():.1f}" for key in ("train_s", "prepare_s")]
            body.append(f"| {' | '.join(cells)} |")
    return "\n".join([*head, *body, ""])


def difference(lines: Sequence[Line], arm: str, day: int, key: str, other: str = "cold") -> str:
    """Mean over seeds of a model's figure minus that of ``other``, with its standard error."""
    mine, theirs = of(lines, arm, day, key), of(lines, other, day, key)
    if arm == other or len(mine) != len(theirs) or not len(mine):
        return ""
    gap = mine - theirs
    error = f" +- {gap.std(ddof=1) / len(gap) ** 0.5:.5f}" if len(gap) > 1 else ""
    return f"{gap.mean():+.5f}{error}"


def draw(path: Path, lines: Sequence[Line]) -> None:
    """AUC by day, a line per model."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("auc", "logloss"), ("AUC", "logloss"), strict=True):
        for arm in dict.fromkeys(r["arm"] for r in lines):
            days = sorted({r["day"] for r in lines if r["arm"] == arm})
            values = [of(lines, arm, d, key) for d in days]
            spread = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in values]
            axis.errorbar(days, [v.mean() for v in values], spread, marker="o", capsize=3, label=arm)
        axis.set_xlabel("day of training; measured on the next one")
        axis.set_ylabel(label)
        axis.set_xticks(sorted({r["day"] for r in lines}))
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    # Below the plots: inside one it would cover points.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=6, frameon=False)
    figure.savefig(path, dpi=120)
