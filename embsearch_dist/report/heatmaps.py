"""Heat maps of the report: probabilities over time, and how stable repeated searches are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embsearch_dist.report.style import Theme, figure, short, si

SNAPSHOTS = 4


def snapshots(theme: Theme, lines: Sequence[Mapping[str, Any]]) -> Figure:
    """One named matrix at up to four points in time, first and last included, on one colour scale."""
    count = min(SNAPSHOTS, len(lines))
    picked = [lines[round(k * (len(lines) - 1) / max(count - 1, 1))] for k in range(count)]
    matrices = [_matrix(line) for line in picked]
    low, high = _limits(matrices)
    rows, columns = picked[-1]["rows"], picked[-1]["columns"]
    fig = figure(_height(len(rows)))
    panels = fig.subplots(1, count, sharey=True, squeeze=False)[0]
    image: Any = None
    for axes, line, matrix in zip(panels, picked, matrices, strict=True):
        image = _image(axes, matrix, low, high, theme)
        axes.set_title(f"step {int(line['step']):,}")
        _columns(axes, columns, count)
    _rows(panels[0], rows)
    panels[0].set_xlabel("candidate width" if _widths(columns) else "")
    fig.colorbar(image, ax=list(panels), shrink=0.9, pad=0.01, fraction=0.02, label=_meaning(matrices, picked[-1]))
    return fig


def over_time(theme: Theme, lines: Sequence[Mapping[str, Any]]) -> Figure:
    """A single-row matrix (one value per column name) as an image: time to the right, names downwards."""
    steps = [int(line["step"]) for line in lines]
    matrix = np.stack([_matrix(line)[0] for line in lines], axis=1)
    names = lines[-1]["columns"]
    low, high = _limits([matrix])
    fig = figure(_height(len(names)))
    axes = fig.subplots()
    image = _image(axes, matrix, low, high, theme)
    _rows(axes, names)
    ticks = sorted({round(k * (len(steps) - 1) / 5) for k in range(6)})
    axes.set_xticks(ticks, [si(steps[t]) for t in ticks])
    axes.set_xlabel("step")
    fig.colorbar(image, ax=axes, shrink=0.9, pad=0.01, fraction=0.02, label=_meaning([matrix], lines[-1]))
    return fig


def stability(theme: Theme, fields: Sequence[str], candidates: Sequence[str], shares: np.ndarray) -> Figure:
    """Share of repeated searches that chose each width, as a number in each cell."""
    fig = figure(_height(len(fields)), min(9.6, 3.0 + 0.62 * len(candidates)))
    axes = fig.subplots()
    image = _image(axes, shares, 0.0, 1.0, theme)
    for k, row in enumerate(shares):
        for j, share in enumerate(row):
            if share > 0:
                # Viridis is dark below its middle and light above: the ink follows the cell, not the theme.
                ink = "#10141a" if share > 0.55 else "#ffffff"
                axes.text(j, k, f"{share:.0%}", ha="center", va="center", fontsize=7, color=ink)
    _rows(axes, fields)
    _columns(axes, candidates, 1)
    axes.set_xlabel("width chosen")
    fig.colorbar(image, ax=axes, shrink=0.9, pad=0.01, fraction=0.03, label="share of searches")
    return fig


def _matrix(line: Mapping[str, Any]) -> np.ndarray:
    return np.array([[np.nan if v is None else float(v) for v in row] for row in line["values"]], dtype=float)


def _limits(matrices: Sequence[np.ndarray]) -> tuple[float, float]:
    finite = np.concatenate([m[np.isfinite(m)] for m in matrices])
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if _probabilities(matrices):
        low = 0.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _probabilities(matrices: Sequence[np.ndarray]) -> bool:
    return all(bool(np.all((m[np.isfinite(m)] >= 0) & (m[np.isfinite(m)] <= 1))) for m in matrices)


def _meaning(matrices: Sequence[np.ndarray], line: Mapping[str, Any]) -> str:
    if line.get("name") == "worth":
        return "logloss saved / 1000"
    return "probability" if _probabilities(matrices) else "value"


def _image(axes: Axes, matrix: np.ndarray, low: float, high: float, theme: Theme) -> Any:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    cmap = matplotlib.colormaps[theme.map].with_extremes(bad=theme.grid)
    masked = np.ma.masked_invalid(matrix)
    return axes.imshow(masked, aspect="auto", cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def _rows(axes: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // 90)
    axes.set_yticks(range(0, len(names), every), [short(str(n)) for n in names[::every]], fontsize=7.5)


def _columns(axes: Axes, names: Sequence[str], panels: int) -> None:
    room = 60 // panels
    long = sum(len(str(n)) + 1 for n in names) > room
    every = max(1, -(-len(names) * 2 // room)) if long else 1
    axes.set_xticks(
        range(0, len(names), every),
        [short(str(n), 16) for n in names[::every]],
        fontsize=7.5,
        rotation=90 if long else 0,
    )


def _widths(columns: Sequence[str]) -> bool:
    return all(str(c).isdigit() for c in columns)


def _height(rows: int) -> float:
    return min(max(1.8, 0.8 + 0.17 * rows), 16.0)
