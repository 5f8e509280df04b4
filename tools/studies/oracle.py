"""How good a search for widths could be if it saw the future: utilities scored on the test rows themselves.

    python tools/studies/oracle.py --config configs/movielens_1m_time/adass_deepfm.yaml --data PREPARED \
        --out runs/oracle --budgets 10%,25%,50% --seeds 3

A search sees validation rows, its result is judged on test rows, which are later where data are split by time. If found
widths disappoint there, either the validation rows misled the search, or no widths do better. So the two splits change
places for the search alone, in a copy of the data, and what it finds is trained and judged on the data as they are. No
result of this is one that a user could have: it is a ceiling for the search's choice of rows.

Leaves OUT/oracle.csv, a line per seed and budget. Runs that are finished are skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from embsearch_dist.config.read import written
from embsearch_dist.data.store.manifest import MANIFEST
from embsearch_dist.files import read_json, read_sealed, write_json, write_sealed
from tools.gpucheck.facts import hardware
from tools.studies.jobs import Job, recorded, run_all, trained_in

EXCHANGED = {"validation": "test", "test": "validation"}
FIGURES = ("seed", "budget", "parameters", "validation_auc", "test_auc", "test_logloss", "widths")
COLUMNS = ("commit", "hardware", "command", *FIGURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config whose train, optim and model sections count")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", default="10%,25%,50%", help="as search.budget takes them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    args = parser.parse_args()
    budgets = [b.strip() for b in args.budgets.split(",")]
    exchanged, config = exchange(args.data, args.out / "exchanged"), search_config(args.config, args.out)
    searches, trainings = [], []
    for seed in range(args.seeds):
        home = args.out / f"seed{seed}"
        first, *more = budgets
        words = [f"--data.path={exchanged}", f"--run.dir={home / 'search'}", f"--run.seed={seed}"]
        words += [f"--search.budget={first}", f"--search.pareto={json.dumps(more)}"]
        result = home / "search" / "allocation.json"
        searches.append([Job(f"seed{seed}-search", "launch/search.py", ["--config", str(config), *words], result)])
    run_all(searches, args.out / "logs", args.jobs)
    for seed in range(args.seeds):
        home = args.out / f"seed{seed}"
        for number, budget in enumerate(budgets):
            name = name_of(number, budget)
            file = without_data(home / "search" / "allocations" / f"{name}.json", home / f"{name}.json")
            words = [f"--data.path={args.data}", f"--run.dir={home / 'models'}", f"--run.seed={seed}"]
            words += ["--allocation", str(file), "--name", name]
            result = trained(home, name, seed) / "evaluation.json"
            job = Job(f"seed{seed}-{name}", "launch/retrain.py", ["--config", str(args.config), *words], result)
            trainings.append([job])
    run_all(trainings, args.out / "logs", args.jobs)
    told = f"--config {args.config} --data PREPARED --out OUT --budgets {','.join(budgets)} --seeds {args.seeds}"
    write_table(args.out, budgets, args.seeds, f"python tools/studies/oracle.py {told}")


def exchange(data: Path, out: Path) -> Path:
    """A copy of prepared data whose validation and test split have changed places."""
    if (out / MANIFEST).exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(data, out)
    (out / "test").rename(out / "held")
    (out / "validation").rename(out / "test")
    (out / "held").rename(out / "validation")
    for name in ("schema.json", MANIFEST):  # the manifest last: it says that the copy is whole
        body = read_sealed(out / name)
        rows = body["rows"]
        body["rows"] = {**rows, **{a: rows[b] for a, b in EXCHANGED.items()}}
        for entry in body.get("files", []):
            folder, _, rest = entry["name"].partition("/")
            entry["name"] = f"{EXCHANGED.get(folder, folder)}/{rest}"
        body.get("files", []).sort(key=lambda e: e["name"])
        write_sealed(out / name, body)
    return out


def search_config(config: Path, out: Path) -> Path:
    """The config's recipe with a search by utilities in it."""
    body = written(config)
    candidates = body.get("search", {}).get("candidates", [0, 2, 4, 8, 16, 32])
    search = {"name": "oracle", "candidates": candidates, "width": max(32, *candidates)}
    path = out / "oracle.yaml"
    path.write_text(yaml.safe_dump({**body, "method": "utilities", "search": search}, sort_keys=False))
    return path


def without_data(found: Path, out: Path) -> Path:
    """The allocation without the name of the data it was found on, which a training compares with its own."""
    body = read_sealed(found)
    body.pop("data", None)
    write_json(out, body)
    return out


def name_of(number: int, budget: str) -> str:
    """What the search calls the allocation of its n-th budget."""
    return f"oracle-{budget.replace('%', 'pct')}" if number else "oracle"


def trained(home: Path, name: str, seed: int) -> Path:
    return trained_in(home / "models", name, seed)


def write_table(out: Path, budgets: list[str], seeds: int, command: str) -> None:
    rows = []
    for seed in range(seeds):
        for number, budget in enumerate(budgets):
            name = name_of(number, budget)
            place = trained(out / f"seed{seed}", name, seed)
            result = read_json(place / "evaluation.json")
            best = json.loads((place / "checkpoints" / "retrain" / "best.json").read_text())["step"]
            lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
            validation = next(x["auc"] for x in lines if x.get("split") == "validation" and x["step"] == best)
            commit = recorded(out / "logs").get(f"seed{seed}-{name}", {}).get("commit", "")
            widths = " ".join(f"{n}={w}" for n, w in result["widths"].items())
            figures = (result["embedding_parameters"], f"{validation:.6f}", f"{result['auc']:.6f}")
            rows.append((commit, hardware(), command, seed, budget, *figures, f"{result['logloss']:.6f}", widths))
    with open(out / "oracle.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    print(out / "oracle.csv")


if __name__ == "__main__":
    main()
