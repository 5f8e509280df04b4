"""All of a config on several ranks: search and retrain, seconds and memory of each stage, and kills on order.

    python tools/studies/chain.py --config configs/criteo/auto_deepfm_scale.yaml --data PREPARED --out runs/scale \
        --ranks 1 --threads 2 --beside ues-16 ues-32 magnitude
    python tools/studies/chain.py --config configs/criteo/adass_deepfm_scale.yaml --data PREPARED --out runs/scale
    python tools/studies/chain.py --config configs/criteo/nasrec_scale.yaml --data PREPARED --out runs/nasrec_scale
    python tools/studies/chain.py ... --out runs/scale_killed --kill
    python tools/studies/chain.py --out runs/scale_killed --compare runs/scale

``--beside`` trains further models with the same recipe, from fresh weights: uniform widths, and what ``fdo`` or
``magnitude`` finds under the budget of the config, which cut down the widest model of the search if it has one. The
uniform width of that model is not trained once more, which would give the same bits: the model itself is measured.
``--kill`` sends SIGKILL to the last rank in mid-stage, and torchrun starts the ranks again. ``--compare``
runs nothing: it says whether two such runs came to the same allocation or history of architectures, the same metrics
and, bit by bit, tables and weights.
Each stage goes into OUT/chain.json: wall seconds with all starts, how often the ranks were started, and the largest
memory of the whole process tree (PSS: what processes share counts once), looked at every two seconds. OUT/chain.csv
has a line per stage, with the figures of the model that it left. Give the same command again after a stop; with another
--config or --extra it is refused, because what has ended is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.config.read import written
from embsearch_dist.files import write_json
from embsearch_dist.methods.widest import FOLDER as WIDEST_FOLDER
from tools.gpucheck.facts import hardware
from tools.studies.budget_tables import model_columns, portable
from tools.studies.comparable import RULES, WIDEST, rule_section
from tools.studies.jobs import ROOT, commit, write_csv

SAMPLE_S = 2.0
COLUMNS = (
    "commit", "command", "seed", "hardware", "data", "ranks", "threads", "stage", "seconds", "peak_gib", "starts",
    "kills", "model", "widths", "parameters", "share_of_ues32", "validation_auc", "validation_logloss", "test_auc",
    "test_logloss",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/criteo/adass_deepfm_scale.yaml")
    parser.add_argument("--data", type=Path, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--beside", nargs="*", default=[], help="further models: ues-WIDTH, fdo, magnitude")
    parser.add_argument("--kill", action="store_true", help="SIGKILL one rank in the middle of each stage")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="only compare OUT with another run directory")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides, section.key=value")
    args = parser.parse_args()
    if args.compare:
        sys.exit(compare(args.out, args.compare))
    if not args.data:
        parser.error("--data is needed: a folder that launch/prepare.py wrote")
    for name in args.beside:
        if name not in RULES and not (name.startswith("ues-") and name[4:].isdigit()):
            parser.error(f"--beside {name}: neither ues-WIDTH nor one of {', '.join(RULES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args)
    for label, script, arguments in plan(args):
        script, arguments = measured(args.out, label, script, arguments)
        if not record.has(label, script, arguments):
            watch(args, label, script, arguments, record)
            record.finish(label, script, arguments)
    write_csv(args.out / "chain.csv", COLUMNS, record.rows())
    print(json.dumps(record.stages, indent=2))


def plan(args: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """(what for, script, arguments) of every command, in order."""
    own = [f"--data.path={args.data}", f"--run.dir={args.out}", *(f"--{x}" for x in args.extra)]
    steps = [("chain", "search.py", ["--config", str(args.config), *own])]
    steps.append(("retrain", "retrain.py", ["--run", str(args.out)]))
    for name in args.beside:
        allocation = name
        if name in RULES:
            allocation = str(args.out / "allocations" / f"{name}.json")
            config = rule_config(args, name)
            steps.append((f"search {name}", "search.py", ["--config", str(config), *own, f"--search.name={name}"]))
        fresh = ["--run", str(args.out), "--allocation", allocation, "--name", name, "--finetune", "false"]
        # What follows reads the run's config, which the search of a rule has replaced by its own: same recipe.
        steps.append((f"retrain {name}", "retrain.py", fresh))
    return steps


def measured(out: Path, label: str, script: str, arguments: list[str]) -> tuple[str, list[str]]:
    """A command as it is planned, or one that measures the widest model of the search where that is what it trains."""
    model, widest = label.removeprefix("retrain "), out / WIDEST_FOLDER
    if label.startswith("retrain ues-") and (widest / "allocation.json").exists():
        widths = json.loads((widest / "allocation.json").read_text())["widths"]
        if {f"ues-{w}" for w in widths.values()} == {model}:
            return "evaluate.py", ["--run", str(widest)]
    return script, arguments


def rule_config(args: argparse.Namespace, rule: str) -> Path:
    """A file with the recipe and the budget of the config for a rule of ``truncation``."""
    body = written(args.config)
    search = body.get("search", {})
    width = int(search.get("width") or max(WIDEST, *search.get("candidates", [0])))
    kept = {"budget": search["budget"]} if "budget" in search else {}
    body |= {"method": "truncation", "search": rule_section(rule, width) | kept}
    path = args.out / f"{rule}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


class Record:
    """OUT/chain.json: stages with their figures, and which commands have ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.out / "chain.json"
        body = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.stages: dict[str, dict[str, Any]] = body.get("stages", {})
        self.finished: dict[str, str] = body.get("finished", {})  # label -> command

    def stage(self, label: str, name: str) -> dict[str, Any]:
        """The figures of a stage, which may have had an earlier start."""
        new = {"seconds": 0.0, "peak_gib": 0.0, "kills": 0, "starts": 0, "command": label, "commit": commit()}
        return self.stages.setdefault(name, new)

    def save(self) -> None:
        write_json(self.path, {"stages": self.stages, "finished": self.finished})

    def has(self, label: str, script: str, arguments: list[str]) -> bool:
        """Whether a command has ended.

        Raises:
            SystemExit: another one of this label has, whose figures would stand for those of this one.
        """
        before, now = self.finished.get(label), self.told(script, arguments)
        if before not in (None, now):
            raise SystemExit(f"{self.path}: {label} was {before}, and now is {now}. Give another --out")
        return before is not None

    def finish(self, label: str, script: str, arguments: list[str]) -> None:
        self.finished[label] = self.told(script, arguments)
        self.save()

    def told(self, script: str, arguments: list[str]) -> str:
        """A command as the record has it."""
        return portable(f"python launch/{script} {' '.join(arguments)}", self.args.out)

    def rows(self) -> list[dict[str, Any]]:
        """A line of the CSV for each stage, and for each model whose training was too short to be seen."""
        facts = {"hardware": hardware(), "ranks": self.args.ranks, "threads": self.args.threads}
        out = self.args.out
        places = {f"retrain {p.parent.name}": p.parent for p in out.glob("retrain/*/evaluation.json")}
        if (out / WIDEST_FOLDER / "evaluation.json").exists():
            places[WIDEST_FOLDER] = out / WIDEST_FOLDER
        rows = []
        for stage in [*self.stages, *(name for name in sorted(places) if name not in self.stages)]:
            told = self.stages.get(stage, {})
            row = {**facts, **told, "stage": stage, "command": self.finished.get(told.get("command", ""), "")}
            if told:
                row["seconds"] = round(told["seconds"])
            if stage in places:
                row |= model_columns(places[stage])
                row["model"] = f"ues-{row['widths'].split('=')[-1]}" if stage == WIDEST_FOLDER else places[stage].name
            rows.append({k: row.get(k, "") for k in COLUMNS})
        return rows


