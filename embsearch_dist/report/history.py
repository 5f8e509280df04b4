"""The report's sections about time: learning curves, cost, the search, probabilities over time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from embsearch_dist.report import groups, page, plots
from embsearch_dist.report import heatmaps as maps
from embsearch_dist.report.page import Cell, Section
from embsearch_dist.report.plots import Curve
from embsearch_dist.report.runs import Run, series
from embsearch_dist.report.style import render
from embsearch_dist.report.widths import absent

SEARCH_CURVES = (
    ("Reward, mean of the sampled subnets", "reward", ("reward_mean",)),
    ("Reward, best of each step", "reward", ("reward_best",)),
    ("Entropy of the policy", "nats", ("entropy",)),
    ("Expected width", "columns per field", ("expected_width",)),
    ("Expected parameters", "parameters", ("expected_parameters",)),
    ("Penalty", "penalty", ("penalty",)),
)
HEATMAPS = {
    "P_E": (
        "Which widths the supernet trains",
        "Probability with which supernet training draws each candidate width, per field, from the first recorded "
        "step to the last. A width whose values vary less counts as trained less and is drawn more. Width 0 has no "
        "values, so it keeps the smallest probability there is. Even rows: the widths are trained alike. A bright "
        "cell: training favours that width of that field, and the scores of the other widths are less sure.",
    ),
    "P_F": (
        "Which fields the supernet keeps",
        "How strongly each field is kept while the supernet trains, step by step from left to right. Fields with "
        "larger gradients and larger embeddings are dropped less often.",
    ),
    "policy": (
        "What the search believes",
        "Probability the search policy gives each width, per field. It starts undecided (even rows) and should end "
        "with one bright cell per row: the width chosen for that field.",
    ),
    "worth": (
        "What each width is worth",
        "Logloss (in 1/1000) that each width of a field saves against its narrowest one while all other fields are at "
        "their widest, measured on validation rows by cutting the widest model down. A step that the rows do not show "
        "beyond their standard error counts as nothing, so equal cells mean that the wider one is not needed.",
    ),
    "field weights": (
        "How much each field weighs",
        "Weight that the controller gives each field, mean over the rows of a held-out batch. The weights of one row "
        "add up to 1. Rows differ: a field of small mean may weigh much in a few of them.",
    ),
    "fields kept": (
        "Which fields rows keep",
        "Share of the rows of a held-out batch that keep each field. A field near 0 is of use to few rows.",
    ),
}

UNDECIDED = 0.5  # of the entropy that a policy began with
STILL_OPEN = (
    "Not as it should be: the policy of {run} is still undecided at the end (entropy {last:.2f} nats, {first:.2f} at "
    "the start). The widths come from the local search behind it; more --search.policy.steps let it decide."
)
CAPTURED = (
    "Not as it should be: at the end one width, {width}, takes more than half of the draws in every field. The others "
    "were hardly trained, so their scores in the search say little about them."
)


def learning(runs: Sequence[Run], directory: Path) -> Section:
    """Curves of every training stage, and what each cost."""
    title = "Learning curves"
    body = ""
    stages = list(dict.fromkeys(str(x.get("stage")) for r in runs for x in r.metrics if "loss" in x and "stage" in x))
    for stage in stages:
        labelled = [(r.label, k, r.metrics) for k, r in enumerate(runs)]
        panels = _training_panels(labelled, stage)
        if panels:
            image = render(f"curves-{_slug(stage)}", partial(plots.curves, panels=panels), directory)
            caption = _curve_caption(stage, any(r.by_network for r in runs))
            body += f"<h3>{escape(stage)}</h3>" + page.picture(image, caption, f"Curves of {stage}")
    names = list(dict.fromkeys(x.name for r in runs for x in r.retrains))
    found = [n for n in names if not n.lower().startswith(("ues", "uniform"))]
    grouped = [(x.name, found.index(x.name) if x.name in found else -1, x.metrics) for r in runs for x in r.retrains]
    panels = _training_panels(grouped, None)
    if panels:
        image = render("curves-retrain", partial(plots.curves, panels=panels), directory)
        caption = (
            "Training of the final models from scratch: one line per run, runs of one name in one colour, "
            "uniform "
            "widths in grey. Validation curves that turn (AUC falls, logloss rises) show overfitting."
        )
        body += "<h3>retrained models</h3>" + page.picture(image, caption, "Curves of the retrained models")
    body += _cost_table(runs)
    return Section("learning", title, body or page.missing(absent("metrics.jsonl")))


def search(runs: Sequence[Run], directory: Path) -> Section | None:
    """Curves of the search itself; None where it chose by instances or for networks, without a policy."""
    title = "Search"
    panels: list[tuple[str, str, list[Curve]]] = []
    for name, unit, keys in SEARCH_CURVES:
        lines = []
        for k, run in enumerate(runs):
            for key in keys:
                steps, values = series(run.metrics, key, "search")
                if steps:
                    lines.append(Curve(run.label, k, steps, values))
        if lines:
            panels.append((name, unit, lines))
    if not panels:
        if any(r.by_instance or r.by_network or r.without_policy for r in runs):
            return None
        text = (
            "No search curves: metrics.jsonl has no line of stage 'search' (written while search.py runs that stage)."
        )
        return Section("search", title, page.missing(text))
    image = render("search", partial(plots.curves, panels=panels), directory)
    caption = (
        "The search proposes widths, scores them on validation data and learns from the score (the reward). "
        "Reward should "
        "rise and level off; entropy is how undecided the policy still is and should fall towards 0; expected "
        "width and "
        "parameters are the size the policy currently proposes on average."
    )
    body = page.picture(image, caption, "Reward, entropy and size over search steps")
    for run in runs:
        _, entropy = series(run.metrics, "entropy", "search")
        if len(entropy) > 1 and entropy[-1] > UNDECIDED * entropy[0]:
            body += page.missing(STILL_OPEN.format(run=run.label, first=entropy[0], last=entropy[-1]))
    return Section("search", title, body)


def heatmaps(runs: Sequence[Run], directory: Path) -> Section | None:
    """Every recorded heat map over time, but for those drawn elsewhere; None when there are no others."""
    title = "Probabilities over time"
    run = next((r for r in runs if not all(map(groups.elsewhere, r.heatmaps))), None)
    if run is None:
        if any(r.heatmaps or r.by_network or r.without_policy for r in runs):
            return None
        return Section("heatmaps", title, page.missing(absent("heatmaps.jsonl")))
    body = page.paragraph(f"Shown for {run.label}.", "note") if len(runs) > 1 else ""
    named: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in run.heatmaps:
        if _drawable(line) and not groups.elsewhere(line):
            named.setdefault((str(line.get("stage")), str(line.get("name"))), []).append(line)
    for (stage, name), lines in named.items():
        lines.sort(key=lambda x: x["step"])
        # A file joined from two searches may change its fields midway; only one shape can be drawn.
        lines = [x for x in lines if (x["rows"], x["columns"]) == (lines[-1]["rows"], lines[-1]["columns"])]
        drawn = maps.over_time if len(lines[-1]["rows"]) == 1 else maps.snapshots
        image = render(f"heatmap-{_slug(stage)}-{_slug(name)}", partial(drawn, lines=lines), directory)
        heading, caption = HEATMAPS.get(name, (name, f"{name} of stage {stage}, from its first to its last record."))
        body += f"<h3>{escape(heading)} <span class=sd>({escape(stage)}: {escape(name)})</span></h3>"
        body += page.picture(image, caption, heading)
        captured = _captured(lines[-1]) if name == "P_E" else None
        if captured is not None:
            body += page.missing(CAPTURED.format(width=captured))
    return Section("heatmaps", title, body or page.missing("heatmaps.jsonl holds no drawable heat map."))


def _drawable(line: dict[str, Any]) -> bool:
    """Whether a recorded heat map is a matrix with a name for each row and column."""
    values, rows, columns = (line.get(k) for k in ("values", "rows", "columns"))
    if not (values and rows and columns and "step" in line):
        return False
    return len(values) == len(rows) and all(isinstance(row, list) and len(row) == len(columns) for row in values)


def _captured(line: dict[str, Any]) -> str | None:
    """The column of a recorded P_E that has more than half of every row, if there is one."""
    for j, column in enumerate(line["columns"]):
        if all((row[j] or 0.0) > 0.5 for row in line["values"]):
            return str(column)
    return None


def _training_panels(
    runs: Sequence[tuple[str, int, list[dict[str, Any]]]], stage: str | None
) -> list[tuple[str, str, list[Curve]]]:
    panels = []
    for name, unit, key, split in (
        ("Training loss", "logloss", "loss", None),
        ("Validation AUC", "AUC", "auc", "validation"),
        ("Validation logloss", "logloss", "logloss", "validation"),
    ):
        lines = []
        for label, rank, metrics in runs:
            steps, values = series(metrics, key, stage, split)
            if steps:
                lines.append(Curve(label, rank, steps, values))
        if lines:
            panels.append((name, unit, lines))
    return panels


def _curve_caption(stage: str, networks: bool) -> str:
    if stage == "supernet" and networks:
        return (
            "Training of the supernet, the one model that holds the weights of every network. Its loss is noisy "
            "because each step trains another network, at first often all at once; the bold line is the running "
            "median. On validation data one small network is watched, so its quality is not that of the result."
        )
    if stage == "supernet":
        return (
            "Training of the supernet, the one model that holds every candidate width. Its loss is noisy because "
            "each step "
            "trains another subnet; the bold line is the running median."
        )
    if stage == "gates":
        return (
            "Training of tables and head: first with everything open, then with gates that choose, row by row, which "
            "columns pass. A step in the curves is where the gates set in; the bold line is the running median."
        )
    if stage.startswith("widest"):
        return (
            "Training of the widest model, of all rows or of a group's, from which the widths were read off: one "
            "uniform width, and the recipe of every retrained model. The bold line is the running median."
        )
    return f"Stage {stage}: training loss (bold line: running median) and quality on validation data."


def _cost_table(runs: Sequence[Run]) -> str:
    """Time, speed and memory of every stage and retrain; repeats of one are averaged."""
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for run in runs:
        for stage in dict.fromkeys(str(x.get("stage")) for x in run.metrics):
            groups.setdefault(stage, []).append([x for x in run.metrics if str(x.get("stage")) == stage])
        for retrain in run.retrains:
            groups.setdefault(f"retrain {retrain.name}", []).append(retrain.metrics)
    if not groups:
        return ""
    rows = []
    for label, repeats in groups.items():
        times = [_values(lines, "time") for lines in repeats]
        spans = [max(t) - min(t) for t in times if len(t) > 1]
        steps = [s for lines in repeats for s in _values(lines, "step")]
        speed = [v for lines in repeats for v in _values(lines, "samples_per_s")]
        memory = [v for lines in repeats for v in _values(lines, "memory_mb")]
        cells = [Cell(label, css="text"), Cell(str(len(repeats))), Cell(f"{max(steps):,.0f}" if steps else "-")]
        cells.append(Cell(_clock(statistics.fmean(spans)) if spans else "-"))
        cells.append(_speed(speed))
        cells.append(Cell(f"{max(memory):,.0f}" if memory else "-"))
        rows.append(("", cells))
    head = ["Stage", "Runs", "Last step", "Time (h:mm:ss)", "Samples/s", "Peak memory (MB)"]
    note = (
        "Time runs from a stage's first record to its last, pauses of an interrupted run included; mean over runs. "
        "Samples/s: the median of what the log recorded, with the range of the middle half."
    )
    return "<h3>Cost of each stage</h3>" + page.table(head, rows, (0,)) + page.paragraph(note, "note")


def _speed(recorded: Sequence[float]) -> Cell:
    """Median and middle half in two digits: a machine's speed is known no better."""
    if not recorded:
        return Cell("-")
    if len(recorded) < 4:
        return Cell(f"{_two_digits(statistics.median(recorded)):,.0f}")
    low, middle, high = statistics.quantiles(recorded, n=4)
    return Cell(f"{_two_digits(middle):,.0f} ({_two_digits(low):,.0f} to {_two_digits(high):,.0f})")


def _two_digits(number: float) -> float:
    return float(f"{number:.2g}")


def _values(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(x[key]) for x in lines if isinstance(x.get(key), int | float)]


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)
