"""Does a search find planted widths? Spearman's rho between found width and planted rank, over seeds.

    python tools/studies/planted.py --out runs/planted --seeds 3

Each seed makes its own synthetic click logs, trains a supernet on them and searches. Writes
OUT/planted.json; what is finished is skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.data.planted.synthetic import make_synthetic
from tools.studies.jobs import Job, run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/synthetic/adass_deepfm.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--extra", nargs="*", default=[], help="overrides, section.key=value")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    chains = []
    for seed in range(args.seeds):
        data, run = args.out / f"data{seed}", args.out / f"seed{seed}"
        if not (data / "schema.json").exists():
            make_synthetic(data, args.rows, seed)
        overrides = [f"data.path={data}", f"run.dir={run}", f"run.seed={seed}", *args.extra]
        arguments = ["--config", args.config, *(f"--{o}" for o in overrides)]
        chains.append([Job(f"seed{seed}", "launch/search.py", arguments, run / "allocation.json")])
    run_all(chains, args.out / "logs", args.jobs)
    rows = []
    for seed in range(args.seeds):
        ranks = json.loads((args.out / f"data{seed}" / "truth.json").read_text())["rank"]
        widths = json.loads((args.out / f"seed{seed}" / "allocation.json").read_text())["widths"]
        names = list(ranks)
        rho = float(spearmanr([ranks[n] for n in names], [widths[n] for n in names]).statistic)
        idle = {n: widths[n] for n in names if ranks[n] == 0}
        rows.append({"seed": seed, "spearman": rho, "rank0_widths": idle, "widths": widths, "ranks": ranks})
        print(f"seed {seed}: Spearman {rho:.3f} over {len(names)} fields; rank-0 fields got {list(idle.values())}")
        print("   " + "  ".join(f"{n}:{ranks[n]}->{widths[n]}" for n in names))
    print(f"mean Spearman over {len(rows)} seeds: {statistics.fmean(r['spearman'] for r in rows):.3f}")
    (args.out / "planted.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