def watch(args: argparse.Namespace, label: str, script: str, arguments: list[str], record: Record) -> None:
    """Run one script under torchrun and record the figures of each of its stages.

    Raises:
        SystemExit: the script failed; its output stands above.
    """
    # fmt: off
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks),
        "--max-restarts", "3" if args.kill else "0", "--", str(ROOT / "launch" / script), *arguments,
    ]
    # fmt: on
    seen: dict[str, set[int]] = {}
    began, started = time.time(), time.monotonic()  # the first is compared with times of files
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    while child.poll() is None:
        time.sleep(SAMPLE_S)
        ranks = rank_processes(child.pid)
        stage, step, steps = where(args.out, script, began)
        name = f"{stage} {label.split()[1]}" if label.startswith("search ") else stage
        now, pids = record.stage(label, name), seen.setdefault(name, set())
        now["seconds"] += time.monotonic() - started
        started = time.monotonic()
        now["peak_gib"] = round(max(now["peak_gib"], tree_gib(child.pid)), 2)
        new = {p.pid for p in ranks.values()} - pids
        pids |= new
        now["starts"] += len(new) / args.ranks
        if args.kill and not now["kills"] and steps and step >= steps // 2 and args.ranks - 1 in ranks:
            print(f"chain: SIGKILL to rank {args.ranks - 1} in {stage}, step {step} of {steps}", flush=True)
            ranks[args.ranks - 1].kill()
            now["kills"] += 1
        record.save()
    if child.returncode:
        raise SystemExit(f"{script} failed with exit code {child.returncode}")


