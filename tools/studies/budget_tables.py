"""From finished trainings to the CSV, the table, the verdicts and the picture of tools/studies/compare_budgets.py."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import REFERENCE_WIDTH, Allocation
from embsearch_dist.report.style import render
from embsearch_dist.report.summary import percent
from embsearch_dist.report.verdict import Model, compare_models, draw, judge
from embsearch_dist.schema import Schema
from tools.studies.jobs import ROOT, all_told, machine_of, machines, recorded, write_csv

COLUMNS = (
    "commit", "command", "seed", "hardware", "data", "backbone", "budget", "method", "widths", "parameters",
    "share_of_ues32", "validation_auc", "validation_logloss", "test_auc", "test_logloss", "search_seconds",
    "training_seconds", "precision", "served_bytes", "served_share_of_ues32", "served_auc", "served_logloss",
    "served_fp32_bytes", "served_int8_bytes", "search_cost_seconds", "cost_clock", "cost_reference",
    "search_cost", "search_memory_gib", "training_memory_gib",
)  # fmt: skip
BASELINES = ("fdo", "magnitude")
FINETUNED = " fine-tuned"  # behind the method of models that began with the widest uniform one
CLOCKS = {"wall": "seconds", "processor": "cpu_seconds"}  # of a search's cost -> what the records of jobs call it
Row = dict[str, Any]
LABELLED = 24  # models in the picture whose names have room


@dataclass(frozen=True)
class Measure:
    """What a comparison judges by: columns of its CSV, and what sizes are called."""

    size: str
    share: str
    auc: str
    logloss: str
    unit: str

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Measure:
        """Bytes and figures as served where every line has them at one precision, else parameters."""
        precisions = {r.get("precision") or "" for r in rows}
        if len(precisions) == 1 and (precision := precisions.pop()):
            return cls("served_bytes", "served_share_of_ues32", "served_auc", "served_logloss", f"bytes at {precision}")
        return cls("parameters", "share_of_ues32", "test_auc", "test_logloss", "parameters")

    def reference(self, rows: Sequence[dict[str, Any]]) -> float:
        """Size of UES-32."""
        return float(rows[0][self.size]) / float(rows[0][self.share])


@dataclass(frozen=True)
class Trained:
    """A model of the comparison: its training's directory, and the names of the jobs that made it.

    ``width``: of a uniform one, else 0. Its search found the widths of all budgets at once. ``shared``: the
    ``training.json`` of a model that the searches of several methods begin with. ``chooses``: its job trains several
    models and chooses between them, which is a part of what its search costs.
    """

    method: str
    budget: str
    seed: int
    place: Path
    job: str
    search: str
    width: int
    shared: Path | None = None
    chooses: bool = False


def write_all(out: Path, models: Sequence[Trained], add: Callable[[list[Row]], list[Row]] = list) -> str:
    """Write comparison.csv, .md and .png of what is finished; returns the text of comparison.md.

    Args:
        add: puts the lines of earlier comparisons beside the new ones.

    Raises:
        SystemExit: nothing is.
    """
    rows = add(rows_of(out, [m for m in models if (m.place / "evaluation.json").exists()]))
    if not rows:
        raise SystemExit(f"{out}: no training is finished yet")
    write_csv(out / "comparison.csv", COLUMNS, rows)
    compared, measure = summarise(rows), Measure.of(rows)
    text = markdown(rows, compared, len({row["seed"] for row in rows}))
    (out / "comparison.md").write_text(text)
    size = "embedding parameters" if measure.size == "parameters" else f"{measure.unit}, all tables"
    shown = list(compared.values())
    render("comparison", lambda theme: draw(theme, shown, "test", len(shown) <= LABELLED, size), out)
    return text


def rows_of(out: Path, models: Sequence[Trained]) -> list[dict[str, Any]]:
    """A line of the CSV for each model."""
    jobs, rows = recorded(out / "logs"), []
    for m in models:
        job, search = jobs.get(m.job, {}), jobs.get(m.search, {})
        rows.append(
            {
                "commit": job.get("commit", "unknown"),
                "command": portable(job.get("command", ""), out),
                "hardware": machine_of(job),
                "budget": m.budget,
                "method": m.method,
                **model_columns(m.place),
                "seed": m.seed,
                "search_seconds": search.get("seconds", ""),
                "search_memory_gib": search.get("memory_gib", ""),
                "training_memory_gib": job.get("memory_gib", ""),
                **(cost_of(m, models, jobs, out) if m.search else {}),
            }
        )
    return rows


def data_told(schema: Schema) -> str:
    """What a line says of the data: name, fingerprint and training rows."""
    return f"{schema.dataset} {schema.fingerprint} {schema.rows.get('train', 0)} training rows"


def model_columns(place: Path) -> dict[str, Any]:
    """The columns that tell of one trained and measured model, by its directory."""
    result = json.loads((place / "evaluation.json").read_text())
    schema, training = Schema.load(place), json.loads((place / "training.json").read_text())
    allocation = Allocation.load(place / "allocation.json", schema)
    reference = (REFERENCE_WIDTH + allocation.extra) * sum(schema.cardinalities)
    validation = best_validation(place / "metrics.jsonl", training["best_step"])
    return {
        "seed": result.get("seed", ""),
        "data": data_told(schema),
        "backbone": result["backbone"],
        "widths": " ".join(f"{n}={w}" for n, w in result["widths"].items()),
        "parameters": result["embedding_parameters"],
        "share_of_ues32": f"{result['embedding_parameters'] / reference:.6f}",
        "validation_auc": validation.get("auc", ""),
        "validation_logloss": validation.get("logloss", ""),
        "test_auc": result["auc"],
        "test_logloss": result["logloss"],
        "training_seconds": round(training["seconds"], 1),
        **as_served(result.get("served")),
        "served_fp32_bytes": allocation.total("served_fp32"),
        "served_int8_bytes": allocation.total("served_int8"),
    }


def cost_of(
    model: Trained, models: Sequence[Trained], jobs: Mapping[str, Mapping[str, Any]], out: Path
) -> dict[str, Any]:
    """The columns of what a model's search costs: seconds, and multiples of a training of a uniform width.

    A stage that several methods share counts in full for each of them, whoever has run it: a method has to pay for it
    where it is alone. The reference is the training of UES-32, or else of the widest uniform width, with the same seed.
    Both are whole commands, start and evaluation included, on one thread, in processor time; with a GPU by the clock.
    Empty where the records do not tell.
    """
    clock = "wall" if torch.cuda.is_available() else "processor"
    key, search = CLOCKS[clock], jobs.get(model.search, {})
    if key not in search or (model.shared is not None and "found" not in search):
        return {}
    seconds = search[key]
    if model.shared is not None and search["found"]:
        if not model.shared.exists():
            return {}
        seconds += shared_seconds(model.shared, search, jobs, out, key)
    if model.chooses:
        if key not in jobs.get(model.job, {}):
            return {}
        seconds += jobs[model.job][key]
    told = {"search_cost_seconds": round(seconds, 1), "cost_clock": clock}
    uniform = [m for m in models if m.method == "uniform" and m.seed == model.seed and key in jobs.get(m.job, {})]
    if not uniform:
        return told
    reference = max(uniform, key=lambda m: (m.width == REFERENCE_WIDTH, m.width))
    multiple = seconds / jobs[reference.job][key]
    return {**told, "cost_reference": f"UES-{reference.width}", "search_cost": f"{multiple:.3f}"}


def shared_seconds(
    training: Path, search: Mapping[str, Any], jobs: Mapping[str, Mapping[str, Any]], out: Path, key: str
) -> float:
    """Seconds of a shared training: its own by the clock; of the processor as many of them as the command had that ran
    it, or, where that left no record, as this search had."""
    name = os.path.relpath(training, out)
    ran = [j for j in jobs.values() if j.get("shared") == name and not j["found"] and key in j]
    command = (ran or [search])[0]
    return float(json.loads(training.read_text())["seconds"]) * command[key] / command["seconds"]


def as_served(told: dict[str, Any] | None) -> dict[str, Any]:
    """The columns of what an evaluation tells of tables at a precision; empty where it tells nothing."""
    if not told:
        return {}
    return {
        "precision": told["precision"],
        "served_bytes": told["bytes"],
        "served_share_of_ues32": f"{told['bytes'] / told['ues32_bytes']:.6f}",
        "served_auc": told["auc"],
        "served_logloss": told["logloss"],
    }


def portable(command: str, out: Path) -> str:
    """A command without the folders of the machine it ran on."""
    plain = command.replace(str(out), "OUT").replace(f"{ROOT}/", "")
    return re.sub(r"(--data\.path=)\S+", r"\1PREPARED", plain)


def best_validation(metrics: Path, step: int | None) -> dict[str, float]:
    """The validation figures of the weights that were kept; nothing of a training without validation rows, which may
    have left no curve at all."""
    lines = map(json.loads, metrics.read_text().splitlines() if metrics.exists() else ())
    return next((x for x in lines if x.get("split") == "validation" and x.get("step") == step), {})


def kept_logloss(place: Path) -> float:
    """Validation logloss of the weights that the training in a folder has kept: those that its test figures are of.
    An evaluation of less logloss does not count where AUC selects.

    Raises:
        SystemExit: no training is finished there, or it had no validation rows.
    """
    file = place / "training.json"
    told = best_validation(place / "metrics.jsonl", json.loads(file.read_text())["best_step"]) if file.exists() else {}
    if "logloss" not in told:
        raise SystemExit(f"{place}: no finished training tells a validation logloss. Train this model again")
    return float(told["logloss"])


def summarise(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Model]:
    """(method, budget or width) -> the model over its seeds."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    measure = Measure.of(rows)
    for row in rows:
        grouped.setdefault(key_of(row), []).append(row)
    found = {}
    for (method, label), own in grouped.items():
        uniform = method.startswith("uniform")
        name = f"UES-{label}{method.removeprefix('uniform')}" if uniform else f"{method} {label}"
        size = statistics.fmean(float(r[measure.size]) for r in own)
        found[method, label] = Model(name, size, {r["seed"]: float(r[measure.auc]) for r in own}, method, uniform)
    return found


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    if row["method"].startswith("uniform"):
        return row["method"], row["widths"].split("=")[-1]
    return row["method"], row["budget"]


