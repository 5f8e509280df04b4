"""Groups with widths under one budget, beside plain iHAS and one model of searched widths, all of one size.

    python tools/studies/group_widths.py --out runs/group_widths --seeds 3 --small
    python tools/studies/group_widths.py --out runs/group_widths_400k --seeds 3
    python tools/studies/group_widths.py --out runs/ml_group_widths --seeds 1 --data PREPARED \
        --ihas configs/movielens_1m_time/ihas_deepfm.yaml --widths configs/movielens_1m_time/ihas_widths_deepfm.yaml \
        --utilities configs/movielens_1m_time/auto_deepfm.yaml

For each seed: click logs of two populations (or ``--data``), the search of iHAS and its group models. The tables of
those have a size; ``ihas_widths`` and ``utilities`` get it as their budget, and the shares of it that ``--shares``
names. ``ihas_widths`` goes on from the gates of iHAS. Every run is an ordinary run directory under OUT; what is
finished is skipped, and other configs or data need another OUT. Writes OUT/group_widths.csv and prints a table with
differences paired by seed; of what a run of ``--utilities`` trained and did not keep, as ``auto`` does while it widens,
it tells nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.config.read import written
from embsearch_dist.data.planted.populations import ROWS, Pair, Plan, make_populations
from tools.gpucheck.facts import hardware
from tools.studies.asked import body_of, keep_to
from tools.studies.jobs import ROOT, Job, commit, run_all, write_csv

CONFIGS = ROOT / "configs" / "populations"
RESULTS = ("groups.json", "retrain", "allocation*", "config.yaml", "report")  # not copied with what was trained
SMALL = Plan(
    shares=(0.55, 0.45),
    intercepts=(-0.6, -1.0),
    tells=(20, 20),
    clarity=0.98,
    pairs=(Pair((2, 0), (20, 30), 1.6), Pair((0, 2), (30, 20), 1.6), Pair((1, 2), (25, 25), 1.2)),
    idle=(40, 60),
    main_effects=(),
    main_variance=0.0,
    zipf=0.5,
)
SMALL_ROWS = 60_000
SMALL_RECIPE = ("train.batch_size=512", "train.epochs=15")  # narrow tables of so few rows still learn after six
SMALL_GATES = ("training.batch_size=512", "training.epochs=10", "outer.pretrain_epochs=3", "outer.lr=0.02")
COLUMNS = (
    "seed",
    "share",
    "budget",
    "model",
    "router",
    "parameters",
    "auc",
    "logloss",
    "commit",
    "command",
    "hardware",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="60,000 rows of ten fields: minutes a seed")
    parser.add_argument("--data", type=Path, help="prepared data for all seeds, in place of planted populations")
    parser.add_argument("--ihas", type=Path, default=CONFIGS / "ihas.yaml")
    parser.add_argument("--widths", type=Path, default=CONFIGS / "ihas_widths.yaml")
    parser.add_argument("--utilities", type=Path, default=CONFIGS / "utilities.yaml", help="of utilities or auto")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5], help="of the size of iHAS's tables")
    parser.add_argument("--uniform", action="store_true", help="the widest uniform width of each budget, too")
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, one thread each")
    args = parser.parse_args()
    seeds = range(args.seeds)
    keep_to(args.out, **asked_of(args))
    for seed in seeds:
        make_data(args, seed)
    run_all([plain(args, seed) for seed in seeds], args.out / "logs", args.jobs)
    run_all([budgeted(args, seed) for seed in seeds], args.out / "logs", args.jobs)
    small = " --small" if args.small else f" --data {args.data.name}" if args.data else ""
    same = {"commit": commit(), "command": f"python tools/studies/group_widths.py{small}", "hardware": hardware()}
    found = [line | same for seed in seeds for line in measure(args, seed)]
    write_csv(args.out / "group_widths.csv", COLUMNS, found)
    print(table(found))


def asked_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the results in OUT depend on; seeds and shares may be added later."""
    files = {name: getattr(args, name) for name in ("ihas", "widths", "utilities")}
    told = {name: body_of(path.name, written(path)) for name, path in files.items()}
    return {**told, "small": args.small, "data": Path(args.data, "schema.json") if args.data else ""}


def make_data(args: argparse.Namespace, seed: int) -> None:
    """Planted populations of a seed, unless data are given."""
    place = args.out / f"seed{seed}" / "data"
    if args.data is None and not (place / "schema.json").exists():
        make_populations(place, *((SMALL_ROWS, seed, SMALL) if args.small else (ROWS, seed)), quiet=True)


def plain(args: argparse.Namespace, seed: int) -> list[Job]:
    """Search and group models of iHAS."""
    run = args.out / f"seed{seed}" / "ihas"
    done = run / "retrain" / "ihas" / "evaluation.json"
    return [
        Job(f"seed{seed}-ihas", "launch/search.py", common(args, args.ihas, run, seed), run / "groups.json"),
        Job(f"seed{seed}-ihas-models", "launch/retrain.py", ["--run", str(run)], done),
    ]