def where(out: Path, script: str, began: float) -> tuple[str, int, int]:
    """(stage, its last recorded step, its number of steps; 0 when unknown) of the run that is under way since
    ``began``."""
    directory, kind = out, "retrain"
    if script == "evaluate.py":
        return "evaluate", 0, 0
    if script == "retrain.py":
        places = [p for p in (out / "retrain").glob("*") if p.stat().st_mtime >= began]
        directory = max(places, key=lambda p: p.stat().st_mtime, default=out)
        stage = f"retrain {directory.name}" if places else "retrain"
    else:
        marks = [p for p in (out / "stages").glob("*.json") if p.stat().st_mtime >= began]
        marks.sort(key=lambda p: p.stat().st_mtime)
        stage = marks[-1].stem if marks else "start"
        directory, kind = (out / WIDEST_FOLDER, kind) if stage == WIDEST_FOLDER else (out, stage)
    if not (out / "config.yaml").exists():
        return stage, 0, 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    if stage == "search":
        steps = int(config["search"].get("policy", {}).get("steps", 0))
    elif stage == "evolution":
        steps = int(config["search"]["evolution"]["generations"])
    else:
        section = config["search"]["supernet"] if stage == "supernet" else config["train"]
        rows = json.loads((Path(config["data"]["path"]) / "schema.json").read_text())["rows"]["train"]
        steps = int(section["epochs"]) * (rows // int(section["batch_size"]))
    return stage, last_step(directory / "metrics.jsonl", kind), steps


def last_step(path: Path, stage: str) -> int:
    """The step of the last whole line of a stage in a metrics file."""
    if not path.exists():
        return 0
    for line in reversed(path.read_text().splitlines()):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if found["stage"] == stage:
            return int(found["step"])
    return 0


def rank_processes(root: int) -> dict[int, psutil.Process]:
    """The processes of the ranks under torchrun, by rank."""
    found = {}
    for process in psutil.Process(root).children():
        try:
            found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue
    return found


def tree_gib(root: int) -> float:
    """Memory of a process and all below it, in GiB."""
    total = 0
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**30


def compare(one: Path, other: Path) -> int:
    """Print what differs between the results of two runs, or is in neither; 0 when all is there and the same."""
    different = 0
    for name, read in {"what was found": _found, "test metrics": _metrics, "weights": _weights}.items():
        first, second = read(one), read(other)
        told = "the same" if first == second else "DIFFERENT"
        if not first and not second:  # two runs without a model agree about nothing
            told = "MISSING in both"
        different += told != "the same"
        print(f"{name}: {told}")
    return 1 if different else 0


def _found(run: Path) -> Any:
    """Field -> width; of a search for architectures its history, every candidate with its scores in their order."""
    if (run / "evolution.json").exists():
        return (run / "evolution.json").read_bytes()
    return json.loads((run / "allocation.json").read_text())["widths"]


def _metrics(run: Path) -> Any:
    """All of evaluation.json but the one measured time."""
    found = [json.loads(p.read_text()) for p in sorted(run.glob("retrain/*/evaluation.json"))]
    return [{k: v for k, v in f.items() if k != "inference_rows_per_s"} for f in found]


def _weights(run: Path) -> Any:
    """Checksums of the tensors in every checkpoint that was kept, as the manifests state them."""
    found = {}
    for path in sorted(run.glob("**/checkpoints/**/manifest.json")):
        files = json.loads(path.read_text())["files"]
        found[str(path.parent.relative_to(run))] = {k: v for k, v in files.items() if k.endswith(".distcp")}
    return found


if __name__ == "__main__":
    main()
