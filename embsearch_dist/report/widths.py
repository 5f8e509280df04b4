"""The report's sections: which numbers, which picture, and words for a reader who does not know the method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embsearch_dist.report import groups, page, plots
from embsearch_dist.report import heatmaps as maps
from embsearch_dist.report import networks as architectures
from embsearch_dist.report import verdict as judging
from embsearch_dist.report.page import Cell, Section
from embsearch_dist.report.runs import FILES, Run
from embsearch_dist.report.style import render
from embsearch_dist.report.summary import (
    Comparison,
    Row,
    auc_difference,
    display_name,
    percent,
    planted_correlation,
)


def results(comparison: Comparison | None) -> Section:
    """The comparison table."""
    if comparison is None:
        text = "No retrain has been evaluated: retrain/<name>/evaluation.json is missing (written by evaluate.py)."
        return Section("results", "Results", page.missing(text))
    base = comparison.baseline
    against = display_name(base) if base else "baseline"
    networks = architectures.any_network(comparison)
    quality, size = [], []
    for row in comparison.rows:
        css = "base" if base is not None and row.name == base.name else "found" if row.name in comparison.found else ""
        first, *others = _quality_cells(row, comparison)
        quality.append((css, [first, *[Cell(architectures.behind(row), css="text")] * networks, *others]))
        size.append((css, _size_cells(row)))
    auc = f"AUC ({comparison.split})"
    head = ["Model", "Network"] if networks else ["Widths"]
    columns = [*head, auc, f"AUC minus {against}", "Logloss", "P-R vs UES-32", "Runs (seeds)"]
    tables = page.table(columns, quality, (1,) if networks else ())
    tables += page.table(
        [head[0], "Embedding parameters", "Embedding bytes", "Dense parameters", "FLOPs per sample", "Samples/s"], size
    )
    note = (
        "AUC: probability that a clicked sample scores above an unclicked one, higher is better; in click prediction "
        "0.001 is commonly taken as worth having. Logloss: lower is better. P-R: share of embedding parameters saved "
        "against width 32 for every field. UES-n: uniform width n. "
    )
    if networks:
        note += (
            "Network: what stands behind the tables; the search chose that of rank 1, and no widths. To see what it is "
            "worth, compare it with another one behind tables of the same width. "
        )
    if any(len(r.results) > 1 for r in comparison.rows):
        note += "Numbers are means over runs, plus or minus one standard deviation; AUC differences are paired by "
        note += "seed, over the seeds that both sides have. "
    if base is None:
        note += "No uniform width was retrained, so there is no difference to show: retrain UES-32 as the yardstick."
    elif base.uniform_width != 32:
        note += f"UES-32 was not retrained; differences are to {against}, the widest uniform width there is."
    return Section("results", "Results", tables + page.paragraph(note, "note") + groups.routed(comparison))


def verdict(comparison: Comparison | None, directory: Path) -> Section | None:
    """What was found and the uniform widths, size against AUC; None unless both were retrained."""
    models = judging.models_of(comparison) if comparison is not None else []
    if comparison is None or not comparison.found or len({m.uniform for m in models}) < 2:
        return None
    image = render("verdict", lambda t: judging.draw(t, models, comparison.split), directory)
    caption = (
        "Retrained models: embedding parameters against AUC; bars are one standard error over seeds, which one seed "
        "has not. The verdict sets what was found against the best uniform width that is not smaller. Which one that "
        "is was picked on these very rows, so it has luck on its side."
    )
    return Section("verdict", "Verdict", page.picture(image, caption, "AUC over size with error bars"))


def allocation(runs: Sequence[Run], directory: Path) -> Section | None:
    """Widths per field beside cardinality and size; None where the search leaves no single allocation."""
    title = "Widths found"
    found = [r.widths for r in runs if r.widths is not None]
    schema = next((r.schema for r in runs if r.schema is not None), None)
    if not found:
        if not any("allocation.json" in r.missing for r in runs):
            return None
        return Section("widths", title, page.missing(absent("allocation.json")))
    fields = [n for n in found[0] if all(n in w for w in found)]
    if schema is not None:
        cardinality = dict(zip(schema.names, schema.cardinalities, strict=True))
        fields.sort(key=lambda n: -cardinality[n])
    known = [r for r in runs if r.widths is not None and r.schema is not None]
    partly = any(r.rows for r in known)
    size = {n: statistics.fmean(r.parameters(n) for r in known) for n in fields if known}
    image = render("allocation", lambda t: plots.allocation(t, found, schema, fields, size), directory)
    caption = "The width of each field's embedding; 0 means the field is dropped. "
    if schema is not None:
        caption += (
            "Fields are ordered by cardinality, how many different values they take. Since a table costs cardinality "
            "times width, a few fields usually hold nearly all parameters (right)."
        )
        if partly:
            caption += " Some of these fields keep rows for a part of their values alone, which is counted."
    if len(fields) > plots.MAX_FIELDS:
        caption += f" The first {plots.MAX_FIELDS} of {len(fields)} fields are drawn; the table has all."
    body = page.picture(image, caption, "Bars: embedding width per field")
    head = ["Field", "Width"] + (["Cardinality", "Parameters"] if schema else []) + ["Rows kept"] * partly
    lines = []
    for name in fields:
        values = [w[name] for w in found]
        cells = [Cell(name, css="text"), Cell(", ".join(map(str, values)))]
        if schema is not None:
            cells += [Cell(f"{cardinality[name]:,}"), Cell(f"{size.get(name, 0):,.0f}")]
        if partly:
            cells.append(Cell(", ".join(f"{r.rows[name]:,}" if name in r.rows else "all" for r in known)))
        lines.append(("", cells))
    return Section("widths", title, body + page.folded("All widths as a table", page.table(head, lines, (0,))))


def pareto(runs: Sequence[Run], comparison: Comparison | None, directory: Path) -> Section | None:
    """Size against quality; None where a search by instances has scored no subnets, or no run searched widths."""
    title = "Size against quality"
    source = next((r for r in runs if r.pareto), None)
    body = source.pareto if source is not None and source.pareto is not None else {}
    # On rows of one class there is no AUC, and no place in a picture of it.
    points = [p for p in body.get("points", []) if p.get("auc") is not None]
    scored = [s for s in body.get("scored", []) if s[1] is not None]
    if all(r.by_network for r in runs):
        return None
    measured = comparison is not None and any(r.parameters and not math.isnan(r.auc.mean) for r in comparison.rows)
    if not points and not scored and not measured:
        if any(r.by_instance for r in runs):
            return None
        lacking = absent("search/pareto.json") if not body else "Rows of one class have no AUC, so nothing is drawn."
        return Section("pareto", title, page.missing(lacking))
    bayes = _bayes(runs)
    image = render("pareto", lambda t: plots.pareto(t, points, scored, comparison, bayes), directory)
    parts = []
    if points or scored:
        parts.append(
            f"{'Left' if measured else 'The cloud'}: the {max(len(scored), len(points)):,} subnets the search "
            "scored with "
            "the supernet's shared weights (the worst 2% may lie below the frame); the line is the best AUC for each "
            "size, diamonds are the chosen subnets. Inherited AUC ranks subnets, it does not say how good they get."
        )
        if len([r for r in runs if r.pareto]) > 1 and source is not None:
            parts.append(f"Shown for {source.label}.")
    if measured:
        parts.append(
            f"{'Right' if points or scored else 'Each mark'}: retrained models; squares joined by a "
            "line are "
            "uniform widths, diamonds are searched ones. A search is worth its cost where a diamond lies above "
            "that line."
        )
    else:
        parts.append("No retrained model has been evaluated, so the second panel is missing.")
    return Section("pareto", title, page.picture(image, " ".join(parts), "AUC over embedding parameters"))


def planted(runs: Sequence[Run], directory: Path) -> Section | None:
    """Found widths against the planted ones; only synthetic data has these."""
    run = next((r for r in runs if r.truth and r.truth.get("rank")), None)
    if run is None or run.truth is None:
        return None
    title = "Planted truth"
    ranks = {str(k): float(v) for k, v in run.truth["rank"].items()}
    widths = [r.widths for r in runs if r.widths is not None]
    if not widths and any(r.groups for r in runs):
        return _planted_in_groups(runs, run.truth, directory)
    if not widths and any(r.by_network for r in runs):
        return None
    if not widths:
        return Section("truth", title, page.missing("truth.json is there, but no allocation.json to compare it with."))
    rhos = [planted_correlation(w, ranks) for w in widths]
    image = render("planted", lambda t: plots.planted(t, widths, ranks, rhos), directory)
    caption = (
        "This data is synthetic: each field was made with a known rank, the width it needs (0: the field is "
        "noise). A good "
        "search gives wider embeddings to fields of higher rank; Spearman's rho is 1 when the order is the same "
        "and 0 when "
        "it is unrelated. Equal dots are drawn side by side."
    )
    bayes = _bayes(runs)
    if bayes is not None:
        caption += f" The best AUC any model can reach on this data is {bayes:.4f}."
    return Section("truth", title, page.picture(image, caption, "Found width over planted rank"))


def _planted_in_groups(runs: Sequence[Run], truth: dict[str, Any], directory: Path) -> Section:
    """Widths of each group beside the ranks planted in each hidden population; one of the runs has groups."""
    run = next(r for r in runs if r.groups)
    # Data without populations are one.
    ranks = {f"population {k}": v for k, v in (truth.get("ranks") or {}).items()} or {"all rows": truth["rank"]}
    rhos = [[planted_correlation(g.widths, r) for r in ranks.values()] for g in run.groups]
    # Widths that run against the ranks follow no population, however little they do.
    like = [
        max(((c, -j) for j, c in enumerate(row) if c is not None and c > 0), default=(0.0, -len(ranks))) for row in rhos
    ]
    closest = [-j for _, j in like]
    order = sorted(range(len(rhos)), key=lambda k: (closest[k], k))
    names = [*ranks, "none"]
    fields = [n for n in run.groups[0].widths if all(n in r for r in ranks.values())]
    fields.sort(key=lambda n: [-float(r[n]) for r in ranks.values()])
    stated = {f"population {k}": v.get("share") for k, v in (truth.get("populations") or {}).items()}
    left = [n if stated.get(n) is None else f"{n}\n{percent(stated[n])} of rows" for n in ranks]
    shares = groups.shares_of(run.groups)
    right = [f"group {k}\n{percent(shares[k])} of rows\nlike {names[closest[k]]}" for k in order]
    needed = np.array([[float(r[n]) for r in ranks.values()] for n in fields])
    found = np.array([[float(run.groups[k].widths[n]) for k in order] for n in fields])
    panels = [("Planted rank", left, needed), ("Width found", right, found)]
    image = render("planted", lambda t: groups.draw_planted(t, fields, panels), directory)
    caption = (
        "The data were made so that in each hidden population every field has a known rank, the width it needs there "
        "(0: the click does not depend on it; a field that only tells populations apart has rank 0 in each). Each "
        "group stands with the population whose ranks its widths follow best, if they follow any (rho above 0). A "
        "group of one population's rows should be wide where that population has a rank, and narrow elsewhere."
    )
    bayes = _bayes(runs)
    if bayes is not None:
        caption += f" The best AUC any model can reach on this data is {bayes:.4f}."
    if len(runs) > 1:
        caption += f" Shown for {run.label}."
    lines = []
    for k, row in enumerate(rhos):
        values = [Cell("-" if rho is None else f"{rho:+.2f}") for rho in row]
        lines.append(("", [Cell(f"group {k}"), *values, Cell(names[closest[k]], css="text")]))
    body = page.picture(image, caption, "Planted ranks beside the widths of each group")
    body += page.table(["Spearman's rho with", *ranks, "closest"], lines, (len(ranks) + 1,))
    note = "Spearman's rho is 1 when a group's widths order the fields as the ranks do, and 0 when it is unrelated."
    return Section("truth", "Planted truth", body + page.paragraph(note, "note"))


def stability(runs: Sequence[Run], directory: Path) -> Section | None:
    """How often repeated searches agree: from ``stability.json``, else from the runs given."""
    title = "Stability"
    recorded = next((r.stability for r in runs if r.stability), None)
    found = [r.widths for r in runs if r.widths is not None]
    if recorded is not None:
        fields, candidates = [str(f) for f in recorded["fields"]], [str(c) for c in recorded["candidates"]]
        total = max(int(recorded["runs"]), 1)
        shares = np.asarray(recorded["counts"], dtype=float) / total
    elif len(found) > 1:
        fields = [n for n in found[0] if all(n in w for w in found)]
        widths = sorted({w[n] for w in found for n in fields})
        candidates, total = [str(w) for w in widths], len(found)
        shares = np.array([[sum(w[n] == c for w in found) / total for c in widths] for n in fields])
    else:
        return None
    image = render("stability", lambda t: maps.stability(t, fields, candidates, shares), directory)
    agreement = float(np.mean(shares.max(axis=1)))
    caption = (
        f"{total} searches with different seeds: each row is a field, each column a width, each number the share of "
        f"searches that chose it. On average {percent(agreement)} of the searches agree on a field's most "
        "frequent width."
    )
    return Section("stability", title, page.picture(image, caption, "Share of searches per field and width"))


def origin(runs: Sequence[Run]) -> Section:
    """Provenance, what is missing, the resolved config."""
    body = ""
    for run in runs:
        plain = dict(run.provenance)
        commands = plain.pop("commands", None) or plain.pop("command", None)
        inner = ""
        if run.schema is not None:
            rows = ", ".join(f"{k} {v:,}" for k, v in run.schema.rows.items())
            text = f"{run.schema.dataset}: {len(run.schema.fields)} fields, {sum(run.schema.cardinalities):,} values"
            plain = {"data": text + (f"; rows: {rows}" if rows else ""), "schema": run.schema.fingerprint} | plain
        if plain:
            lines = [("", [Cell(str(k), css="text"), Cell(_words(v), css="text")]) for k, v in plain.items()]
            inner += page.table(["Provenance", ""], lines, (0, 1))
        if commands:
            joined = "\n".join(map(str, commands)) if isinstance(commands, list) else str(commands)
            inner += page.paragraph("Commands that reproduce this run:") + page.code(joined)
        if run.missing:
            items = "; ".join(f"{name} ({FILES[name]})" for name in run.missing)
            inner += page.missing(f"Not in this run directory: {items}.")
        inner += "".join(page.missing(text) for text in run.damaged)
        if run.skipped_lines:
            inner += page.missing(f"{run.skipped_lines} unreadable lines of metrics or heat maps were left out.")
        if run.config is not None:
            inner += page.folded("Resolved configuration (config.yaml)", page.code(run.config))
        body += page.folded(run.label, inner) if len(runs) > 1 else inner
    return Section("origin", "Where this comes from", body)


def _quality_cells(row: Row, comparison: Comparison) -> list[Cell]:
    base = comparison.baseline
    delta = Cell("-")
    if base is not None and row.name != base.name:
        spread = auc_difference(row, base)
        worse = "worse" if spread.mean < -0.00005 else ""
        if not math.isnan(spread.mean):
            delta = Cell(f"{spread.mean:+.4f}", f"{spread.sd:.4f}" if spread.sd is not None else "", worse)
    saved = Cell("-")
    if row.parameters is not None and comparison.ues32_parameters:
        share = row.parameters / comparison.ues32_parameters
        saved = Cell(percent(1 - share) if share <= 1 else f"-{percent(share - 1)}")
    runs = f"{len(row.results)}" + (f" ({', '.join(map(str, row.seeds))})" if row.seeds else "")
    cells = [Cell(display_name(row)), _cell(row, "auc", ".4f"), delta, _cell(row, "logloss", ".4f"), saved]
    return [*cells, Cell(runs)]


def _size_cells(row: Row) -> list[Cell]:
    keys = ("embedding_parameters", "embedding_bytes", "dense_parameters", "flops_per_sample", "inference_rows_per_s")
    return [Cell(display_name(row)), *(_cell(row, key, ",.0f") for key in keys)]


def _cell(row: Row, key: str, form: str) -> Cell:
    spread = row.spread(key)
    if spread is None:
        return Cell("-")
    return Cell(format(spread.mean, form), format(spread.sd, form) if spread.sd else "")


def absent(name: str) -> str:
    """Says that a file is missing and what it would have shown."""
    return f"{name} is not in this run directory; it would show {FILES[name]}."


def _bayes(runs: Sequence[Run]) -> float | None:
    """The best AUC from the fields alone: where rows belong to hidden populations, ``bayes_auc`` is given those."""
    for run in runs:
        reachable = (run.truth or {}).get("from_fields") or run.truth or {}
        if reachable.get("bayes_auc") is not None:
            return float(reachable["bayes_auc"])
    return None


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