def budgeted(args: argparse.Namespace, seed: int) -> list[Job]:
    """Both searches under each budget, and their models; later budgets go on from what the first has trained."""
    home, jobs = args.out / f"seed{seed}", []
    size, before = size_of(home / "ihas"), {"ihas_widths": home / "ihas", "utilities": None}
    for share in args.shares:
        for name, config in {"ihas_widths": args.widths, "utilities": args.utilities}.items():
            run, label = home / f"{name}-{share:g}", f"seed{seed}-{name}-{share:g}"
            own = [f"--search.budget={int(share * size)}", f"--search.name={name}"]
            found = run / ("groups.json" if name == "ihas_widths" else "allocation.json")
            search = [*common(args, config, run, seed), *own]
            jobs.append(Job(label, "launch/search.py", search, found, copying(before[name], run)))
            uniform = args.uniform and name == "utilities"
            # The models of groups begin with fresh weights, so this one does, too.
            fresh = ["--finetune", "false"] if name == "utilities" else []
            train = ["--run", str(run), *fresh, *(["--or-uniform"] if uniform else [])]
            done = run / ("final.json" if uniform else f"retrain/{name}/evaluation.json")
            jobs.append(Job(f"{label}-models", "launch/retrain.py", train, done))
            before[name] = run
    return jobs


def common(args: argparse.Namespace, config: Path, run: Path, seed: int) -> list[str]:
    data = args.data or args.out / f"seed{seed}" / "data"
    words = [f"--{word}" for word in SMALL_RECIPE] if args.small else []
    if args.small and config != args.utilities:
        words += [f"--search.{word}" for word in SMALL_GATES]
    return ["--config", str(config), f"--data.path={data}", f"--run.seed={seed}", f"--run.dir={run}", *words]


def copying(source: Path | None, target: Path) -> Callable[[], None]:
    """What brings all that a search has trained into another run directory, once."""

    def copy() -> None:
        if source is not None and not target.exists():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*RESULTS))

    return copy


def size_of(run: Path) -> int:
    """Parameters of the tables of all groups."""
    return sum(int(g["sizes"]["parameters"]) for g in read(run / "groups.json")["groups"])


def measure(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """A line for each model, router and budget of one seed."""
    home, lines = args.out / f"seed{seed}", []
    size = size_of(home / "ihas")
    for share in args.shares:
        head = {"seed": seed, "share": share, "budget": int(share * size)}
        plain_ihas = [("ihas", home / "ihas")] if share == 1 else []
        for name, run in [*plain_ihas, ("ihas_widths", home / f"ihas_widths-{share:g}")]:
            for router in ("centres", "fields"):
                file = run / "retrain" / name / f"evaluation{'-fields' * (router == 'fields')}.json"
                if file.exists():
                    lines.append(head | figures(name, read(file), size_of(run)) | {"router": router})
        run = home / f"utilities-{share:g}"
        uniform = [("uniform", place) for place in sorted((run / "retrain").glob("ues-*"))]
        for name, place in [*uniform, ("utilities", searched_of(run))]:
            if (place / "evaluation.json").exists():
                body = read(place / "evaluation.json")
                lines.append(head | figures(name, body, int(body["embedding_parameters"])) | {"router": ""})
    check_single(lines, home)
    return lines


def searched_of(run: Path) -> Path:
    """The model of searched widths of a run of ``utilities`` or ``auto``. Other trainings beside it were tried and not
    kept: a choice has the one it kept in ``final.json``, unless that is a uniform width, which has a line of its own.
    """
    final = read(run / "final.json") if (run / "final.json").exists() else {}
    kept = bool(final) and not final.get("fallback") and not final["name"].startswith("ues-")
    return run / (final["model"] if kept else "retrain/utilities")


def check_single(lines: Sequence[dict[str, Any]], home: Path) -> None:
    """Refuse two models that would be one line of the table: its mean and error would count the seed twice.

    Raises:
        SystemExit: names the model and the folder.
    """
    seen = set()
    for line in lines:
        key = tuple(line[k] for k in ("seed", "share", "model", "router"))
        if key in seen:
            place = home / f"utilities-{line['share']:g}" / "retrain"
            raise SystemExit(f"{place}: two models are {line['model']} of seed {line['seed']}. Delete the outdated one")
        seen.add(key)


def figures(name: str, body: dict[str, Any], size: int) -> dict[str, Any]:
    return {"model": name, "parameters": size, "auc": body["auc"], "logloss": body["logloss"]}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def table(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: means over seeds, and the difference of ``ihas_widths`` to each other model."""
    ours = {(x["seed"], x["share"]): x for x in found if (x["model"], x["router"]) == ("ihas_widths", "centres")}
    kinds = list(dict.fromkeys((x["share"], x["model"], x["router"]) for x in found))
    lines = ["| share | model | parameters | AUC | ihas_widths above it | logloss |", "| --- " * 6 + "|"]
    for share, name, router in kinds:
        own = [x for x in found if (x["share"], x["model"], x["router"]) == (share, name, router)]
        gaps = [ours[x["seed"], share]["auc"] - x["auc"] for x in own]
        size, auc, logloss = (statistics.fmean(x[key] for x in own) for key in ("parameters", "auc", "logloss"))
        called = f"{name}, router of {router}" if router else name
        above = "" if (name, router) == ("ihas_widths", "centres") else told(gaps)
        lines.append(f"| {share:g} | {called} | {size:,.0f} | {auc:.5f} | {above} | {logloss:.5f} |")
    return "\n".join(lines) + "\n"


def told(gaps: Sequence[float]) -> str:
    """The mean of paired differences, with its standard error where there are several seeds."""
    error = f" (s.e. {statistics.stdev(gaps) / len(gaps) ** 0.5:.5f})" if len(gaps) > 1 else " (one seed)"
    return f"{statistics.fmean(gaps):+.5f}{error}"


if __name__ == "__main__":
    main()
