"""Predicted steps of the tables on several numbers of GPUs: launch/plan.py, once for each number.

    python tools/studies/predicted_steps.py --config configs/criteo/adass_deepfm_scale.yaml --data PREPARED \\
        --out runs/predicted --world-sizes 8,16,64,128 --batch-size 1024 --allocation ues-16 runs/my/allocation.json

--config is that of a supernet, whose max-tables have a line, too; --supernet false leaves them out. All numbers are
those of TorchRec's planner for an A100 80GB and eight GPUs a machine, unless the config says otherwise: the time of
look-ups and exchanges alone, no MLP. Leaves OUT/predicted.csv: a line for each model, and for each number of GPUs the
milliseconds of a step on the slowest one, the MiB of the fullest one, and the imbalance of both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.studies.budget_tables import portable
from tools.studies.jobs import ROOT, commit, write_csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/criteo/adass_deepfm_scale.yaml")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set, or its schema.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world-sizes", default="8,16,64,128", help="numbers of GPUs")
    parser.add_argument("--batch-size", type=int, default=1024, help="rows of one step on one GPU")
    parser.add_argument("--allocation", nargs="+", default=["ues-16", "ues-32"], help="ues-WIDTH, or files")
    parser.add_argument("--supernet", choices=("true", "false"), default="true")
    args = parser.parse_args()
    sizes = [int(n) for n in args.world_sizes.split(",")]
    plans = {n: planned(args, n) for n in sizes}
    facts = {"commit": commit(), "hardware": "predicted, no GPU was used", "command": command_of(args)}
    rows = [row_of(name, plans) | facts for name in plans[sizes[0]]]
    write_csv(args.out / "predicted.csv", list(rows[0]), rows)
    for row in rows:
        told = "  ".join(f"{n} GPUs {row[f'ms_{n}']} ms" for n in sizes)
        print(f"{row['model']}: {row['parameters']:,} parameters  {told}")


def planned(args: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """Model -> its plan on so many GPUs, as plan.py's ``--json`` has it.

    Raises:
        SystemExit: plan.py ended with an error; its own line stands above.
    """
    supernet = ["--supernet"] if args.supernet == "true" else []
    # fmt: off
    words = [
        "--world-size", world_size, "--data", args.data, "--config", args.config, "--batch-size", args.batch_size,
        "--json", "-", *supernet, "--allocation", *args.allocation,
    ]
    # fmt: on
    command = [sys.executable, "-W", "ignore", str(ROOT / "launch" / "plan.py"), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"plan.py failed for {world_size} GPUs (exit code {done.returncode})")
    found: dict[str, Any] = json.loads(done.stdout)["allocations"]
    return found


def row_of(name: str, plans: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The columns of one model."""
    row: dict[str, Any] = {"model": name, "parameters": next(iter(plans.values()))[name]["parameters"]}
    for world_size, models in plans.items():
        plan = models[name]
        row[f"ms_{world_size}"] = f"{plan['step_ms']:.4f}"
        row[f"mib_{world_size}"] = f"{max(plan['bytes']['per_rank']['hbm']) / 2**20:.1f}"
        row[f"imbalance_{world_size}"] = f"{plan['imbalance']['time']:.2f}"
    return row


def command_of(args: argparse.Namespace) -> str:
    """The command as a person would type it."""
    words = ["--world-sizes", args.world_sizes, "--batch-size", args.batch_size, "--allocation", *args.allocation]
    told = f"python tools/studies/predicted_steps.py --config {args.config} --data PREPARED --out OUT"
    return portable(" ".join([told, *map(str, words)]), args.out)


if __name__ == "__main__":
    main()
