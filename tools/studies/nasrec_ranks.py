"""Does a supernet's score rank architectures as training them alone does? (NASRec, section 4)

    python tools/studies/nasrec_ranks.py --config configs/movielens_1m/nasrec.yaml --data PREPARED --out runs/ranks

The same random architectures (as many as --networks, of --seed) are scored by one supernet per sampling scheme, with
and without fine-tuning of the head, and each is trained alone with the config's own recipe. Every run is an ordinary
run directory under OUT; what is finished is skipped, so a stopped measurement continues.
Writes OUT/ranks.json, OUT/ranks.md (Kendall's tau, Pearson and Spearman between score and the logloss alone, each with
a 95% interval from resampled architectures) and OUT/ranks.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.studies.budget_tables import kept_logloss
from tools.studies.jobs import Job, run_all, trained_in

SCHEMES = ("single_operator_any_connection", "single_operator_single_connection", "any_operator_any_connection")
TUNING = {"tuned": [], "plain": ["--search.scoring.tune_steps=0"]}
RESAMPLED = 2000
STATISTICS = {
    "Kendall": lambda a, b: stats.kendalltau(a, b).statistic,
    "Pearson": lambda a, b: stats.pearsonr(a, b).statistic,
    "Spearman": lambda a, b: stats.spearmanr(a, b).statistic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the supernets and of the architectures")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="of the trained networks")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides for all runs, section.key=value")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    args = parser.parse_args()
    schemes = args.schemes.split(",")
    for tuning in TUNING:
        wanted = [s for s in schemes if not (args.out / s / f"{tuning}.json").exists()]
        run_all([[search_job(args, s, tuning)] for s in wanted], args.out / "logs", args.jobs)
        for scheme in wanted:
            shutil.copy(args.out / scheme / "evolution.json", args.out / scheme / f"{tuning}.json")
    for scheme in schemes:
        for tuning in TUNING:
            check_asked(args, args.out / scheme / f"{tuning}.json")
    found = {(s, t): scores_of(args.out / s / f"{t}.json") for s in schemes for t in TUNING}
    first = found[schemes[0], "tuned"]
    if any(set(scores) != set(first) for scores in found.values()):
        raise SystemExit(
            f"{args.out}: the supernets have scored different architectures; give each measurement its --out"
        )
    run_all(alone_chains(args, schemes[0]), args.out / "logs", args.jobs)
    trained = trained_of(args, schemes[0])
    rows = [measure(name, scores, trained) for name, scores in found.items()]
    (args.out / "ranks.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = table(rows, len(trained))
    (args.out / "ranks.md").write_text(text)
    draw(found, trained, args.out / "ranks.png")
    print(text)


def common(args: argparse.Namespace, directory: Path) -> list[str]:
    pairs = [f"data.path={args.data}", f"run.dir={directory}", f"run.seed={args.seed}", *args.extra]
    return ["--config", args.config, *(f"--{x}" for x in pairs)]


def search_job(args: argparse.Namespace, scheme: str, tuning: str) -> Job:
    """One supernet (trained once) and its scores. The first generation of a search is what its seed draws, whatever
    the supernet."""
    search = [
        f"--search.sampling.scheme={scheme}",
        "--search.evolution.generations=0",
        "--search.prefilter.proxies=[]",
        f"--search.evolution.population={args.networks}",
        f"--search.evolution.parents={args.networks}",
        f"--search.evolution.keep={args.networks}",
    ]
    arguments = [*common(args, args.out / scheme), *search, *TUNING[tuning]]
    return Job(f"{scheme}-{tuning}", "launch/search.py", arguments, None)


def check_asked(args: argparse.Namespace, path: Path) -> None:
    """Raises:
    SystemExit: the scores in a file are of another seed, or of a search for another number of networks.
    """
    signature = json.loads(path.read_text())["signature"]
    there = {"seed": json.loads(signature["supernet"])["run.seed"], "networks": signature["evolution"]["population"]}
    for name, value in there.items():
        if value != (asked := getattr(args, name)):
            raise SystemExit(f"{path}: scored with --{name} {value}, not {asked}; give each measurement its --out")


def scores_of(path: Path) -> dict[str, float]:
    """Key of an architecture -> logloss by the supernet."""
    return {c["key"]: c["logloss"] for c in json.loads(path.read_text())["seen"]}


def alone_chains(args: argparse.Namespace, scheme: str) -> list[list[Job]]:
    """A training per architecture of the tuned search of ``scheme``, behind tables as wide as its space says."""
    chains = []
    width = json.loads((args.out / scheme / "tuned.json").read_text())["signature"]["space"]["width"]
    for key, path in architectures_of(args.out, scheme).items():
        arguments = [*common(args, args.out / "alone"), "--allocation", f"ues-{width}", "--name", key]
        model = ["--model.backbone", "nasrec", "--model.architecture", str(path)]
        wide = ["--model.unify", "mixed", "--model.unified_width", str(width)]
        target = result_of(args, key)
        chains.append([Job(f"alone-{key}", "launch/retrain.py", [*arguments, *model, *wide], target)])
    return chains


def architectures_of(out: Path, scheme: str) -> dict[str, Path]:
    """Key -> file of every architecture that was scored, written from the record of the search."""
    record = json.loads((out / scheme / "tuned.json").read_text())
    folder = out / "architectures"
    folder.mkdir(exist_ok=True)
    found = {}
    for c in record["seen"]:
        body = {"format": 1, "kind": "architecture", "space": record["signature"]["space"], "blocks": c["blocks"]}
        found[c["key"]] = folder / f"{c['key']}.json"
        found[c["key"]].write_text(json.dumps(body) + "\n")
    return found


def result_of(args: argparse.Namespace, key: str) -> Path:
    return trained_in(args.out / "alone", key, args.seed) / "evaluation.json"


def trained_of(args: argparse.Namespace, scheme: str) -> dict[str, float]:
    """Key -> logloss of the network trained alone."""
    found = {}
    for key in architectures_of(args.out, scheme):
        path = result_of(args, key)
        if args.split == "validation":
            found[key] = kept_logloss(path.parent)
        else:
            found[key] = json.loads(path.read_text())["logloss"]
    return found


def measure(name: tuple[str, str], scores: dict[str, float], trained: dict[str, float]) -> dict[str, Any]:
    """Each statistic with its 95% interval over :data:`RESAMPLED` resamplings of the architectures."""
    keys = sorted(trained)
    a, b = np.array([scores[k] for k in keys]), np.array([trained[k] for k in keys])
    generator = np.random.default_rng(0)
    row: dict[str, Any] = {"scheme": name[0], "tuning": name[1], "networks": len(keys)}
    places = [generator.integers(len(keys), size=len(keys)) for _ in range(RESAMPLED)]
    for label, statistic in STATISTICS.items():
        again = [statistic(a[p], b[p]) for p in places]
        row[label] = [float(statistic(a, b)), *(float(q) for q in np.nanpercentile(again, [2.5, 97.5]))]
    return row


def table(rows: list[dict[str, Any]], networks: int) -> str:
    lines = [f"| {networks} networks: supernet trained by | head | {' | '.join(STATISTICS)} |", "| --- " * 5 + "|"]
    for r in rows:
        cells = [f"{r[k][0]:.2f} ({r[k][1]:.2f} to {r[k][2]:.2f})" for k in STATISTICS]
        lines.append(f"| {r['scheme'].replace('_', ' ')} | {r['tuning']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[tuple[str, str], dict[str, float]], trained: dict[str, float], path: Path) -> None:
    """The score over the logloss alone, a panel per supernet and kind of head."""
    schemes = list(dict.fromkeys(s for s, _ in found))
    figure = Figure(figsize=(9, 2.8 * len(schemes)), dpi=150, layout="constrained")
    panels = figure.subplots(len(schemes), len(TUNING), squeeze=False)
    for (scheme, tuning), scores in found.items():
        axes = panels[schemes.index(scheme)][list(TUNING).index(tuning)]
        axes.scatter([trained[k] for k in trained], [scores[k] for k in trained], s=14)
        tau = STATISTICS["Kendall"]([scores[k] for k in trained], list(trained.values()))
        axes.set_title(f"{scheme.replace('_', ' ')}, {tuning}: tau {tau:.2f}", fontsize=8, loc="left")
        axes.set_xlabel("logloss trained alone", fontsize=8)
        axes.set_ylabel("logloss by the supernet", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
