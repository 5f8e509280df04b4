"""Compare backbones behind uniform widths: one recipe, seeds, and the difference to the first of them, paired by seed.

    python tools/studies/compare_backbones.py --config configs/movielens_1m_time/adass_deepfm.yaml --data PREPARED \
        --out runs/backbones --widths 16 --seeds 3 --jobs 2
    python tools/studies/compare_backbones.py ... --dry-run                                       list the commands
    python tools/studies/compare_backbones.py ... --settings masknet:model.options.structure=serial
    python tools/studies/compare_backbones.py ... --backbones deepfm,mine --extra model.module=my_backbone.py

Each model is an ordinary training of launch/retrain.py with the config's own recipe (its train, optim and model
sections; stopped on the validation split) below OUT/models. What is finished is skipped, so a stopped comparison
continues and one that is given more seeds, widths or backbones keeps what it has. Validation figures are those of the
best epoch, test figures those of its weights.

Leaves OUT/backbones.csv (a line per seed and model) and OUT/backbones.md (a table).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.config.read import written
from embsearch_dist.schema import Schema
from tools.studies.asked import named, words
from tools.studies.budget_tables import best_validation, data_told, portable
from tools.studies.jobs import Job, all_told, machine_of, machines, recorded, run_all, shown, trained_in
from tools.studies.seeds import spread, with_deviation, with_error

BACKBONES = "deepfm,dcnv2,autoint,xdeepfm,masknet,finalmlp"
COLUMNS = (
    "commit", "command", "seed", "hardware", "data", "backbone", "width", "embedding_parameters", "dense_parameters",
    "flops_per_sample", "validation_auc", "validation_logloss", "test_auc", "test_logloss", "best_step", "steps",
    "training_seconds",
)  # fmt: skip
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A training of the comparison: its job, and the directory that it leaves."""

    backbone: str
    width: int
    seed: int
    job: Job
    place: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="whose recipe all are trained with")
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbones", default=BACKBONES, help="names of model.backbone; the first is compared with")
    parser.add_argument("--widths", default="16", help="uniform widths")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=[], help="BACKBONE:section.key=value,... of one backbone")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides for all runs, section.key=value")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and leave")
    parser.add_argument("--only-tables", action="store_true", help="run nothing: the table of what is there")
    args = parser.parse_args()
    models = plan(args)
    if args.dry_run:
        for model in models:
            print(f"{model.job.name}: {shown(model.job)}")
        return
    if not args.only_tables:
        run_all([[model.job] for model in models], args.out / "logs", args.jobs)
    print(write_all(args.out, [m for m in models if (m.place / "evaluation.json").exists()]))


def plan(args: argparse.Namespace) -> list[Model]:
    """All trainings by the command line's arguments, seed by seed, so that early rows are of every backbone.

    Raises:
        SystemExit: an argument that is not of its form; names it.
    """
    backbones, own = words(args.backbones), named("--settings", args.settings)
    for name in own:
        if name not in backbones:
            raise SystemExit(f"--settings {name}: not among the backbones {', '.join(backbones)}")
    first_seed, models = written(args.config).get("run", {}).get("seed", 0), []
    for seed in range(args.seeds):
        for width in words(args.widths):
            for backbone in backbones:
                name = f"{backbone}-{width}"
                keys = [f"data.path={args.data}", f"run.dir={args.out / 'models'}", f"run.seed={seed}"]
                keys += [f"model.backbone={backbone}", *args.extra, *own.get(backbone, [])]
                arguments = ["--config", str(args.config), *(f"--{k}" for k in keys)]
                arguments += ["--allocation", f"ues-{width}", "--name", name]
                place = trained_in(args.out / "models", name, seed, first_seed)
                job = Job(f"{name}-seed{seed}", "launch/retrain.py", arguments, place / "evaluation.json")
                models.append(Model(backbone, int(width), seed, job, place))
    return models


def write_all(out: Path, models: Sequence[Model]) -> str:
    """Write backbones.csv and backbones.md of what is finished; returns the text of the latter.

    Raises:
        SystemExit: nothing is.
    """
    if not models:
        raise SystemExit(f"{out}: no training is finished yet")
    rows = rows_of(out, models)
    with (out / "backbones.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(rows)
    (out / "backbones.md").write_text(text)
    return text


def rows_of(out: Path, models: Sequence[Model]) -> Rows:
    """A line of the CSV for each model."""
    jobs, rows = recorded(out / "logs"), []
    for m in models:
        result = json.loads((m.place / "evaluation.json").read_text())
        training, schema = json.loads((m.place / "training.json").read_text()), Schema.load(m.place)
        validation = best_validation(m.place / "metrics.jsonl", training["best_step"])
        job = jobs.get(m.job.name, {})
        rows.append(
            {
                "commit": job.get("commit", "unknown"),
                "command": portable(job.get("command", ""), out),
                "seed": m.seed,
                "hardware": machine_of(job),
                "data": data_told(schema),
                "backbone": m.backbone,
                "width": m.width,
                **{k: result[k] for k in ("embedding_parameters", "dense_parameters", "flops_per_sample")},
                "validation_auc": validation.get("auc", ""),
                "validation_logloss": validation.get("logloss", ""),
                "test_auc": result["auc"],
                "test_logloss": result["logloss"],
                "best_step": training["best_step"],
                "steps": training["steps"],
                "training_seconds": round(training["seconds"], 1),
            }
        )
    return rows


def typed(line: dict[str, str]) -> dict[str, Any]:
    """A line of backbones.csv with numbers where it has digits."""
    words = {"commit", "command", "hardware", "data", "backbone"}
    return {k: v if k in words or v == "" else float(v) if "." in v else int(v) for k, v in line.items()}


def markdown(rows: Rows) -> str:
    """A line per backbone and width; the difference is to the first backbone at the same width, of the same seeds."""
    first, commits = rows[0], all_told(rows, "commit")
    lines = [
        f'{first["data"]}, commit {commits}; {machines(rows)}. "+-" is one standard deviation over seeds.',
        "",
        f"| backbone | width | seeds | dense parameters | FLOPs a row | test AUC | against {first['backbone']} "
        "| test logloss | validation AUC | training s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for backbone, width in dict.fromkeys((r["backbone"], r["width"]) for r in rows):
        own = of(rows, backbone, width)
        beside = {r["seed"]: r["test_auc"] for r in of(rows, first["backbone"], width)}
        gains = [r["test_auc"] - beside[r["seed"]] for r in own if r["seed"] in beside]
        against = "" if backbone == first["backbone"] else with_error(spread(gains), len(gains), ".4f")
        figures = [with_deviation(spread([float(r[k]) for r in own]), ".4f") for k in ("test_auc", "test_logloss")]
        validation = with_deviation(
            spread([float(r["validation_auc"]) for r in own if r["validation_auc"] != ""]), ".4f"
        )
        seconds = statistics.fmean(r["training_seconds"] for r in own)
        lines.append(
            f"| {backbone} | {width} | {len(own)} | {own[0]['dense_parameters']:,} | {own[0]['flops_per_sample']:,.0f} "
            f"| {figures[0]} | {against} | {figures[1]} | {validation} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def of(rows: Rows, backbone: str, width: int) -> Rows:
    return [r for r in rows if (r["backbone"], r["width"]) == (backbone, width)]


if __name__ == "__main__":
    main()
