"""What a search by instances leaves: gates over time, groups of rows, the widths and the model of each group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embsearch_dist.allocation import cost
from embsearch_dist.report import page, plots
from embsearch_dist.report.page import Cell, Section
from embsearch_dist.report.plots import Curve
from embsearch_dist.report.result import Result
from embsearch_dist.report.runs import Group, Run, series
from embsearch_dist.report.style import Theme, figure, render, short
from embsearch_dist.report.summary import Comparison, display_name, percent
from embsearch_dist.report.uniform import sizes_of
from embsearch_dist.schema import SPLITS, Schema

GATES, KEPT = ("gates", "probabilities"), ("groups", "kept")
ALIKE = 0.05  # of the columns: groups that differ in no more are the same
MAX_DOTS = 6  # groups whose colours can be told apart
MAX_NUMBERS = 16  # columns of a matrix that have room for a number each
LEAST, LOW = 0.01, 0.5  # share of the gates beside a valley; its height over that of the lower peak


@dataclass(frozen=True)
class Peak:
    """One peak of a histogram of gate probabilities: its top, where it ends (the next valley), its share."""

    top: float
    end: float
    share: float


def elsewhere(line: Mapping[str, Any]) -> bool:
    """Whether a heat map is drawn here rather than among the probabilities over time."""
    return (line.get("stage"), line.get("name")) in (GATES, KEPT)


def headline(runs: Sequence[Run]) -> str | None:
    """The result of a search in groups before any model was evaluated; None without groups."""
    run = next((r for r in runs if r.groups), None)
    if run is None:
        return None
    text = f"The search put the rows into {len(run.groups)} groups"
    if len(run.groups) <= 4:
        text += f" ({_listed([percent(s) for s in shares_of(run.groups)])} of the training rows)"
    text += " and chose widths for each"
    sizes = sizes_of([run])
    if run.schema is not None and sizes is not None:
        share = sum(sum(_parameters(g, run.schema).values()) for g in run.groups) / sizes.reference
        text += f", together {percent(share)} of UES-32's embedding parameters without the router"
    return text + "; no retrained model has been evaluated, so whether they predict as well is open."


def gates(runs: Sequence[Run], directory: Path) -> Section | None:
    """Histograms of the gate probabilities while the gates learn (iHAS, Fig. 3)."""
    run = next((r for r in runs if _histograms(r)[0]), None)
    if run is None:
        return None
    steps, shares = _histograms(run)
    first, last = peaks(shares[0]), peaks(shares[-1])
    valleys = [[p.end for p in found[:-1]] for found in (first, last)]
    image = render("gates", lambda t: plots.gate_histograms(t, steps, shares, valleys), directory)
    text = f"The last histogram (step {steps[-1]:,}) has {_count(last)}: "
    text += _listed([f"{percent(p.share)} of the gates around {p.top:.2f}" for p in last])
    if len(last) == 2:
        text += f", with the valley at {last[0].end:.2f}. Open and closed gates stand apart"
    elif len(last) == 1:
        text += ". Open and closed gates do not stand apart, so a threshold between them says little"
    text += f". The first (step {steps[0]:,}) has {_count(first)}." if len(steps) > 1 else "."
    caption = (
        "How the probabilities of the gates spread, over the rows of a held-out batch and all embedding columns"
        + ("; left: over time, the line is their mean (the dark end of the colours is stretched)" * (len(steps) > 1))
        + ". A row keeps what lies above the first valley of its own histogram, so there should be a peak of closed "
        "gates near 0 and one of open gates near 1. A valley counts here where it is at most half as high as the lower "
        f"of its two peaks, each with at least 1% of the gates, after averaging over three bins. {_label(run, runs)}"
    )
    body = page.picture(image, caption, "Histograms of the gate probabilities")
    return Section("gates", "Gates", page.paragraph(text) + body)


def found(runs: Sequence[Run], directory: Path) -> Section | None:
    """The groups: their sizes, their widths, what they keep of each field (iHAS, Fig. 5), how K-means went."""
    run = next((r for r in runs if r.groups), None) or next((r for r in runs if _kept(r) is not None), None)
    if run is None:
        return None
    groups, schema = run.groups, run.schema
    body = _sizes(runs)
    for one in (r for r in runs if len(r.groups) > 1):
        other, columns = differing_columns([g.widths for g in one.groups])
        if other <= ALIKE * columns:
            body += page.missing(
                f"Nothing found to tell rows apart: the groups of {one.label} differ in {other} of {columns} columns. "
                "One model for all rows does the same for less."
            )
    if 0 < len(groups) <= MAX_DOTS:
        fields, widths = list(groups[0].widths), [g.widths for g in groups]
        caption = "The width of each field's embedding in each group's model; 0 means the field is dropped. "
        if schema is not None:
            cardinality = dict(zip(schema.names, schema.cardinalities, strict=True))
            fields.sort(key=lambda n: -cardinality[n])
            caption += "Fields are ordered by cardinality, how many different values they take. "
        if len(fields) > plots.MAX_FIELDS:
            caption += f"The first {plots.MAX_FIELDS} of {len(fields)} fields are drawn; the table has all. "
        size = [_parameters(g, schema) for g in groups] if schema is not None else []
        image = render("group-widths", lambda t: plots.group_widths(t, widths, schema, fields, size), directory)
        body += page.picture(image, caption + _label(run, runs), "Dots: embedding width per field and group")
    body += _kept_picture(run, runs, directory) + _distances(runs, directory)
    if groups:
        every = [(f"{_of(r, runs)}group {k}", g.widths) for r in runs for k, g in enumerate(r.groups)]
        rows = [("", [Cell(n, css="text"), *(Cell(str(w.get(n, "-"))) for _, w in every)]) for n in groups[0].widths]
        table = page.table(["Field", *(name for name, _ in every)], rows, (0,))
        body += page.folded("All widths as a table", table)
    return Section("groups", "Groups" if groups else "Kept per field", body) if body else None


def differing_columns(widths: Sequence[dict[str, int]]) -> tuple[int, int]:
    """Columns that some groups keep and others do not, and columns in all; by field the widest group counts."""
    every = [[w.get(name, 0) for w in widths] for name in widths[0]]
    return sum(max(w) - min(w) for w in every), sum(max(w) for w in every)


def routed(comparison: Comparison) -> str:
    """A table and a line about the router for each routed result; empty without one."""
    body = ""
    for row in comparison.rows:
        results = [r for r in row.results if r.groups]
        if not results:
            continue
        lines, routers = [], ""
        for result in results:
            seed = f"seed {result.seed}, " * (len(results) > 1 and result.seed is not None)
            rows = sum(float(g.get("rows") or 0) for g in result.groups) or 1.0
            for k, g in enumerate(result.groups):
                share = percent(float(g.get("rows") or 0) / rows)
                lines.append(("", [Cell(f"{seed}group {k}"), *_result_cells(g, share)]))
            lines.append(("base", [Cell(seed + _together(result)), *_result_cells(result.numbers, "100%")]))
            routers += _router(result, seed)
        head = ["Group", f"Rows ({comparison.split})", "Share", "AUC", "Logloss", "Embedding parameters"]
        body += f"<h3>{escape(display_name(row))}: a model for each group</h3>" + page.table(head, lines) + routers
    if body:
        note = (
            "The AUC of all groups together compares rows of different groups as well, so it is no mean of theirs. "
            "Agreement: share of the rows that the router sends where the search had put them."
        )
        body += page.paragraph(note, "note")
    return body


def peaks(shares: Sequence[float] | np.ndarray) -> list[Peak]:
    """The peaks of a histogram over [0, 1], left to right.

    Every histogram has local minima of noise, so a valley counts where it is at most half as high as the lower of
    the peaks beside it, with 1% of all on either side, after averaging over three bins.

    Args:
        shares: ``[bins]``, not negative, not all 0.
    """
    raw = np.asarray(shares, dtype=float)
    raw = raw / raw.sum()
    wide = np.concatenate([raw[:1], raw, raw[-1:]])
    spans = _split(raw, (wide[:-2] + wide[1:-1] + wide[2:]) / 3, 0, len(raw))
    tops = [start + int(raw[start:stop].argmax()) for start, stop in spans]
    size = len(raw)
    return [
        Peak((top + 0.5) / size, stop / size, float(raw[start:stop].sum()))
        for top, (start, stop) in zip(tops, spans, strict=True)
    ]


def _split(raw: np.ndarray, smooth: np.ndarray, start: int, stop: int) -> list[tuple[int, int]]:
    """Bins ``[start, stop)`` cut at their deepest valley, and the parts again."""
    depths: dict[int, float] = {}
    for k in range(start + 1, stop - 1):
        lower = min(smooth[start:k].max(), smooth[k + 1 : stop].max())
        enough = min(raw[start:k].sum(), raw[k + 1 : stop].sum()) >= LEAST
        if enough and smooth[k] <= LOW * lower:
            depths[k] = float(lower - smooth[k])
    if not depths:
        return [(start, stop)]
    deepest = [k for k, depth in depths.items() if depth >= max(depths.values()) - 1e-12]
    flat = max(np.split(np.array(deepest), np.flatnonzero(np.diff(deepest) > 1) + 1), key=len)
    cut = int(flat[len(flat) // 2]) + 1  # the middle of a flat valley
    return _split(raw, smooth, start, cut) + _split(raw, smooth, cut, stop)


def _histograms(run: Run) -> tuple[list[int], np.ndarray]:
    """Steps, and ``[steps, bins]`` shares of the gates; of two records of a step the later one counts."""
    found: dict[int, list[float]] = {}
    for line in run.heatmaps:
        if (line.get("stage"), line.get("name")) == GATES and line.get("values") and "step" in line:
            shares = line["values"][0]
            if shares and None not in shares and sum(shares) > 0:
                found[int(line["step"])] = shares
    steps = sorted(s for s in found if len(found[s]) == len(found[max(found)]))
    return steps, np.array([found[s] for s in steps], dtype=float)


def _kept(run: Run) -> dict[str, Any] | None:
    """The last record of what each group keeps of each field."""
    lines = [x for x in run.heatmaps if (x.get("stage"), x.get("name")) == KEPT and x.get("values") and x.get("rows")]
    return lines[-1] if lines else None


def _kept_picture(run: Run, runs: Sequence[Run], directory: Path) -> str:
    line = _kept(run)
    if line is None:
        return ""
    rows = zip(line["rows"], line["values"], strict=True)
    share = {str(n): [np.nan if v is None else float(v) for v in row] for n, row in rows}
    names = run.schema.names if run.schema is not None and set(run.schema.names) == set(share) else list(share)
    values = np.array([share[n] for n in names])
    widths = [g.widths for g in run.groups] or ([run.widths] if run.widths is not None else [])
    texts: list[list[str]] = []
    if len(widths) == values.shape[1] <= MAX_NUMBERS:
        texts = [[str(w.get(n, "")) for w in widths] for n in names]
    columns = [f"group {k}" for k in range(values.shape[1])]
    if len(run.groups) == len(columns) > 1:
        columns = [f"{c}\n{percent(s)} of rows" for c, s in zip(columns, shares_of(run.groups), strict=True)]
    image = render("group-kept", lambda t: _draw_kept(t, names, columns, values, texts), directory)
    caption = "Colour: share of a field's columns that are open, mean over the rows of the group. "
    if texts:
        caption += (
            "Number: the width the field gets; iHAS counts the columns that are open in enough rows "
            "(search.groups.keep), ihas_widths measures what a width saves. "
        )
    caption += f"Fields stand in the order of the schema. {_label(run, runs)}"
    return page.picture(image, caption, "Kept per field and group")


def _sizes(runs: Sequence[Run]) -> str:
    """Rows of each split, share and size of each group."""
    splits = [s for s in SPLITS if any(s in g.rows for r in runs for g in r.groups)]
    lines = []
    for run in (r for r in runs if r.groups):
        for k, (g, share) in enumerate(zip(run.groups, shares_of(run.groups), strict=True)):
            cells = [Cell(f"{_of(run, runs)}group {k}"), *(Cell(f"{g.rows.get(s, 0):,}") for s in splits)]
            cells += [Cell(percent(share)), Cell(f"{sum(w > 0 for w in g.widths.values())} of {len(g.widths)}")]
            cells.append(Cell(f"{sum(_parameters(g, run.schema).values()):,}" if run.schema is not None else "-"))
            lines.append(("", cells))
    if not lines:
        return ""
    head = ["Group", *(f"{s.capitalize()} rows" for s in splits), "Share of training rows", "Fields kept"]
    text = "Rows that the search takes for alike form a group, and each group gets a model of its own."
    return page.paragraph(text) + page.table([*head, "Embedding parameters"], lines)


def _distances(runs: Sequence[Run], directory: Path) -> str:
    """How K-means went: a sentence for a few passes, a curve for many."""
    curves = [Curve(r.label, k, *series(r.metrics, "distance", "groups")) for k, r in enumerate(runs)]
    curves = [c for c in curves if c.steps]
    what = "Squared distance of a training row to the centre of its group, mean of each pass of K-means"
    if not curves:
        return ""
    if max(len(c.steps) for c in curves) <= 3:
        said = []
        for c in curves:
            passes = [f"{v:.4g} (pass {int(s) + 1})" for s, v in zip(c.steps, c.values, strict=True)]
            said.append(f"{c.label}: " * (len(runs) > 1) + ", ".join(passes))
        return page.paragraph(f"{what}: {'; '.join(said)}.")
    counted = [Curve(c.label, c.rank, [s + 1 for s in c.steps], c.values) for c in curves]
    panel = ("K-means", "mean squared distance", counted)
    image = render("group-distance", lambda t: plots.curves(t, [panel], 1, x_label="pass"), directory)
    return page.picture(image, f"{what}. It should fall and level off.", "Distance over passes")


def _draw_kept(
    theme: Theme, names: Sequence[str], columns: Sequence[str], values: np.ndarray, texts: Sequence[Sequence[str]]
) -> Figure:
    fig = figure(_height(len(names)), min(9.6, 3.4 + 0.95 * len(columns)))
    axes = fig.subplots()
    image = _cells(axes, values, texts, 1.0, theme)
    _labels(axes, names, columns, len(columns) > 8)
    bar = fig.colorbar(image, ax=axes, shrink=0.9, pad=0.02, fraction=0.04, label="share of open columns")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return fig


def draw_planted(
    theme: Theme, fields: Sequence[str], panels: Sequence[tuple[str, Sequence[str], np.ndarray]]
) -> Figure:
    """Matrices (title, columns, numbers) over the same fields, side by side."""
    count = sum(len(columns) for _, columns, _ in panels)
    fig = figure(_height(len(fields)) + 0.3, min(9.6, 2.4 + 1.3 * count))
    drawn = fig.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=[len(c) for _, c, _ in panels])[0]
    for axes, (title, columns, values) in zip(drawn, panels, strict=True):
        texts = [[f"{v:g}" for v in row] for row in values] if len(columns) <= MAX_NUMBERS else []
        _cells(axes, values, texts, float(values.max(initial=1.0)), theme)
        _labels(axes, fields, columns, count > 8)
        axes.set_title(title)
    return fig


def _cells(axes: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], high: float, theme: Theme) -> Any:
    """A matrix as an image with a text in each cell."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    cmap = matplotlib.colormaps[theme.map].with_extremes(bad=theme.grid)
    for i, row in enumerate(texts if len(values) <= plots.MAX_FIELDS else ()):
        for j, text in enumerate(row):
            # Viridis is dark below its middle and light above: the ink follows the cell, not the theme.
            ink = "#10141a" if values[i, j] > 0.55 * high else "#ffffff"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
    masked = np.ma.masked_invalid(values)
    return axes.imshow(masked, aspect="auto", cmap=cmap, vmin=0.0, vmax=high, interpolation="nearest")


