"""Compare methods under one recipe: several seeds, one table, and a picture.

    python tools/studies/compare_methods.py --plan configs/comparisons/movielens_1m.yaml --data PREPARED --out runs/all

The plan names runs; a run is a config, whether it is searched, and the models that are trained behind it. Every run is
an ordinary run directory OUT/seedN/RUN of launch/search.py and launch/retrain.py ("{run}" in an override stands for
it); what is finished is skipped, so a stopped comparison continues, and one that is given more seeds, or a plan with
other runs, keeps what it has. Other data, another --extra or other settings of a run need another OUT.
A pool is some results (the five best of a search, say), of which the table shows, in their place, the mean and the one
with the best validation logloss, of the epoch whose weights are measured.
Writes OUT/comparison.json, OUT/comparison.md (mean and standard deviation over seeds), OUT/comparison.csv (a line for
each model, with its commit and command) and OUT/comparison.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.config.read import written
from embsearch_dist.files import read_json
from embsearch_dist.schema import Schema
from tools.studies.asked import body_of, keep_to
from tools.studies.budget_tables import best_validation, data_told, kept_logloss, portable
from tools.studies.jobs import Job, machine_of, recorded, run_all, trained_in, write_csv
from tools.studies.seeds import spread, with_deviation, with_error

KEYS = {"config", "search", "retrain", "leaves", "begin_as"}
FIGURES = ("auc", "logloss", "embedding_parameters", "dense_parameters", "flops_per_sample")
COLUMNS = (
    "commit", "command", "seed", "hardware", "data", "run", "model", "backbone", "embedding_parameters",
    "dense_parameters", "flops_per_sample", "validation_auc", "validation_logloss", "test_auc", "test_logloss",
    "training_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One run of a plan.

    Attributes:
        name: of the run directory.
        config: file.
        search: overrides of search.py; None: nothing is searched.
        retrain: name of a result -> overrides of retrain.py; ``allocation`` is its option of that name.
        leaves: results that the search itself leaves.
        begin_as: run whose directory this one begins as, so that what both do is done once (a supernet, say).
    """

    name: str
    config: str
    search: dict[str, Any] | None = None
    retrain: dict[str, dict[str, Any]] = field(default_factory=dict)
    leaves: list[str] = field(default_factory=list)
    begin_as: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="YAML: against, runs, pools")
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="names of runs, with commas; empty = all of the plan")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides for all runs, section.key=value")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    args = parser.parse_args()
    against, runs, pools = read_plan(args.plan, [n for n in args.only.split(",") if n])
    keep_to(args.out, **asked_of(args, runs))
    chains = [chain for seed in range(args.seeds) for chain in chains_of(args, runs, seed)]
    run_all(chains, args.out / "logs", args.jobs)
    rows = summarise(args.out, runs, args.seeds, against, pools)
    (args.out / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    write_csv(args.out / "comparison.csv", COLUMNS, lines_of(args.out, runs, args.seeds))
    rows = [row for row in rows if all(row["name"] not in names for names in pools.values())]
    text = table(rows, against)
    (args.out / "comparison.md").write_text(text)
    draw(rows, against, args.out / "comparison.png")
    print(text)


def read_plan(path: Path, only: list[str]) -> tuple[str, list[Planned], dict[str, list[str]]]:
    """The result that others are compared with, the runs, and the pools all of whose results they have.

    Raises:
        SystemExit: names the entry that is wrong.
    """
    body = yaml.safe_load(path.read_text())
    if not isinstance(body, dict) or set(body) - {"pools"} != {"against", "runs"}:
        raise SystemExit(f"{path}: must have the keys against and runs, may have pools, and nothing else")
    for name in only:
        if name not in body["runs"]:
            raise SystemExit(f"--only {name}: {path} has no such run; it has {', '.join(body['runs'])}")
    found = []
    for name, entry in body["runs"].items():
        unknown = set(entry) - KEYS
        if unknown or "config" not in entry:
            may = ", ".join(sorted(KEYS - {"config"}))
            raise SystemExit(f"{path}: run {name}: needs config; may have {may}; got {sorted(entry)}")
        if entry.get("begin_as", name) not in [name, *(run.name for run in found)]:
            raise SystemExit(f"{path}: run {name}: begin_as: {entry['begin_as']} is no run that comes before it")
        if not only or name in only:
            found.append(Planned(name, **entry))
    pools: dict[str, list[str]] = body.get("pools", {})
    named = [n for entry in body["runs"].values() for n in [*entry.get("leaves", []), *entry.get("retrain", {})]]
    every = set(named)
    for name in every:
        if named.count(name) > 1:
            raise SystemExit(f"{path}: {named.count(name)} runs have a result {name}, and a table has one. Rename it")
    for pool, members in pools.items():
        for name in members:
            if name not in every:
                raise SystemExit(f"{path}: pool {pool}: no run has a result {name}")
    here = {n for run in found for n in [*run.leaves, *run.retrain]}
    return str(body["against"]), found, {pool: names for pool, names in pools.items() if here.issuperset(names)}


def asked_of(args: argparse.Namespace, runs: list[Planned]) -> dict[str, Any]:
    """What the results in OUT depend on: of each run its config and search, and of each result its overrides. A plan
    may be given more of both."""
    told: dict[str, Any] = {"data": Path(args.data, "schema.json"), "extra": args.extra}
    for run in runs:
        told[f"run {run.name}"] = [body_of(run.config, written(Path(run.config))), run.search, run.begin_as]
        told |= {f"result {name}": overrides for name, overrides in run.retrain.items()}
    return told


def chains_of(args: argparse.Namespace, runs: list[Planned], seed: int) -> list[list[Job]]:
    """A chain of jobs per run; a run that begins as another one is behind it in the same chain."""
    chains: dict[str, list[Job]] = {}
    first: dict[str, str] = {}
    for run in runs:
        first[run.name] = first.get(run.begin_as, run.name)
        chains.setdefault(first[run.name], []).extend(chain_of(args, run, seed))
    return [*chains.values()]


def chain_of(args: argparse.Namespace, run: Planned, seed: int) -> list[Job]:
    """The search of a run and, one after another, what is trained behind it."""
    directory = args.out / f"seed{seed}" / run.name
    common = [f"--{x}" for x in [f"data.path={args.data}", f"run.dir={directory}", f"run.seed={seed}", *args.extra]]
    jobs = []
    if run.search is not None:
        arguments = ["--config", run.config, *common, *options(run.search)]
        source = args.out / f"seed{seed}" / run.begin_as
        before = partial(begin_as, source, directory) if run.begin_as else None
        jobs.append(Job(f"seed{seed}-{run.name}-search", "launch/search.py", arguments, None, before))
        start = ["--run", str(directory), *(f"--{x}" for x in args.extra)]
    else:
        start = ["--config", run.config, *common]
    for name, overrides in run.retrain.items():
        result = trained_in(directory, name, 0 if run.search is not None else seed)
        overrides = {k: v.replace("{run}", str(directory)) if isinstance(v, str) else v for k, v in overrides.items()}
        arguments = [*start, "--name", name, *options(overrides)]
        jobs.append(Job(f"seed{seed}-{run.name}-{name}", "launch/retrain.py", arguments, result / "evaluation.json"))
    wanted = [*run.leaves, *run.retrain]
    return [] if all(place_of(args.out, run, seed, name).exists() for name in wanted) else jobs


def begin_as(source: Path, directory: Path) -> None:
    """Copy a run directory, without what was retrained in it; one that is there stays."""
    if directory.exists():
        return
    partial_copy = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial_copy, ignore_errors=True)
    shutil.copytree(source, partial_copy, ignore=shutil.ignore_patterns("retrain", "report"))
    partial_copy.rename(directory)


