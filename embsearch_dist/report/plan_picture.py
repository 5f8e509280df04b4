"""A picture of plans: bytes and time of every rank, one row of panels per allocation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from embsearch_dist.report.style import Theme, figure, render, short
from embsearch_dist.sharding.infeasible import size
from embsearch_dist.sharding.plan import GIB, MEMORY, TIMES, Plan
from embsearch_dist.sharding.plan_text import ms

MAX_PLANS = 8


def draw_plans(plans: Mapping[str, Plan], directory: Path) -> Path:
    """Write ``DIRECTORY/plan.png``. Equal scales down each column, so that allocations compare by eye."""
    shown = dict(list(plans.items())[:MAX_PLANS])
    render("plan", lambda theme: _draw(theme, shown), directory)
    return directory / "plan.png"


def _draw(theme: Theme, plans: Mapping[str, Plan]) -> Figure:
    topology = next(iter(plans.values())).topology
    fig = figure(0.9 + 1.75 * len(plans))
    panels = fig.subplots(len(plans), 2, squeeze=False, sharex=True)
    most = max(max(p.bytes) for p in plans.values())
    slowest = max(p.step_ms for p in plans.values())
    unit, letters = next(((u, n) for u, n in ((GIB, "GiB"), (1024**2, "MiB"), (1024, "KiB")) if most >= u), (1, "B"))
    budget = topology.budget if topology.budget < 3 * most else None
    for k, (name, plan) in enumerate(plans.items()):
        memory, time = panels[k]
        _stack(theme, memory, [[b / unit for b in plan.per_rank(m)] for m in MEMORY])
        _stack(theme, time, [plan.per_rank(t) for t in TIMES])
        memory.set_ylim(0, 1.12 * max(most, budget or 0) / unit)
        time.set_ylim(0, 1.12 * slowest)
        if budget:
            memory.axhline(budget / unit, color=theme.ink, lw=1, ls="--")
        memory.set_title(f"{short(name, 30)}: at most {size(max(plan.bytes))} on a rank")
        time.set_title(f"predicted step {ms(plan.step_ms)} ms (rank {plan.slowest})")
        memory.set_ylabel(letters)
        time.set_ylabel("ms")
    for axes in panels[-1]:
        axes.set_xlabel("rank")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for names in (MEMORY, TIMES):
        present = [i for i, n in enumerate(names) if any(any(p.per_rank(n)) for p in plans.values())]
        handles: list[Patch | Line2D] = [Patch(color=theme.color(i), label=names[i]) for i in present]
        if budget and names is MEMORY:
            handles.append(Line2D([], [], color=theme.ink, lw=1, ls="--", label="free for tables"))
        place: Literal["outside lower left", "outside lower right"] = "outside lower left"
        if names is TIMES:
            place = "outside lower right"
        fig.legend(handles=handles, loc=place, ncols=5, frameon=False, fontsize=7.5, handlelength=1, columnspacing=1)
    return fig


def _stack(theme: Theme, axes: Axes, parts: list[list[float]]) -> None:
    ranks = range(len(parts[0]))
    below = [0.0] * len(parts[0])
    width = 0.8 if len(parts[0]) <= 64 else 1.0
    for i, part in enumerate(parts):
        axes.bar(ranks, part, width=width, bottom=below, color=theme.color(i))
        below = [b + p for b, p in zip(below, part, strict=True)]
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.7, len(parts[0]) - 0.3)