def _labels(axes: Axes, rows: Sequence[str], columns: Sequence[str], upright: bool) -> None:
    every = -(-len(rows) // 90)
    axes.set_yticks(range(0, len(rows), every), [short(n) for n in rows[::every]], fontsize=7.5)
    names = [c.replace("\n", ", ") if upright else c for c in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=7.5, rotation=90 if upright else 0)


def _height(rows: int) -> float:
    return min(max(1.9, 1.0 + 0.19 * rows), 16.0)


def _result_cells(numbers: Mapping[str, Any], share: str) -> list[Cell]:
    def cell(key: str, form: str) -> Cell:
        value = numbers.get(key)
        told = isinstance(value, int | float) and math.isfinite(value)
        return Cell(format(value, form) if told else "-")

    measured = [cell("auc", ".4f"), cell("logloss", ".4f"), cell("embedding_parameters", ",.0f")]
    return [cell("rows", ",.0f"), Cell(share), *measured]


def _together(result: Result) -> str:
    """Names the line of all groups, by whether its parameters are those of the groups alone."""
    own = sum(float(g.get("embedding_parameters") or 0) for g in result.groups)
    router = float(result.router.get("embedding_parameters") or 0)
    counted = router and result.numbers.get("embedding_parameters") == own + router
    return "all groups and router" if counted else "all groups"


def _router(result: Result, seed: str) -> str:
    router = result.router
    if not router:
        return ""
    parts = [f"Router: {seed}{router.get('kind') or 'kind not recorded'}"]
    if isinstance(router.get("embedding_parameters"), int | float):
        parts.append(f"{router['embedding_parameters']:,.0f} embedding parameters of its own")
    if isinstance(router.get("agreement"), int | float):
        parts.append(f"agreement {router['agreement']:.1%}")
    if isinstance(router.get("share_of_time"), int | float):
        parts.append(f"{percent(router['share_of_time'])} of the time of a prediction")
    return page.paragraph("; ".join(parts) + ".")


def _count(found: Sequence[Peak]) -> str:
    return {1: "one peak", 2: "two peaks", 3: "three peaks"}.get(len(found), f"{len(found)} peaks")


def _listed(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


def shares_of(groups: Sequence[Group]) -> list[float]:
    """Share of the training rows that each group has."""
    total = sum(g.rows.get("train", 0) for g in groups) or 1
    return [g.rows.get("train", 0) / total for g in groups]


def _parameters(group: Group, schema: Schema) -> dict[str, int]:
    """Of each table of a group."""
    return {f.name: cost("parameters", f.cardinality, group.widths[f.name], group.extra) for f in schema.fields}


def _label(run: Run, runs: Sequence[Run]) -> str:
    return f"Shown for {run.label}." if len(runs) > 1 else ""


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.label} " if len(runs) > 1 else ""