def place_of(out: Path, run: Planned, seed: int, name: str) -> Path:
    """Where a result's evaluation is: the scripts add the seed to the name when it is not that of the config or run."""
    at = [out / f"seed{seed}" / run.name / "retrain" / n / "evaluation.json" for n in (name, f"{name}-seed{seed}")]
    return next((p for p in at if p.exists()), at[0])


def options(overrides: dict[str, Any]) -> list[str]:
    return [part for key, value in overrides.items() for part in (f"--{key}", json.dumps(value).strip('"'))]


def results_of(out: Path, run: Planned, seed: int) -> dict[str, dict[str, Any]]:
    """Name -> evaluation on the test split of every result of one run; what is routed in two ways counts as two.

    Evaluations on other splits may lie beside them: they are no results.
    """
    found = {}
    for name in [*run.leaves, *run.retrain]:
        for file in sorted(place_of(out, run, seed, name).parent.glob("evaluation*.json")):
            kind, figures = file.stem.removeprefix("evaluation").strip("-"), json.loads(file.read_text())
            if figures.get("split", "test") == "test":
                found[f"{name} ({kind} router)" if kind else name] = figures
    return found


def lines_of(out: Path, runs: list[Planned], seeds: int) -> list[dict[str, Any]]:
    """A line of the CSV for each result of each run and seed."""
    jobs, lines = recorded(out / "logs"), []
    for seed, run in itertools.product(range(seeds), runs):
        for name, figures in results_of(out, run, seed).items():
            model = name.split(" (")[0]
            place = place_of(out, run, seed, model).parent
            job = jobs.get(f"seed{seed}-{run.name}-{'search' if model in run.leaves else model}", {})
            told = read_json(place / "training.json") if (place / "training.json").exists() else {}
            best = best_validation(place / "metrics.jsonl", told["best_step"]) if told else {}
            lines.append(
                {
                    "commit": job.get("commit", "unknown"),
                    "command": portable(job.get("command", ""), out),
                    "seed": seed,
                    "hardware": machine_of(job),
                    "data": data_told(Schema.load(place)) if (place / "schema.json").exists() else "",
                    "run": run.name,
                    "model": name,
                    "backbone": figures["backbone"],
                    **{key: figures[key] for key in FIGURES[2:]},
                    **{f"validation_{key}": best.get(key, "") for key in FIGURES[:2]},
                    **{f"test_{key}": figures[key] for key in FIGURES[:2]},
                    "training_seconds": round(told["seconds"], 1) if told else "",
                }
            )
    return lines


