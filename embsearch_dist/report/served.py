"""Found and uniform widths as they are served: quality against bytes, at the precision of the search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from embsearch_dist.errors import script
from embsearch_dist.precision import MIXED
from embsearch_dist.report import page, verdict
from embsearch_dist.report.page import Cell, Section
from embsearch_dist.report.result import Result
from embsearch_dist.report.style import render
from embsearch_dist.report.summary import Comparison, Row, display_name, percent

NEEDED = ("auc", "bytes", "ues32_bytes")


def comparison_at(comparison: Comparison | None) -> tuple[str, Comparison] | None:
    """The precision that most results were measured at, in words, and their comparison as served: sizes are bytes.

    None where none was.
    """
    rows = comparison.rows if comparison is not None else ()
    results = [r for row in rows for r in row.results if set(NEEDED) <= r.served.keys()]
    if comparison is None or not results:
        return None
    precisions = [r.precision for r in results]
    precision = max(sorted(set(precisions)), key=precisions.count)
    measured = tuple(row for row in (_as_served(row, precision) for row in rows) if row.results)
    names = {row.name for row in measured}
    found = tuple(name for name in comparison.found if name in names)
    reference = next(r.served["ues32_bytes"] for r in results if r.precision == precision)
    words = "mixed precisions" if precision == MIXED else precision
    return words, Comparison(comparison.split, measured, None, found, reference)


def _as_served(row: Row, precision: str) -> Row:
    own = [r for r in row.results if r.precision == precision and set(NEEDED) <= r.served.keys()]
    return replace(row, results=tuple(map(_result, own)))


def _result(result: Result) -> Result:
    figures = {k: v for k, v in result.served.items() if k in ("auc", "logloss")}
    return replace(result, numbers=figures | {"embedding_parameters": result.served["bytes"]})


def sentences(comparison: Comparison | None, directory: str) -> list[str]:
    """The verdict on each found allocation at the precision of the search."""
    found = comparison_at(comparison)
    if found is None:
        return []
    precision, served = found
    assert served.ues32_parameters is not None
    models, texts = verdict.models_of(served), []
    for model in (m for m in models if m.name in served.found):
        told = verdict.judge(model, models, served.ues32_parameters)
        if told is not None:
            texts.append(f"Served at {precision}, {model.name} {told.sentence()} ({served.split} split).")
        else:
            add = f"{script('retrain')} --run {directory} --allocation bracket"
            texts.append(
                f"No verdict on {model.name} served at {precision}: no uniform width of at least its bytes was "
                f"evaluated at it. This adds the two around it: {add}"
            )
    return texts


def section(comparison: Comparison | None, directory: Path) -> Section | None:
    """Bytes against AUC as served, as table and picture; None where nothing was measured so."""
    found = comparison_at(comparison)
    if found is None:
        return None
    precision, served = found
    lines = []
    for row in served.rows:
        logloss = row.spread("logloss")
        cells = [Cell(display_name(row)), Cell(f"{row.parameters:,.0f}"), Cell(_share(row, served.ues32_parameters))]
        cells += [Cell(f"{row.auc.mean:.4f}", f"{row.auc.sd:.4f}" if row.auc.sd else "")]
        cells += [Cell(f"{logloss.mean:.4f}" if logloss else "-")]
        lines.append(("found" if row.name in served.found else "", cells))
    head = ["Widths", f"Bytes at {precision}", "of UES-32", f"AUC ({served.split})", "Logloss"]
    body = page.table(head, lines)
    note = (
        f"Tables rounded as an export at {precision} serves them. TorchRec rounds each row up to 16 bytes, so several "
        "widths can cost the same; sizes are bytes of all tables. The dense part stays float32."
    )
    models = verdict.models_of(served)
    if len(models) > 1:
        size = f"bytes of the tables at {precision}"
        image = render("served", lambda t: verdict.draw(t, models, served.split, size=size), directory)
        body += page.picture(image, note, f"AUC over {size}")
    else:
        body += page.paragraph(note, "note")
    return Section("served", f"As served at {precision}", body)


def _share(row: Row, reference: float | None) -> str:
    return percent(row.parameters / reference) if row.parameters and reference else "-"
