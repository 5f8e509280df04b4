"""The pictures of a league: quality against size, search cost, stability, and the diagram of critical differences."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embsearch_dist.report.style import Draw, Theme, figure, render, size_axis
from tools.league.ranks import Ranking
from tools.league.rows import UNIFORM, Group
from tools.league.tables import FIGURES, cost_of, ranking_of, stability_of

MARKERS = "Do^vsPXp<>"  # with six colours thirty methods have looks of their own
SIZES = {"parameters": "embedding parameters", "served_int8_bytes": "bytes of all tables at int8"}
SHORT = {"parameters": "parameters", "served_int8_bytes": "int8"}
Look = tuple[str, str]  # colour and marker


def draw_all(groups: Sequence[Group], out: Path) -> list[Path]:
    """Write every picture that the lines are enough for; gives the files."""
    names, methods = [], list(dict.fromkeys(m for g in groups for m in g.methods))

    def write(name: str, draw: Draw) -> None:
        render(name, draw, out)
        names.append(out / f"{name}.png")

    for group in groups:
        for size in SIZES:
            if all(r.get(size) for r in group.rows):
                name = f"{group.name}-{group.backbone}-{SHORT[size]}"
                write(name, lambda theme, g=group, s=size: draw_quality(theme, g, s, looks(theme, methods)))
    if any(cost_of(g) for g in groups):
        write("cost", lambda theme: draw_costs(theme, groups))
    if any(len(g.seeds) > 1 and g.methods for g in groups):
        write("stability", lambda theme: draw_stability(theme, groups))
    found = [(FIGURES[f][0], r) for f in FIGURES if (r := ranking_of(groups, f)) and not math.isnan(r.chi2)]
    if found:
        write("ranks", lambda theme: draw_ranks(theme, found))
    return names


def looks(theme: Theme, methods: Sequence[str]) -> dict[str, Look]:
    """A colour and a marker for each method, the same in all pictures."""
    many = len(theme.series)
    return {m: (theme.color(k), MARKERS[(k // many + k) % len(MARKERS)]) for k, m in enumerate(methods)}


def draw_quality(theme: Theme, group: Group, size: str, look: dict[str, Look]) -> Figure:
    """AUC and logloss against a size; bars are one standard error over seeds, lines join the budgets of a method.

    What lies far below the others (:func:`window`) would press them into one line: its figures are written below.
    """
    columns = 7
    drawn = {key: _points(group, size, key) for key in FIGURES}
    windows = {key: window(key, [p for name in points for p in points[name]]) for key, points in drawn.items()}
    notes = [line for key in FIGURES for line in _left_out(key, drawn[key], windows[key])]
    fig = figure(4.2 + 0.18 * math.ceil((len(group.methods) + 1) / columns) + 0.14 * len(notes))
    panels = fig.subplots(1, 2)
    for axes, key in zip(panels, FIGURES, strict=True):
        for method, points in drawn[key].items():
            color, marker = look.get(method, (theme.uniform, "s"))
            curve(axes, points, color, marker, method)
        axes.set_xlabel(SIZES[size])
        axes.set_title(FIGURES[key][0])
        size_axis(axes, [p.size for points in drawn[key].values() for p in points])
        axes.margins(x=0.06, y=0.1)
        if windows[key]:
            axes.set_ylim(*windows[key])
        axes.yaxis.get_major_formatter().set_useOffset(False)
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
    seeds = f"{len(group.seeds)} seeds" if len(group.seeds) > 1 else "one seed"
    fig.supxlabel("\n".join([f"{group.title}, {seeds}", *notes]), fontsize=8.5, color=theme.muted)
    return fig


class Point(NamedTuple):
    """A model of the picture: its label, mean size, mean figure and its standard error over seeds."""

    label: str
    size: float
    mean: float
    error: float


def _points(group: Group, size: str, key: str) -> dict[str, list[Point]]:
    """Method -> its models from small to large; ``uniform`` comes first."""
    found: dict[str, list[Point]] = {}
    for method in [UNIFORM, *group.methods]:
        points = []
        for label in (label for m, label in group.models if m == method):
            rows = group.of(method, label)
            values = [float(r[key]) for r in rows]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            points.append(Point(label, statistics.fmean(float(r[size]) for r in rows), statistics.fmean(values), error))
        found[method] = sorted(points, key=lambda p: p.size)
    return found


def window(key: str, points: Sequence[Point]) -> tuple[float, float] | None:
    """Limits of the axis that leave out means beyond Tukey's fence (1.5 times the distance of the quartiles) on the
    side of the worse models; None where no mean lies there. Better ones are always inside."""
    sign = 1.0 if FIGURES[key][1] else -1.0  # from here on more is better
    ordered = sorted(sign * p.mean for p in points)
    if len(ordered) < 4:
        return None
    first, _, third = statistics.quantiles(ordered, n=4, method="inclusive")
    fence = first - 1.5 * (third - first)
    inside = [p for p in points if sign * p.mean >= fence]
    if len(inside) == len(points):
        return None
    reach = [end for p in inside for end in (p.mean - p.error, p.mean + p.error)]
    # A bar of a wide spread is cut at the fence, too.
    low, high = (max(min(reach), fence), max(reach)) if sign > 0 else (min(reach), min(max(reach), -fence))
    edge = 0.08 * (high - low) or abs(high) * 1e-3
    return low - edge, high + edge


def _left_out(key: str, points: Mapping[str, Sequence[Point]], limits: tuple[float, float] | None) -> list[str]:
    """Lines that tell the means outside the window."""
    if limits is None:
        return []
    told = []
    for method, models in points.items():
        name = "UES-" if method == UNIFORM else ""
        out = [f"{name}{p.label} {p.mean:.4f}" for p in models if not limits[0] <= p.mean <= limits[1]]
        told += [f"{method} {', '.join(out)}"] if out else []
    return textwrap.wrap(f"{FIGURES[key][0]} not shown: {'; '.join(told)}", 135)


def curve(axes: Axes, points: Sequence[Point], color: str, marker: str, label: str) -> None:
    """Draw one method, a point per budget or width."""
    if not points:
        return
    plain = label == UNIFORM
    style: dict[str, Any] = {
        "ls": "-" if plain else "--",
        "lw": 1.4 if plain else 0.9,
        "ms": 6.5,
        "mec": axes.get_facecolor(),
    }
    x, y, errors = [p.size for p in points], [p.mean for p in points], [p.error for p in points]
    axes.errorbar(x, y, yerr=errors, marker=marker, color=color, capsize=2, label=label, **style)


def draw_costs(theme: Theme, groups: Sequence[Group]) -> Figure:
    """Search cost of each method, a mark per data set; bars are one standard deviation over seeds."""
    found = {g.title: cost_of(g) for g in groups}
    means = {m: statistics.fmean(statistics.fmean(c[m]) for c in found.values() if m in c)
             for m in dict.fromkeys(m for c in found.values() for m in c)}  # fmt: skip
    methods = sorted(means, key=lambda m: -means[m])
    fig = figure(1.3 + (0.24 + 0.05 * len(found)) * len(methods))
    axes = fig.subplots()
    for place, (title, (color, marker)) in enumerate(looks(theme, list(found)).items()):
        costs, aside = found[title], 0.12 * ((len(found) - 1) / 2 - place)
        here = [(costs[m], k + aside) for k, m in enumerate(methods) if m in costs]
        own = [(statistics.fmean(values), at, deviation(values)) for values, at in here]
        if own:
            x, y, errors = zip(*own, strict=True)
            style: dict[str, Any] = {"ls": "none", "ms": 6, "capsize": 2, "mec": theme.background}
            axes.errorbar(x, y, xerr=errors, marker=marker, color=color, label=title, **style)
    axes.axvline(1.0, color=theme.muted, lw=1.0)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    references = sorted({r["cost_reference"] for g in groups for r in g.rows if r.get("cost_reference")})
    axes.set_xlabel(f"search of all budgets, in trainings of {' or '.join(references)}")
    legend_for(fig, axes, list(found))
    return fig


def legend_for(fig: Figure, axes: Axes, names: Sequence[str]) -> None:
    """A legend above the picture where it tells apart more than one; the single name as a title otherwise."""
    if len(names) > 1:
        fig.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    else:
        axes.set_title(names[0])


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw_stability(theme: Theme, groups: Sequence[Group]) -> Figure:
    """Share of fields with the same width in two seeds, for each method and data set: a mark per budget."""
    shown = [g for g in groups if len(g.seeds) > 1 and g.methods]
    budgets = list(dict.fromkeys(b for g in shown for b in g.budgets))
    methods = list(dict.fromkeys(m for g in shown for m in g.methods))
    rows = math.ceil(len(shown) / 3)
    fig = figure(1.1 + rows * (0.6 + 0.24 * len(methods)))
    panels = fig.subplots(rows, min(3, len(shown)), squeeze=False, sharey=True).ravel()
    for axes, group in zip(panels, shown, strict=False):
        for place, (budget, (color, marker)) in enumerate(looks(theme, budgets).items()):
            aside = 0.16 * (place - (len(budgets) - 1) / 2)  # equal shares lie beside each other
            found = [(stability_of(group, m, budget).agreement, k + aside) for k, m in enumerate(methods)]
            points = [(a, k) for a, k in found if not math.isnan(a)]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker, color=color, ms=6, mec=theme.background, label=budget, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_title(group.title)
        axes.set_xlabel("fields of the same width in two seeds")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, frameon=False)
    return fig


def draw_ranks(theme: Theme, rankings: Sequence[tuple[str, Ranking]]) -> Figure:
    """Mean ranks on a line, the best at the left; a bar joins methods that Nemenyi's test does not tell apart."""
    tall = [0.75 + 0.2 * (math.ceil(len(r.methods) / 2) + len(r.cliques())) for _, r in rankings]
    fig = figure(sum(tall) + 0.2)
    panels = fig.subplots(len(rankings), 1, squeeze=False, height_ratios=tall)[:, 0]
    for axes, (name, ranking) in zip(panels, rankings, strict=True):
        _draw_ranking(theme, axes, name, ranking)
    return fig