def pooled(
    out: Path, runs: list[Planned], seed: int, found: dict[str, dict[str, Any]], name: str, members: list[str]
) -> dict[str, dict[str, Any]]:
    """Of a pool's results of one seed, among ``found``, the mean of every figure, and what validation would choose."""
    where = {n: place_of(out, run, seed, n) for run in runs for n in [*run.leaves, *run.retrain] if n in members}
    results = [found[n] for n in members]
    losses = [kept_logloss(where[n].parent) for n in members]
    mean = {key: statistics.fmean(r[key] for r in results) for key in FIGURES}
    best = results[losses.index(min(losses))]
    label = f"of {len(members)} {name}"
    return {f"mean {label}": {**mean, "backbone": best["backbone"]}, f"best {label}, by validation": best}


def summarise(
    out: Path, runs: list[Planned], seeds: int, against: str, pools: Mapping[str, list[str]] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """A row per result: mean and standard deviation of every figure over the seeds that have it, and the gain over
    ``against`` paired by seed. What ``evaluate.py`` has measured behind another router may be there of some seeds only.

    The reference of a result is the result ``against`` with the same backbone; that of another than the config's is
    called ``against-BACKBONE``. Where there is none, it is ``against``, whatever its backbone.
    """
    by_seed: list[dict[str, dict[str, Any]]] = []
    for seed in range(seeds):
        by_seed.append({k: v for run in runs for k, v in results_of(out, run, seed).items()})
        for name, members in pools.items():
            by_seed[-1].update(pooled(out, runs, seed, by_seed[-1], name, members))
    references = [
        {r["backbone"]: r for n, r in found.items() if n in (against, f"{against}-{r['backbone']}")}
        for found in by_seed
    ]
    rows = []
    for name in dict.fromkeys(name for found in by_seed for name in found):
        each = [found[name] for found in by_seed if name in found]
        row: dict[str, Any] = {"name": name, "backbone": each[0]["backbone"], "seeds": len(each), "of_seeds": seeds}
        for key in FIGURES:
            row[key] = spread([r[key] for r in each])
        have = [(ref, b) for ref, b in zip(references, by_seed, strict=True) if name in b]
        pairs = [(r, ref.get(r["backbone"], b.get(against))) for r, (ref, b) in zip(each, have, strict=True)]
        gains = [r["auc"] - ref["auc"] for r, ref in pairs if ref is not None]
        row["gain"], row["pairs"] = spread(gains), len(gains)
        rows.append(row)
    return rows


def called(row: Mapping[str, Any]) -> str:
    """The name of a result, and of how many seeds it is where some lack it."""
    few = row["seeds"] < row["of_seeds"]
    return f"{row['name']} ({row['seeds']} of {row['of_seeds']} seeds)" if few else str(row["name"])


def table(rows: list[dict[str, Any]], against: str) -> str:
    """A Markdown table; '+-' is one standard deviation over seeds, s.e. the standard error of the paired gain."""
    lines = [
        f"| model | backbone | test AUC | logloss | AUC - {against} | embedding parameters | dense | kFLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {called(r)} | {r['backbone']} | {with_deviation(r['auc'], '.4f')} "
            f"| {with_deviation(r['logloss'], '.4f')} | {with_error(r['gain'], r['pairs'], '.4f')} "
            f"| {r['embedding_parameters'][0]:,.0f} | {r['dense_parameters'][0]:,.0f} "
            f"| {r['flops_per_sample'][0] / 1000:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], against: str, path: Path) -> None:
    """Test AUC of every result, a panel per backbone; bars are one standard deviation over seeds."""
    backbones = sorted({r["backbone"] for r in rows}, key=[r["backbone"] for r in rows].index)
    panels = [[r for r in reversed(rows) if r["backbone"] == b] for b in backbones]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 1.0 + 0.28 * len(rows) + 0.6 * len(backbones)), dpi=150, layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=[len(p) + 1 for p in panels])[
            :, 0
        ]
        for axis, backbone, panel in zip(axes, backbones, panels, strict=True):
            for place, row in enumerate(panel):
                colour = "tab:orange" if row["name"].startswith(against) else "tab:blue"
                bar = None if math.isnan(row["auc"][1]) else row["auc"][1]
                axis.errorbar(row["auc"][0], place, xerr=bar, fmt="o", color=colour, capsize=3)
            axis.set_yticks(range(len(panel)), [called(r) for r in panel])
            axis.set_ylim(-0.6, len(panel) - 0.4)
            axis.set_title(backbone, loc="left")
            axis.grid(axis="x", alpha=0.3)
        seeds = rows[0]["of_seeds"]
        axes[-1].set_xlabel(
            "test AUC" + (f", mean and standard deviation over {seeds} seeds" if seeds > 1 else ", one seed")
        )
        figure.savefig(path)


if __name__ == "__main__":
    main()
