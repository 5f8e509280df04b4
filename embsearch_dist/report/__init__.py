"""The HTML report of one run directory, or of several that repeat one experiment with other seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from embsearch_dist.errors import naming
from embsearch_dist.report import calibration, following, groups, history, served, verdict
from embsearch_dist.report import networks as architectures
from embsearch_dist.report import widths as sections
from embsearch_dist.report.page import page
from embsearch_dist.report.runs import load_runs
from embsearch_dist.report.summary import compare, headline

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write ``index.html`` and its pictures.

    Args:
        run_dirs: run directories on the same data; their evaluations of one name become one mean.
        out: where to write; by default ``report/`` in the first run directory.

    Returns:
        Path of ``index.html``: one page with everything embedded; the PNG files lie beside it.

    Raises:
        UserError: a directory is no run directory, a file in it is broken, or the data differ.
    """
    runs = load_runs(run_dirs)
    for text in (text for run in runs for text in run.damaged):
        print(text, file=sys.stderr)
    directory = Path(out) if out is not None else Path(run_dirs[0]) / "report"
    directory.mkdir(parents=True, exist_ok=True)
    comparison = compare(runs)
    parts = [
        sections.verdict(comparison, directory),
        sections.results(comparison),
        served.section(comparison, directory),
        calibration.section(comparison, directory),
        sections.allocation(runs, directory),
        groups.found(runs, directory),
        architectures.found(runs, directory),
        architectures.trade_off(runs, comparison, directory),
        sections.pareto(runs, comparison, directory),
        sections.planted(runs, directory),
        sections.stability(runs, directory),
        history.learning(runs, directory),
        history.search(runs, directory),
        architectures.search(runs, directory),
        groups.gates(runs, directory),
        history.heatmaps(runs, directory),
        following.section(runs, comparison),
        sections.origin(runs),
    ]
    title = f"embsearch_dist report: {', '.join(r.label for r in runs)}"
    sentences = architectures.headline(runs, comparison) or headline(runs, comparison)
    if comparison is None and not any(r.widths or r.by_network for r in runs):
        sentences = [groups.headline(runs) or sentences[0]]
    if not any(r.by_network or r.groups for r in runs):
        final = [
            f"{r.label}: {r.final['reason']}." if len(runs) > 1 else f"{r.final['reason']}." for r in runs if r.final
        ]
        # A search under a budget of served bytes is judged by them: the widths around it are others.
        where = str(run_dirs[0])
        own = served.sentences(comparison, where) or verdict.sentences(comparison, where)
        sentences = [*own, *final, *sentences]
    html = page(title, sentences, [p for p in parts if p is not None])
    target = directory / "index.html"
    temporary = target.with_name("index.html.tmp")
    with naming(target):
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(target)
    return target