def _draw_ranking(theme: Theme, axes: Axes, name: str, ranking: Ranking) -> None:
    """One diagram; y counts lines of text below the scale."""
    many, bars = len(ranking.methods), ranking.cliques()
    half = math.ceil(many / 2)
    below = 0.6 + 0.8 * len(bars)  # bars lie between the scale and the names
    for k, (first, last) in enumerate(bars):
        at = 0.6 + 0.8 * k
        left, right = ranking.ranks[first] - 0.04, ranking.ranks[last] + 0.04
        axes.plot([left, right], [at, at], color=theme.series[1], lw=3.5, solid_capstyle="butt")
    low, high = 1.0, float(many)
    for k, (method, mean) in enumerate(zip(ranking.methods, ranking.ranks, strict=True)):
        left = k < half
        y = below + 0.6 + (k if left else many - 1 - k)
        end = low - 0.15 if left else high + 0.15
        axes.plot([mean, mean, end], [0, y, y], color=theme.ink, lw=0.9)
        axes.annotate(
            f"{method}  {mean:.2f}" if left else f"{mean:.2f}  {method}",
            (end, y), xytext=(-4 if left else 4, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
    axes.plot([low, high], [0, 0], color=theme.muted, lw=1.0)
    for tick in range(1, many + 1):
        axes.plot([tick, tick], [-0.18, 0], color=theme.muted, lw=1.0)
        axes.annotate(str(tick), (tick, -0.3), ha="center", va="bottom", color=theme.muted, fontsize=8)
    axes.plot([low, low + ranking.distance], [-1.5, -1.5], color=theme.muted, lw=2.0, clip_on=False)
    axes.annotate(
        f"critical difference {ranking.distance:.2f}", (low + ranking.distance, -1.5), xytext=(5, 0),
        textcoords="offset points", va="center", color=theme.muted, fontsize=8, annotation_clip=False,
    )  # fmt: skip
    axes.set_title(f"mean rank by {name}, {ranking.blocks} blocks", pad=10)
    axes.set_xlim(low - 0.28 * (high - low), high + 0.28 * (high - low))
    axes.set_ylim(below + 0.9 + half - 1 + 0.4, -2.0)
    axes.axis("off")
