"""What a reader of the report may do next, as commands to copy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from embsearch_dist.errors import script
from embsearch_dist.report import page, verdict
from embsearch_dist.report.page import Section
from embsearch_dist.report.runs import Run
from embsearch_dist.report.summary import Comparison


def commands(run: Run) -> list[tuple[str, str]]:
    """(what for, command) of one run, the nearest first."""
    place, names = shlex.quote(str(run.path)), {r.name for r in run.results}
    controller = any(line.get("stage") == "controller" for line in run.metrics)
    searched = run.widths is not None or bool(run.groups) or (run.space is not None and bool(run.networks))
    if not searched and not names:
        return [("Go on with the search", f"{script('search')} --run.dir {place}")]
    found = []
    if searched and not run.retrains:
        found.append(("Train what was found", f"{script('retrain')} --run {place}"))
    uniform = any(n.startswith(("ues-", "nasrec-ues-")) for n in names)
    if run.widths is not None and not run.groups and not run.by_network and not uniform:
        text = "Train the uniform widths around it, to compare"
        found.append((text, f"{script('retrain')} --run {place} --allocation bracket"))
    if searched and run.retrains and not controller:
        text = "Another seed: differences of one training are noise until several agree"
        found.append((text, f"{script('retrain')} --run {place} --run.seed 1"))
    return found


def section(runs: Sequence[Run], comparison: Comparison | None = None) -> Section | None:
    """The commands of all runs; None where there is nothing to do."""
    lines = [f"# {what}\n{command}" for run in runs for what, command in commands(run)]
    if not any(run.by_network or run.groups for run in runs):
        for found, against in verdict.untold(comparison):
            command = f"{script('evaluate')} --run {shlex.quote(str(found))} --against {shlex.quote(str(against))}"
            lines.append(f"# How far the difference may be luck of the rows\n{command}")
    return Section("next", "Next", page.code("\n".join(dict.fromkeys(lines)))) if lines else None
