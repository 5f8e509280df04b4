"""Compare searched allocations with uniform widths: several seeds, one recipe, one table.

    python tools/studies/compare.py --config configs/movielens_1m/adass_deepfm.yaml --data PREPARED --out runs/deepfm

For each seed: one supernet, one search per setting of the config's ``SETTINGS`` below, a retrain of each
found allocation, and a retrain of each uniform width, all with the config's own training recipe. Every run is
an ordinary run directory under OUT; what is finished is skipped, so a stopped comparison continues. Another
config, data or --extra need another OUT.
Writes OUT/comparison.json and OUT/comparison.md (mean and standard deviation over seeds).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.studies.asked import keep_to
from tools.studies.jobs import Job, run_all, trained_in
from tools.studies.seeds import spread, with_deviation, with_error

# The paper's two modes (section 4.2), each with the hard budget that the mode promises.
SETTINGS = {
    "adass-E": ["search.policy.lambda_r=0.0025", "search.policy.lambda_c=0.08", "search.budget=80%"],
    "adass-R": ["search.policy.lambda_r=0.005", "search.policy.lambda_c=0.04", "search.budget=70%"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--widths", default="8,16,24,32,64", help="uniform widths")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which searches; empty = none")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides for all runs, section.key=value")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    args = parser.parse_args()
    keep_to(args.out, config=Path(args.config), data=Path(args.data, "schema.json"), extra=args.extra)
    widths = [f"ues-{w}" for w in args.widths.split(",") if w]
    settings = [s for s in args.settings.split(",") if s]
    chains = [chain for seed in range(args.seeds) for chain in chains_of(args, seed, widths, settings)]
    run_all(chains, args.out / "logs", args.jobs)
    rows = [summarise(args.out, name, args.seeds) for name in [*widths, *settings]]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = table(rows)
    (args.out / "comparison.md").write_text(text)
    print(text)


def chains_of(args: argparse.Namespace, seed: int, widths: list[str], settings: list[str]) -> list[list[Job]]:
    """The runs of one seed: the searches in one chain, each uniform width in its own."""
    run = args.out / f"seed{seed}"
    common = [f"--{x}" for x in [f"data.path={args.data}", f"run.dir={run}", f"run.seed={seed}", *args.extra]]
    chain = []
    for name in settings:
        arguments = ["--config", args.config, *common, f"--search.name={name}", *(f"--{x}" for x in SETTINGS[name])]
        found = run / "allocations" / f"{name}.json"
        chain.append(Job(f"seed{seed}-search-{name}", "launch/search.py", arguments, found))
        chain.append(retrain_job(args, seed, name, str(found), common))
    baselines = [[retrain_job(args, seed, w, w, common)] for w in widths]
    return ([chain] if chain else []) + baselines


def retrain_job(args: argparse.Namespace, seed: int, name: str, allocation: str, common: list[str]) -> Job:
    arguments = ["--config", args.config, *common, "--allocation", allocation, "--name", name]
    directory = retrain_dir(args.out, seed, name)
    return Job(f"seed{seed}-{name}", "launch/retrain.py", arguments, directory / "evaluation.json")


def summarise(out: Path, name: str, seeds: int) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure of one row, and the paired gain over UES-32."""
    runs = [read(out, name, seed) for seed in range(seeds)]
    reference = [read(out, "ues-32", seed) for seed in range(seeds)]
    row: dict[str, Any] = {"name": name, "seeds": seeds, "runs": runs}
    for key in ("auc", "logloss", "embedding_parameters", "dense_parameters", "embedding_bytes", "flops_per_sample"):
        values = [r[key] for r in runs]
        row[key] = spread(values)
    gains = [a["auc"] - b["auc"] for a, b in zip(runs, reference, strict=True)]
    row["gain"] = spread(gains)
    row["saved"] = 1 - row["embedding_parameters"][0] / statistics.fmean(r["embedding_parameters"] for r in reference)
    return row


def read(out: Path, name: str, seed: int) -> dict[str, Any]:
    return json.loads((retrain_dir(out, seed, name) / "evaluation.json").read_text())


def retrain_dir(out: Path, seed: int, name: str) -> Path:
    return trained_in(out / f"seed{seed}", name, seed)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; '+-' is one standard deviation over seeds, the gain is paired by seed."""
    lines = [
        "| model | test AUC | logloss | AUC - UES-32 | embedding parameters | P-R | dense parameters | kFLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['name']} | {with_deviation(r['auc'], '.5f')} | {with_deviation(r['logloss'], '.5f')} "
            f"| {with_error(r['gain'], r['seeds'], '.5f')} | {r['embedding_parameters'][0]:,.0f} | {r['saved']:.1%} "
            f"| {r['dense_parameters'][0]:,.0f} | {r['flops_per_sample'][0] / 1000:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