def verdicts(models: dict[tuple[str, str], Model], reference: float) -> list[str]:
    """A line for each searched model against uniform widths, and against the baselines of its budget."""
    every, lines = list(models.values()), []
    for (method, budget), model in models.items():
        if model.uniform:
            continue
        tuned = FINETUNED if method.endswith(FINETUNED) else ""
        # What began with fresh weights stands against uniform models that did; what was fine-tuned against all.
        verdict = judge(model, [m for m in every if tuned or not m.group.endswith(FINETUNED)], reference)
        texts = [verdict.sentence() if verdict else "no verdict: no uniform width that is not smaller was trained"]
        for baseline in BASELINES if method.removesuffix(FINETUNED) not in BASELINES else ():
            other = models.get((baseline + tuned, budget))
            against = compare_models(model, other, reference) if other else None
            if against is not None:
                texts.append(against.sentence(why=""))
        lines.append(f"- **{method}, budget {budget}**: " + "; ".join(texts))
    return lines


def markdown(rows: Sequence[dict[str, Any]], models: dict[tuple[str, str], Model], seeds: int) -> str:
    """Verdicts, then the table; s.e. is the standard error over seeds."""
    first, measure = rows[0], Measure.of(rows)
    reference = measure.reference(rows)
    commits = all_told(rows, "commit")
    sizes = f"| model | {measure.unit} | of UES-32 "
    head = [
        f"{first['data']}, {first['backbone']}, up to {seeds} seeds, commit {commits}; {machines(rows)}.",
        "Search time is that of all budgets of a method together, its trained model or supernet included, which "
        "utilities, FDO and magnitude pruning share: the first of them pays for it.",
        "",
        *verdicts(models, reference),
        "",
        sizes + "| test AUC (s.e.) | test logloss | validation AUC | search s, GiB | training s, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, model in models.items():
        own = [r for r in rows if key_of(r) == key]
        error = "one seed" if math.isnan(model.error) else f"{model.error:.4f}"
        head.append(
            f"| {model.name} | {model.parameters:,.0f} | {percent(model.parameters / reference)} "
            f"| {model.mean:.4f} ({error}) | {mean(own, measure.logloss)} | {mean(own, 'validation_auc')} "
            f"| {mean(own, 'search_seconds', '.0f')}{memory(own, 'search')} "
            f"| {mean(own, 'training_seconds', '.0f')}{memory(own, 'training')} |"
        )
    return "\n".join(head) + "\n"


def memory(rows: Sequence[dict[str, Any]], stage: str) -> str:
    """``, 1.2``: the largest resident size of the stage's command, GiB; empty where no record tells."""
    values = [float(r[f"{stage}_memory_gib"]) for r in rows if r.get(f"{stage}_memory_gib")]
    return f", {max(values):.1f}" if values else ""


def mean(rows: Sequence[dict[str, Any]], key: str, form: str = ".4f") -> str:
    values = [float(r[key]) for r in rows if r[key] != ""]
    return format(statistics.fmean(values), form) if values else "-"
