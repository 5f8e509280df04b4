"""Pictures of a search's result: allocation, Pareto front, curves, planted truth. Each returns a ``Figure``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from embsearch_dist.report.style import Theme, figure, label_ends, label_points, short, si, si_axis, size_axis
from embsearch_dist.report.summary import Comparison, display_name
from embsearch_dist.schema import Schema

MAX_FIELDS = 120


@dataclass(frozen=True)
class Curve:
    """One line of a curve panel. Curves of one label (seeds) share a colour; ``rank`` -1 is the uniform grey."""

    label: str
    rank: int
    steps: Sequence[float]
    values: Sequence[float]


def allocation(
    theme: Theme,
    widths: Sequence[Mapping[str, int]],
    schema: Schema | None,
    fields: Sequence[str],
    parameters: Mapping[str, float],
) -> Figure:
    """Per field: width (bar: mean, dots: single runs), cardinality, share of the ``parameters`` (the mean)."""
    shown = list(fields)[:MAX_FIELDS]
    mean = {n: statistics.fmean(w[n] for w in widths) for n in shown}
    fig = figure(max(2.2, 0.9 + 0.19 * len(shown)))
    panels = fig.subplots(1, 3 if schema else 1, sharey=True, squeeze=False, width_ratios=[5, 3, 3] if schema else [1])
    left = panels[0][0]
    rows = range(len(shown))
    left.barh(rows, [mean[n] for n in shown], height=0.68, color=theme.color(0))
    if len(widths) > 1:
        for k, name in enumerate(shown):
            left.plot([w[name] for w in widths], [k] * len(widths), "o", ms=3.2, mfc=theme.background, mec=theme.ink)
    for k, name in enumerate(shown):
        end = max(w[name] for w in widths)
        text = "dropped" if end == 0 else f"{mean[name]:.3g}"
        left.annotate(
            text, (end, k), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=theme.muted
        )
    left.set_title("Width found" + (" (mean; dots: each run)" if len(widths) > 1 else ""))
    left.set_xlabel("embedding width (columns)")
    left.margins(x=0.12)
    left.set_xlim(left=0)
    left.set_yticks(rows, [short(n) for n in shown], fontsize=7.5)
    left.set_ylim(len(shown) - 0.4, -0.6)
    if schema is not None:
        cardinality = dict(zip(schema.names, schema.cardinalities, strict=True))
        right = panels[0][2]
        _cardinalities(panels[0][1], [cardinality[n] for n in shown], theme.color(2), theme)
        total = sum(parameters.values()) or 1.0  # of fields that are not drawn, too
        right.barh(rows, [100 * parameters.get(n, 0) / total for n in shown], height=0.68, color=theme.color(1))
        right.set_title("Share of parameters")
        right.set_xlabel("% of all embedding parameters")
        right.set_xlim(left=0)
    _without_y(panels[0])
    return fig


def group_widths(
    theme: Theme, widths: Sequence[Mapping[str, int]], schema: Schema | None, fields: Sequence[str],
    parameters: Sequence[Mapping[str, int]],
) -> Figure:  # fmt: skip
    """Per field: width in each group (dots), cardinality, share of all ``parameters``; none without a schema."""
    shown, count = list(fields)[:MAX_FIELDS], len(widths)
    fig = figure(max(2.4, 1.2 + (0.14 + 0.035 * count) * len(shown)))
    panels = fig.subplots(1, 3 if schema else 1, sharey=True, squeeze=False, width_ratios=[5, 3, 3] if schema else [1])
    left, rows = panels[0][0], range(len(shown))
    left.hlines(
        rows, [min(w[n] for w in widths) for n in shown], [max(w[n] for w in widths) for n in shown],
        color=theme.grid, lw=3,
    )  # fmt: skip
    for k, found in enumerate(widths):
        # Beside each other, or equal widths would hide all dots but the last.
        offset = 0.55 * (k - (count - 1) / 2) / count
        at = [r + offset for r in rows]
        left.plot([found[n] for n in shown], at, "o", ms=4.5, color=theme.color(k), label=f"group {k}")
    left.set_title("Width found")
    left.set_xlabel("embedding width (columns)")
    left.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    left.set_xlim(left=-0.02 * max(1, *(w[n] for w in widths for n in shown)))
    left.set_yticks(rows, [short(n) for n in shown], fontsize=7.5)
    left.set_ylim(len(shown) - 0.4, -0.6)
    if schema is not None:
        cardinality = dict(zip(schema.names, schema.cardinalities, strict=True))
        _cardinalities(panels[0][1], [cardinality[n] for n in shown], theme.uniform, theme)
        right, ends = panels[0][2], [0.0] * len(shown)
        total = sum(sum(own.values()) for own in parameters) or 1
        for k, own in enumerate(parameters):
            shares = [100 * own[n] / total for n in shown]
            right.barh(rows, shares, left=ends, height=0.6, color=theme.color(k))
            ends = [a + b for a, b in zip(ends, shares, strict=True)]
        right.set_title("Share of parameters")
        right.set_xlabel("% of all embedding parameters")
        right.set_xlim(left=0)
    _without_y(panels[0])
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=count, frameon=False)
    return fig


def pareto(
    theme: Theme,
    points: Sequence[Mapping],
    scored: Sequence[Sequence[float]],
    comparison: Comparison | None,
    bayes_auc: float | None,
) -> Figure:
    """Size against quality: what the search scored (left), what retraining gave (right)."""
    searched = bool(points or scored)
    rows = [r for r in comparison.rows if r.parameters and not math.isnan(r.auc.mean)] if comparison else []
    fig = figure(3.9)
    panels = list(fig.subplots(1, int(searched) + int(bool(rows)), squeeze=False)[0])
    if searched:
        _search_panel(theme, panels[0], points, scored)
    if rows and comparison is not None:
        _retrain_panel(theme, panels[-1], comparison, bayes_auc)
    for axes in panels:
        axes.set_xlabel("embedding parameters")
        axes.set_ylabel(axes.get_ylabel() or "AUC")
    # Labels are placed for the final layout, so they come after everything that moves the axes.
    if searched:
        at = [(float(p["parameters"]), float(p["auc"])) for p in points]
        colors = [theme.ink if p.get("chosen") else theme.muted for p in points]
        line = _stairs(front(_known(points, scored)))
        label_points(panels[0], at, [short(str(p["name"]), 22) for p in points], colors, line)
    if rows:
        at = [(float(r.parameters or 0), r.auc.mean) for r in rows]
        colors = [theme.uniform if r.uniform_width is not None else theme.ink for r in rows]
        line = sorted(p for p, r in zip(at, rows, strict=True) if r.uniform_width is not None)
        label_points(panels[-1], at, [short(display_name(r), 22) for r in rows], colors, line)
    return fig


def curves(
    theme: Theme,
    panels: Sequence[tuple[str, str, Sequence[Curve]]],
    columns: int = 3,
    name_ends: bool = True,
    x_label: str = "step",
) -> Figure:
    """Small line plots (title, y label, curves); noisy curves get their running median drawn over them."""
    rows = -(-len(panels) // columns)
    fig = figure(2.35 * rows)
    grid = fig.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, unit, lines) in zip(grid.flat, panels, strict=False):
        ends: dict[str, tuple[float, float, str, str]] = {}
        # Uniform widths are the background of the picture, and many raw curves would only be a smear.
        for line in map(thinned, sorted(lines, key=lambda c: c.rank >= 0)):
            color = theme.uniform if line.rank < 0 else theme.color(line.rank)
            smooth = running_median(line.values)
            width = 1.6 if len(lines) <= 4 else 1.1
            if len(line.values) > 40:
                if len(lines) <= 4:
                    axes.plot(line.steps, line.values, color=color, alpha=0.25, lw=0.7)
                axes.plot(line.steps, smooth, color=color, lw=width)
            else:
                axes.plot(
                    line.steps, line.values, color=color, lw=width, marker="o" if len(line.values) < 15 else "", ms=2.5
                )
            ends[line.label] = (
                line.steps[-1],
                smooth[-1] if len(line.values) > 40 else line.values[-1],
                line.label,
                color,
            )
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(unit)
        axes.margins(x=0.02)
        _zoom(axes, lines)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        si_axis(axes.xaxis)
        if max((abs(v) for line in lines for v in line.values), default=0) >= 10_000:
            si_axis(axes.yaxis)
        if name_ends and len(ends) > 1:
            label_ends(axes, list(ends.values()))
    return fig


def planted(
    theme: Theme, widths: Sequence[Mapping[str, int]], ranks: Mapping[str, float], rhos: Sequence[float | None]
) -> Figure:
    """Found width against planted rank, one dot per field and run; the dashed line is width = rank."""
    names = [n for n in ranks if all(n in w for w in widths)]
    fig = figure(3.9, 6.4)
    axes = fig.subplots()
    stack: dict[tuple[float, float], list[int]] = {}
    at: list[tuple[float, float, int]] = []
    for name in names:
        rank, width = float(ranks[name]), statistics.fmean(w[name] for w in widths)
        # Equal dots are laid side by side, else ten fields look like one.
        beside = stack.setdefault((rank, width), [])
        beside.append(len(at))
        at.append((rank, width, len(beside) - 1))
    span = max((r for r, _, _ in at), default=1.0) or 1.0
    xs = [rank + 0.018 * span * k for rank, _, k in at]
    top = max([*(w for _, w, _ in at), span])
    axes.plot([0, top], [0, top], ls=(0, (4, 4)), lw=1, color=theme.muted)
    if len(widths) > 1:
        for name, x in zip(names, xs, strict=True):
            values = [w[name] for w in widths]
            axes.vlines(x, min(values), max(values), color=theme.color(0), lw=1, alpha=0.5)
    axes.plot(xs, [w for _, w, _ in at], "o", ms=6, color=theme.color(0), mec=theme.background)
    defined = [r for r in rhos if r is not None]
    rho = f"Spearman's rho {statistics.fmean(defined):+.2f}" if defined else "Spearman's rho undefined: all equal"
    axes.set_title(rho + (f" (mean of {len(defined)} runs)" if len(defined) > 1 else ""))
    axes.set_xlabel("planted rank (columns the field needs)")
    axes.set_ylabel("width found (columns)")
    axes.set_xlim(-0.04 * span, span * 1.12)
    axes.set_ylim(bottom=-0.04 * top)
    if len(names) <= 16:
        texts = [""] * len(names)
        for own in stack.values():
            # Of dots side by side the last one has the names of all: labels of their own would lie on one another.
            more = [f"+{len(own) - 4}"] if len(own) > 4 else []
            texts[own[-1]] = ", ".join([short(names[k], 16) for k in own[:4]] + more)
        points = [(x, w) for x, (_, w, _) in zip(xs, at, strict=True)]
        label_points(axes, points, texts, [theme.ink] * len(names))
    return fig


def gate_histograms(
    theme: Theme, steps: Sequence[int], shares: np.ndarray, valleys: Sequence[Sequence[float]]
) -> Figure:
    """Histograms ``shares [steps, bins]`` over time as an image; the first and the last as bars with their valleys."""
    several, bins = len(steps) > 1, shares.shape[1]
    middles = (np.arange(bins) + 0.5) / bins
    fig = figure(3.2, 9.6 if several else 5.0)
    panels = fig.subplots(1, 3 if several else 1, squeeze=False, width_ratios=[4, 3, 3] if several else [1])[0]
    if several:
        # Most gates lie in the two outermost bins; on an even scale all others would look alike.
        norm = PowerNorm(0.5, 0.0, max(float(shares.max()), 1e-9))
        image = panels[0].imshow(
            shares.T, aspect="auto", origin="lower", extent=(-0.5, len(steps) - 0.5, 0, 1), norm=norm,
            cmap=matplotlib.colormaps[theme.map], interpolation="nearest",
        )  # fmt: skip
        stroke = withStroke(linewidth=3, foreground="#10141a")
        panels[0].plot(shares @ middles / shares.sum(1), color="#ffffff", lw=1.4, path_effects=[stroke])
        ticks = sorted({round(k * (len(steps) - 1) / 4) for k in range(5)})
        panels[0].set_xticks(ticks, [si(steps[t]) for t in ticks])
        panels[0].grid(False)
        panels[0].set_title("Over time")
        panels[0].set_xlabel("step")
        panels[0].set_ylabel("probability of a gate")
        fig.colorbar(image, ax=panels[0], pad=0.02, fraction=0.05, label="share of gates", format="%.2g")
    for axes, k, name in zip(panels[-2:], [0, -1][-len(panels) :], ["First", "Last"][-len(panels) :], strict=True):
        axes.bar(middles, 100 * shares[k], width=0.9 / bins, color=theme.color(0))
        axes.set_title(f"{name}: step {steps[k]:,}")
        axes.set_xlabel("probability of a gate")
        axes.set_ylabel("% of gates")
        axes.set_xlim(0, 1)
        axes.grid(axis="x", visible=False)
        for valley in valleys[k]:
            axes.axvline(valley, color=theme.color(1), lw=1.2, ls=(0, (4, 3)))
    return fig


def thinned(curve: Curve, limit: int = 800) -> Curve:
    """At most ``limit`` points: medians of equal stretches. A picture has no more columns to show."""
    size = len(curve.values)
    if size <= limit:
        return curve
    edges = [k * size // limit for k in range(limit + 1)]
    spans = list(zip(edges, edges[1:], strict=False))
    return Curve(
        curve.label,
        curve.rank,
        [statistics.median(curve.steps[a:b]) for a, b in spans],
        [statistics.median(curve.values[a:b]) for a, b in spans],
    )


def running_median(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Median over a centred window of about a twentieth of the curve; robust to the spikes a mean would smear."""
    half = max(1, int(len(values) * share / 2))
    return [statistics.median(values[max(0, k - half) : k + half + 1]) for k in range(len(values))]


