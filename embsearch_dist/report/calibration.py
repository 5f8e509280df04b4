"""How far predicted probabilities can be taken at their word, and AUC inside groups of rows: tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from embsearch_dist.report import page
from embsearch_dist.report.page import Cell, Section
from embsearch_dist.report.result import Result
from embsearch_dist.report.style import Theme, figure, render, short
from embsearch_dist.report.summary import Comparison, Row, Spread, display_name

PANELS = 9  # models in the picture; the table has all
COLUMNS = 3
KEYS = (("ne", ".4f"), ("calibration", ".4f"), ("ece", ".5f"))


def section(comparison: Comparison | None, directory: Path) -> Section | None:
    """Normalised entropy, calibration and its error of every model, their curves, and AUC by group; None where the
    evaluations are of a version that did not tell them."""
    if comparison is None:
        return None
    rows = [r for r in comparison.rows if any(r.spread(key) for key, _ in KEYS)]
    grouped = _by_group(comparison)
    if not rows and not grouped:
        return None
    body = _table(rows, comparison) if rows else ""
    drawn = [r for r in rows if any("reliability" in x.told for x in r.results)]
    if drawn:
        image = render("reliability", lambda t: draw(t, drawn[:PANELS]), directory)
        caption = (
            "Rows in the order of their prediction, cut into parts of equally many rows: a dot sets the mean "
            "prediction of a part against its click rate, with two standard errors of that. On the dashed line, what "
            "is predicted comes; below it the model promises too much. One line a run."
        )
        if len(drawn) > PANELS:
            caption += f" The first {PANELS} of {len(drawn)} models are drawn."
        body += page.picture(image, caption, "Predicted probabilities against click rates")
    return Section("calibration", "Calibration", body + grouped)


def _table(rows: Sequence[Row], comparison: Comparison) -> str:
    lines = []
    for row in rows:
        cells = [_cell(row.spread(key), form) for key, form in KEYS]
        lines.append(("found" if row.name in comparison.found else "", [Cell(display_name(row)), *cells]))
    note = (
        "Normalised entropy: logloss against that of always predicting the click rate of the split; below 1 is better "
        "than that. Calibration: predicted clicks over clicks; 1 is right, above 1 too many. ECE (expected calibration "
        "error): mean distance of prediction and click rate over the parts of the picture; luck alone keeps it above 0."
    )
    return page.table(["Widths", "Normalised entropy", "Calibration", "ECE"], lines) + page.paragraph(note, "note")


def _cell(spread: Spread | None, form: str) -> Cell:
    if spread is None:
        return Cell("-")
    return Cell(format(spread.mean, form), format(spread.sd, form) if spread.sd else "")


def _by_group(comparison: Comparison) -> str:
    """AUC inside the values of a field, one table a field."""
    found: dict[str, list[tuple[Row, list[dict[str, Any]]]]] = {}
    for row in comparison.rows:
        own: dict[str, list[dict[str, Any]]] = {}
        for told in (r.told["by_group"] for r in row.results if "by_group" in r.told):
            own.setdefault(str(told["field"]), []).append(told)
        for field, several in own.items():
            found.setdefault(field, []).append((row, several))
    body = ""
    for field, measured in found.items():
        lines = []
        for row, several in measured:
            known = [float(t["auc"]) for t in several if t.get("auc") is not None]
            first = several[0]
            cells = [Cell(display_name(row)), _cell(Spread.of(known) if known else None, ".4f")]
            share = "-" if first.get("rows") is None else f"{first['rows']:.1%}"
            lines.append(
                ("found" if row.name in comparison.found else "", [*cells, Cell(f"{first['groups']:,}"), Cell(share)])
            )
        head = ["Widths", f"AUC by {field} ({comparison.split})", "Groups with both classes", "Share of rows"]
        body += f"<h3>AUC by {escape(field)}</h3>" + page.table(head, lines)
        body += page.paragraph(
            f"AUC of the rows of one value of {field}, its mean weighed by rows: how well a model orders what one "
            f"{field} is shown. Rows of rare, unseen and missing values, which share an id, are in no group.",
            "note",
        )
    return body


def draw(theme: Theme, rows: Sequence[Row]) -> Figure:
    """A panel a model: mean prediction against click rate in each part of the rows."""
    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    fig = figure(3.3 * lines, 3.2 * columns)
    panels = fig.subplots(lines, columns, squeeze=False).flatten()
    ends = [_end(r) for row in rows for r in row.results if "reliability" in r.told]
    end = max(ends, default=1.0)
    for axes, row in zip(panels, rows, strict=False):
        axes.plot([0, end], [0, end], color=theme.muted, lw=1, ls="--")
        results = [r for r in row.results if "reliability" in r.told]
        for k, result in enumerate(results):
            predicted, clicked, count = _curve(result)
            error = 2 * np.sqrt(np.clip(clicked * (1 - clicked), 0, None) / count)
            color = theme.uniform if row.uniform_width is not None else theme.color(0)
            axes.errorbar(
                predicted, clicked, yerr=[np.minimum(error, clicked), error], color=color, ecolor=color, elinewidth=0.8,
                marker="o", ms=3, lw=1, alpha=1 if k == 0 else 0.6,
            )  # fmt: skip
        axes.set_xlim(0, end)
        axes.set_ylim(0, end)
        axes.set_box_aspect(1)
        axes.set_title(short(display_name(row), 30))
        axes.set_xlabel("mean prediction")
        axes.set_ylabel("click rate")
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    return fig


def _curve(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    told = result.told["reliability"]
    predicted, clicked, rows = (np.asarray(told[key], float) for key in ("predicted", "clicked", "rows"))
    return predicted, clicked, rows


def _end(result: Result) -> float:
    """Where the axes of a curve should end."""
    predicted, clicked, _ = _curve(result)
    return min(1.0, 1.08 * float(max(predicted.max(initial=0), clicked.max(initial=0)))) or 1.0
