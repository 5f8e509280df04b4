"""Kendall's tau between subnets scored with inherited weights and the same subnets trained alone (Table 4).

    python tools/studies/consistency.py --config configs/movielens_1m/adass_deepfm.yaml --data PREPARED --out runs/tau

Draws random subnets once, trains each alone with the config's recipe, trains one supernet for every scheme and
sampling mode, scores the subnets with each supernet on the validation split, and ranks. Everything is
resumable; writes OUT/consistency.json and OUT/consistency.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.adass.config import MODES
from embsearch_dist.methods.adass.search_stage import make_scorer
from embsearch_dist.models.tables import SCHEMES
from embsearch_dist.ranks.context import start
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from tools.studies.jobs import Job, run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subnets", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn subnets; the runs use the config's seed")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides for all runs, section.key=value")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    schema = Schema.load(args.data)
    common = [f"--{x}" for x in [f"data.path={args.data}", *args.extra]]
    config = read(args, args.out / "alone")
    candidates = list(config.search.candidates)
    rng = np.random.default_rng(args.seed)
    choices = rng.integers(len(candidates), size=(args.subnets, len(schema.fields)))
    alone = [[alone_job(args, schema, candidates, choices, k, common)] for k in range(args.subnets)]
    variants = list(itertools.product(args.schemes.split(","), args.modes.split(",")))
    supernets = [[supernet_job(args, scheme, mode, common)] for scheme, mode in variants]
    run_all([*supernets, *alone], args.out / "logs", args.jobs)
    truth = {
        "validation": [best_validation(alone_dir(args, k)) for k in range(args.subnets)],
        "test": [json.loads((alone_dir(args, k) / "evaluation.json").read_text()) for k in range(args.subnets)],
    }
    rows = []
    for scheme, mode in variants:
        scores = inherited(args, scheme, mode, torch.from_numpy(choices))
        row = {"scheme": scheme, "mode": mode, "subnets": args.subnets}
        for metric in ("auc", "logloss"):
            row[f"inherited_{metric}"] = [s[metric] for s in scores]
            for split in truth:
                row[f"tau_{metric}_{split}"] = tau(truth[split], scores, metric)
        rows.append(row)
    ceiling = {m: tau(truth["validation"], truth["test"], m) for m in ("auc", "logloss")}
    (args.out / "consistency.json").write_text(json.dumps({"alone": truth, "ceiling": ceiling, "rows": rows}, indent=2))
    lines = [
        "| scheme | sampling | logloss, validation | AUC, validation | logloss, test | AUC, test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("tau_logloss_validation", "tau_auc_validation", "tau_logloss_test", "tau_auc_test")
    lines += [f"| {r['scheme']} | {r['mode']} | " + " | ".join(f"{r[k]:.3f}" for k in keys) + " |" for r in rows]
    aucs = [t["auc"] for t in truth["test"]]
    lines += [
        "",
        f"{args.subnets} subnets; stand-alone test AUC {min(aucs):.4f} to {max(aucs):.4f}. Tau between the same "
        f"stand-alone models on validation and on test: AUC {ceiling['auc']:.3f}, logloss {ceiling['logloss']:.3f}.",
    ]
    (args.out / "consistency.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def tau(a: list[dict[str, float]], b: list[dict[str, float]], metric: str) -> float:
    """Kendall's tau-b of one metric over the same subnets."""
    return float(kendalltau([x[metric] for x in a], [x[metric] for x in b]).statistic)


def best_validation(directory: Path) -> dict[str, float]:
    """Validation metrics of the checkpoint that was kept: the best AUC of the training."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return max((x for x in lines if x.get("split") == "validation"), key=lambda x: x["auc"])


def read(args: argparse.Namespace, run_dir: Path, *more: str):
    overrides = [f"data.path={args.data}", f"run.dir={run_dir}", *args.extra, *more]
    return load_config({n: m.config for n, m in METHODS.items()}, args.config, overrides)


def alone_dir(args: argparse.Namespace, k: int) -> Path:
    return args.out / "alone" / "retrain" / f"subnet{k}"


def alone_job(
    args: argparse.Namespace, schema: Schema, candidates: list[int], choices: np.ndarray, k: int, common: list[str]
) -> Job:
    path = args.out / "subnets" / f"subnet{k}.json"
    widths = {n: candidates[j] for n, j in zip(schema.names, choices[k].tolist(), strict=True)}
    Allocation(schema, widths, {"method": "random", "name": f"subnet{k}"}).save(path)
    arguments = ["--config", args.config, *common, f"--run.dir={args.out / 'alone'}", "--allocation", str(path)]
    return Job(f"subnet{k}", "launch/retrain.py", arguments, alone_dir(args, k) / "evaluation.json")


def supernet_dir(args: argparse.Namespace, scheme: str, mode: str) -> Path:
    return args.out / f"{scheme}-{mode}"


def supernet_job(args: argparse.Namespace, scheme: str, mode: str, common: list[str]) -> Job:
    directory = supernet_dir(args, scheme, mode)
    kind = [f"--run.dir={directory}", f"--search.scheme={scheme}", f"--search.sampling.mode={mode}"]
    # Only the supernet is wanted; the search after it is kept to a token.
    short = ["--search.policy.steps=1", "--search.policy.refine=false", "--search.policy.rows=1000"]
    arguments = ["--config", args.config, *common, *kind, *short]
    return Job(f"{scheme}-{mode}", "launch/search.py", arguments, directory / "allocation.json")


def inherited(args: argparse.Namespace, scheme: str, mode: str, choices: torch.Tensor) -> list[dict[str, float]]:
    """Metrics of the subnets under one supernet, on the whole validation split."""
    kind = [f"search.scheme={scheme}", f"search.sampling.mode={mode}"]
    kind += ["search.policy.rows=10000000", "search.policy.precision=float32"]
    config = read(args, supernet_dir(args, scheme, mode), *kind)
    with start(config.run, config.dist) as context:
        return make_scorer(Run(config, Schema.load(args.data), context)).score(choices)


if __name__ == "__main__":
    main()