def front(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The (size, quality) pairs no other one beats: quality rises strictly with size."""
    best: list[tuple[float, float]] = []
    for size, quality in sorted(((float(p[0]), float(p[1])) for p in points), key=lambda p: (p[0], -p[1])):
        if not best or quality > best[-1][1]:
            best.append((size, quality))
    return best


def _cardinalities(axes: Axes, values: Sequence[int], color: str, theme: Theme) -> None:
    rows = range(len(values))
    axes.hlines(rows, 1, values, color=theme.grid, lw=1.2)
    axes.plot(values, rows, "o", ms=4.5, color=color)
    axes.set_xscale("log")
    si_axis(axes.xaxis)
    axes.set_title("Cardinality")
    axes.set_xlabel("different values (log)")


def _without_y(panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)


def _known(points: Sequence[Mapping], scored: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    named = [(float(p["parameters"]), float(p["auc"])) for p in points]
    return named + [(float(s[0]), float(s[1])) for s in scored]


def _stairs(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a front drawn as steps."""
    corners = list(line[:1])
    for (_, below), (size, quality) in zip(line, line[1:], strict=False):
        corners += [(size, below), (size, quality)]
    return corners


def _search_panel(theme: Theme, axes: Axes, points: Sequence[Mapping], scored: Sequence[Sequence[float]]) -> None:
    named = [(float(p["parameters"]), float(p["auc"])) for p in points]
    cloud = [(float(s[0]), float(s[1])) for s in scored]
    if cloud:
        axes.plot(*zip(*cloud, strict=True), ".", ms=2.6, color=theme.cloud, alpha=0.6, zorder=1)
    line = _stairs(front([*named, *cloud]))
    axes.plot(*zip(*line, strict=True), color=theme.color(0), zorder=2)
    if named:
        axes.plot(*zip(*named, strict=True), "o", ms=4, color=theme.color(0), mec=theme.background, zorder=3)
    chosen = [n for n, p in zip(named, points, strict=True) if p.get("chosen")]
    if chosen:
        axes.plot(*zip(*chosen, strict=True), "D", ms=7, color=theme.color(1), mec=theme.background, zorder=4)
    axes.set_title("Search: subnets with shared weights")
    axes.set_ylabel("validation AUC (inherited weights)")
    size_axis(axes, [x for x, _ in (*named, *cloud)])
    if len(cloud) > 100:
        # The worst few subnets would flatten the front, which is what the picture is about.
        low = sorted(y for _, y in cloud)[len(cloud) // 50]
        high = max(y for _, y in (*named, *cloud))
        axes.set_ylim(bottom=min([low, *(y for _, y in named)]) - 0.04 * (high - low), top=high + 0.08 * (high - low))


def _retrain_panel(theme: Theme, axes: Axes, comparison: Comparison, bayes_auc: float | None) -> None:
    for row in comparison.rows:
        size, spread = row.parameters, row.auc
        if not size or math.isnan(spread.mean):
            continue
        plain = row.uniform_width is not None
        color = theme.uniform if plain else theme.color(1)
        axes.errorbar(
            size, spread.mean, yerr=spread.sd, fmt="s" if plain else "D", ms=5.5 if plain else 7, color=color,
            mec=theme.background, capsize=3, lw=1.2, zorder=3,
        )  # fmt: skip
    uniform = [r for r in comparison.rows if r.uniform_width is not None and not math.isnan(r.auc.mean)]
    for begun, style in ((False, "-"), (True, ":")):
        of_kind = sorted((r.parameters or 0, r.auc.mean) for r in uniform if r.finetuned is begun)
        if len(of_kind) > 1:
            axes.plot(*zip(*of_kind, strict=True), color=theme.uniform, lw=1, ls=style, zorder=1)
    if bayes_auc is not None:
        axes.axhline(bayes_auc, color=theme.muted, lw=1, ls=(0, (4, 4)))
        axes.annotate(
            f"best possible {bayes_auc:.4f}", (0.02, bayes_auc), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", color=theme.muted, fontsize=7.5,
        )  # fmt: skip
    axes.set_title("Retrained")
    axes.set_ylabel(f"{comparison.split} AUC")
    size_axis(axes, [float(r.parameters) for r in comparison.rows if r.parameters])
    axes.margins(x=0.12, y=0.12)
    axes.ticklabel_format(axis="y", useOffset=False)


def _zoom(axes: Axes, lines: Sequence[Curve]) -> None:
    """Leave the first steep descent out of the picture where it would flatten the rest of a long curve."""
    late = [v for line in lines if len(line.values) > 40 for v in line.values[len(line.values) // 50 :]]
    if not late:
        return
    ordered = sorted(late)
    low, high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
    pad = 0.08 * (high - low)
    if pad > 0:
        axes.set_ylim(low - pad, high + pad)
