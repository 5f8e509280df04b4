"""iHAS on planted populations: are the groups the populations, are the right fields dropped, and does it pay?

    python tools/studies/planted_groups.py --out runs/planted_groups --seeds 3

For each seed: click logs of two populations that depend on other fields (``prepare.py --format populations``), the
search of configs/populations/ihas.yaml, its group models, the same gates with one group (iHAS-2) and UES-16, one
recipe for all. Every run is an ordinary run directory under OUT; what is finished is skipped. Writes
OUT/planted_groups.json
and prints a table: adjusted Rand index of groups and populations on the test rows, F1 of the dropped fields, test AUC.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.studies.asked import keep_to
from tools.studies.jobs import ROOT, Job, run_all

CONFIG = ROOT / "configs" / "populations" / "ihas.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, one thread each")
    parser.add_argument("--search-only", action="store_true", help="groups and dropped fields, no retraining")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides of the search, section.key=value")
    args = parser.parse_args()
    keep_to(args.out, config=args.config, rows=args.rows, extra=args.extra)
    run_all([searches(args, seed) for seed in range(args.seeds)], args.out / "logs", args.jobs)
    if not args.search_only:
        for seed in range(args.seeds):
            one_group(args.out / f"seed{seed}")
        run_all([retrains(args, seed) for seed in range(args.seeds)], args.out / "logs", args.jobs)
    found = [measure(args.out / f"seed{seed}", args.search_only) for seed in range(args.seeds)]
    (args.out / "planted_groups.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


def searches(args: argparse.Namespace, seed: int) -> list[Job]:
    """Data and search of one seed."""
    home = args.out / f"seed{seed}"
    make = ["--format", "populations", "--rows", str(args.rows), "--seed", str(seed), "--out", str(home / "data")]
    options = [*common(args, home, seed), f"--run.dir={home / 'run'}", *(f"--{x}" for x in args.extra)]
    return [
        Job(f"seed{seed}-data", "launch/prepare.py", make, home / "data" / "schema.json"),
        Job(f"seed{seed}-search", "launch/search.py", options, home / "run" / "groups.json"),
    ]


def common(args: argparse.Namespace, home: Path, seed: int) -> list[str]:
    return ["--config", str(args.config), f"--data.path={home / 'data'}", f"--run.seed={seed}"]


def one_group(home: Path) -> None:
    """A run directory with the same gates, to be searched with one group."""
    if not (home / "one").exists():
        left = shutil.ignore_patterns("groups*", "retrain", "allocation*")
        shutil.copytree(home / "run", home / "one", ignore=left)


def retrains(args: argparse.Namespace, seed: int) -> list[Job]:
    """The group models, one model for all rows with the same gates (iHAS-2), and the uniform width."""
    home = args.out / f"seed{seed}"
    run, one = home / "run", home / "one"
    extra = [f"--{x}" for x in args.extra]
    again = [*common(args, home, seed), f"--run.dir={one}", *extra, "--search.groups.k=1"]
    uniform = [*common(args, home, seed), f"--run.dir={home}", "--allocation", "ues-16", "--name", "ues-16"]
    ues = home / "retrain" / ("ues-16" if seed == 0 else f"ues-16-seed{seed}")
    return [
        Job(f"seed{seed}-ihas", "launch/retrain.py", ["--run", str(run)], run / "retrain/ihas/evaluation.json"),
        Job(f"seed{seed}-one", "launch/search.py", again, one / "allocation.json"),
        Job(f"seed{seed}-ihas-2", "launch/retrain.py", ["--run", str(one)], one / "retrain/ihas/evaluation.json"),
        Job(f"seed{seed}-ues", "launch/retrain.py", uniform, ues / "evaluation.json"),
    ]


def measure(home: Path, search_only: bool) -> dict[str, Any]:
    """Figures of one seed."""
    truth = read(home / "data" / "truth.json")
    groups = read(home / "run" / "groups.json")["groups"]
    found = {"rand": {}, "truth_auc": truth["bayes_auc"]}
    for split in ("train", "test"):
        own = np.load(home / "run" / "groups" / "assignment" / f"{split}.npy")
        real = np.load(home / "data" / "populations" / f"{split}.npy")
        found["rand"][split] = adjusted_rand(own, real)
    # Which group is which population: by majority on the test rows.
    for k, group in enumerate(groups):
        population = int(np.bincount(real[own == k]).argmax()) if (own == k).any() else 0
        ranks = truth["ranks"][str(population)]
        group["population"], group["f1_dropped"] = population, f1(group["widths"], ranks)
    found["groups"] = groups
    if not search_only:
        for name, folder in {"ihas": "run/retrain/ihas", "ihas-2": "one/retrain/ihas"}.items():
            found[name] = read(home / folder / "evaluation.json")
        found["ues-16"] = read(next((home / "retrain").glob("ues-16*")) / "evaluation.json")
    return found


def f1(widths: dict[str, int], ranks: dict[str, int]) -> float:
    """F1 of 'dropped' against 'the population's click does not depend on it'."""
    dropped, idle = {n for n, w in widths.items() if not w}, {n for n, r in ranks.items() if not r}
    both = len(dropped & idle)
    return 2 * both / (len(dropped) + len(idle)) if dropped or idle else 1.0


def adjusted_rand(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index of two groupings (Hubert and Arabie 1985): 1 = the same, about 0 = by chance."""
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a.astype(int), b.astype(int)), 1)

    def pairs(n: np.ndarray) -> float:
        return float((n * (n - 1) / 2).sum())

    cells, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / pairs(np.array([table.sum()]))
    most = (rows + columns) / 2
    return 1.0 if most == expected else (cells - expected) / (most - expected)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table, a line per seed, and the means."""
    names = [n for n in ("ihas", "ihas-2", "ues-16") if n in found[0]]
    lines = ["| seed | Rand (test) | F1 of dropped fields | " + " | ".join(f"AUC {n}" for n in names) + " |"]
    lines.append("| --- " * (3 + len(names)) + "|")
    for seed, f in enumerate(found):
        scores = ", ".join(f"{g['f1_dropped']:.2f}" for g in f["groups"])
        aucs = "".join(f" {f[n]['auc']:.5f} |" for n in names)
        lines.append(f"| {seed} | {f['rand']['test']:.3f} | {scores} |{aucs}")
    means = "".join(f" {statistics.fmean(f[n]['auc'] for f in found):.5f} |" for n in names)
    lines.append(f"| mean | {statistics.fmean(f['rand']['test'] for f in found):.3f} | |{means}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
