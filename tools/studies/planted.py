"""Does a search find planted widths? Spearman's rho between found width and planted rank, over seeds.

    python tools/studies/planted.py --out runs/planted --seeds 3
    python tools/studies/planted.py --out runs/planted --seeds 5 --beside ues-4 ues-8 ues-16 ues-32
    python tools/studies/planted.py --config configs/synthetic/utilities.yaml --out runs/utilities ...

    python tools/studies/planted.py --out runs/planted --seeds 5 --beside ues-16 ues-32 --finetuned
    python tools/studies/planted.py --out runs/idle --idle 20 40 100 200 500 ...     other idle fields

Each seed makes its own synthetic click logs and searches on them. With --beside what was found and the named
allocations (as retrain.py takes them) are trained, too, all from fresh weights by the config's recipe. With --finetuned
all are trained a second time, begun with the widest model and cut down. What is finished is skipped; another --config,
other --rows, --idle or --extra need another OUT.

Leaves OUT/planted.json, and OUT/planted.csv with a line per seed: test AUC of what was found and of each other, and by
how much it is above the best of them. With --finetuned what was found and fine-tuned is compared, with all others in
either way.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.data.planted.synthetic import DEFAULT, make_synthetic
from embsearch_dist.files import read_json, read_sealed
from embsearch_dist.methods.finetuning import FINETUNED
from embsearch_dist.schema import Schema
from tools.gpucheck.facts import hardware
from tools.studies.asked import keep_to
from tools.studies.jobs import Job, recorded, run_all, trained_in, write_csv

WIDEST = 32  # sizes are told as a share of this uniform width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/synthetic/adass_deepfm.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--idle", type=int, nargs="*", default=DEFAULT.idle, help="values of each idle field")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--beside", nargs="*", default=[], help="train what was found, and these allocations")
    parser.add_argument("--finetuned", action="store_true", help="all of them once more, begun with the widest model")
    parser.add_argument("--extra", nargs="*", default=[], help="overrides, section.key=value")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    keep_to(args.out, config=Path(args.config), rows=args.rows, idle=list(args.idle), extra=args.extra)
    chains = []
    for seed in range(args.seeds):
        data = args.out / f"data{seed}"
        if not (data / "schema.json").exists():
            make_synthetic(data, args.rows, seed, replace(DEFAULT, idle=tuple(args.idle)))
        chains.append(jobs(args, seed))
    run_all(chains, args.out / "logs", args.jobs)
    rows = [row(args, seed) for seed in range(args.seeds)]
    for r in rows:
        names = list(r["ranks"])
        print(f"seed {r['seed']}: Spearman {r['spearman']:.3f} over {len(names)} fields; "
              f"rank-0 fields got {list(r['rank0_widths'].values())}")  # fmt: skip
        print("   " + "  ".join(f"{n}:{r['ranks'][n]}->{r['widths'][n]}" for n in names))
    print(f"mean Spearman over {len(rows)} seeds: {statistics.fmean(r['spearman'] for r in rows):.3f}")
    (args.out / "planted.json").write_text(json.dumps(rows, indent=2) + "\n")
    write_lines(args, rows)


def jobs(args: argparse.Namespace, seed: int) -> list[Job]:
    """The search of a seed, then its trainings."""
    data, run = args.out / f"data{seed}", args.out / f"seed{seed}"
    overrides = [f"data.path={data}", f"run.dir={run}", f"run.seed={seed}", *args.extra]
    arguments = ["--config", args.config, *(f"--{o}" for o in overrides)]
    found = [Job(f"seed{seed}", "launch/search.py", arguments, run / "allocation.json")]
    for name in models(args):
        plain, again = name.removesuffix(FINETUNED), name.endswith(FINETUNED)
        allocation = run / "allocation.json" if plain == "found" else plain
        words = ["--run", str(run), "--allocation", str(allocation), "--name", name, "--finetune", str(again).lower()]
        found.append(Job(f"seed{seed}-{name}", "launch/retrain.py", words, trained(run, name)))
    return found


def models(args: argparse.Namespace) -> list[str]:
    """Names of all that is trained beside the search, what was found first."""
    names = ["found", *args.beside] if args.beside else []
    return names + [name + FINETUNED for name in names] if args.finetuned else names


def trained(run: Path, name: str) -> Path:
    return trained_in(run, name, 0) / "evaluation.json"


def row(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What a seed found, and the test figures of its models."""
    run = args.out / f"seed{seed}"
    ranks = json.loads((args.out / f"data{seed}" / "truth.json").read_text())["rank"]
    widths = read_sealed(run / "allocation.json")["widths"]
    idle = {n: widths[n] for n in ranks if ranks[n] == 0}
    rho = float(spearmanr(list(ranks.values()), [widths[n] for n in ranks]).statistic)
    figures = {n: read_json(trained(run, n)) for n in models(args)}
    return {
        "seed": seed,
        "spearman": rho,
        "rank0_widths": idle,
        "widths": widths,
        "ranks": ranks,
        "parameters": {n: f["embedding_parameters"] for n, f in figures.items()},
        "test_auc": {n: f["auc"] for n, f in figures.items()},
    }


def write_lines(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """OUT/planted.csv; with --beside the means are printed, too."""
    command = ["python", "tools/studies/planted.py", "--config", args.config, "--rows", str(args.rows)]
    command += ["--seeds", str(args.seeds), "--out", "OUT"]
    command += ["--idle", *map(str, args.idle)] if tuple(args.idle) != DEFAULT.idle else []
    command += [
        part for name in ("beside", "extra") if getattr(args, name) for part in (f"--{name}", *getattr(args, name))
    ]
    command += ["--finetuned"] if args.finetuned else []
    ours = "found" + FINETUNED if args.finetuned else "found"
    lines, above, record = [], [], recorded(args.out / "logs")
    for r in rows:
        seed, auc = r["seed"], r["test_auc"]
        line = {"commit": record.get(f"seed{seed}", {}).get("commit", ""), "hardware": hardware()}
        line |= {"command": shlex.join(command), "seed": seed, "spearman": f"{r['spearman']:.3f}"}
        line |= {"idle_fields_kept": sum(w > 0 for w in r["rank0_widths"].values())}
        if auc:
            whole = WIDEST * sum(Schema.load(args.out / f"data{seed}").cardinalities)
            best = max((name for name in auc if not name.startswith("found")), key=lambda name: auc[name])
            line |= {
                "parameters": r["parameters"]["found"],
                "share_of_ues32": f"{r['parameters']['found'] / whole:.1%}",
            }
            line |= {n.replace("-", "_"): f"{a:.4f}" for n, a in auc.items()}
            above.append(auc[ours] - auc[best])
            line |= {"best_other": best, "above_it": f"{above[-1]:+.4f}"}
        lines.append(line)
    write_csv(args.out / "planted.csv", list(lines[0]), lines)
    if above:
        mean = f"{statistics.fmean(above):+.4f} on average, {min(above):+.4f} at least"
        print(f"test AUC of {ours} above the best of {', '.join(args.beside)}: {mean}")
    print(args.out / "planted.csv")


if __name__ == "__main__":
    main()
