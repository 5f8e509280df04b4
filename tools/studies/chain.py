"""All of a config on several ranks: search and retrain, seconds and memory of each stage, and kills on order.

    python tools/studies/chain.py --config configs/criteo/adass_deepfm_scale.yaml --data PREPARED --out runs/scale
    python tools/studies/chain.py --config configs/criteo/nasrec_scale.yaml --data PREPARED --out runs/nasrec_scale
    python tools/studies/chain.py ... --out runs/scale_killed --kill
    python tools/studies/chain.py --out runs/scale_killed --compare runs/scale

``--kill`` sends SIGKILL to the last rank in mid-stage, and torchrun starts the ranks again. ``--compare``
runs nothing: it says whether two such runs came to the same allocation or history of architectures, the same metrics
and, bit by bit, tables and weights.
Each stage goes into OUT/chain.json: wall seconds with all starts, how often the ranks were started, and the largest
memory of the whole process tree (PSS: what processes share counts once), looked at every two seconds.
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

from tools.studies.jobs import ROOT

SAMPLE_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/criteo/adass_deepfm_scale.yaml")
    parser.add_argument("--data", type=Path, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kill", action="store_true", help="SIGKILL one rank in the middle of each stage")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="only compare OUT with another run directory")
    parser.add_argument("--extra", nargs="*", default=[], help="further overrides, section.key=value")
    args = parser.parse_args()
    if args.compare:
        sys.exit(compare(args.out, args.compare))
    if not args.data:
        parser.error("--data is needed: a folder that launch/prepare.py wrote")
    args.out.mkdir(parents=True, exist_ok=True)
    options = [f"--data.path={args.data}", f"--run.dir={args.out}", *(f"--{x}" for x in args.extra)]
    found = watch(args, "search.py", ["--config", str(args.config), *options])
    found |= watch(args, "retrain.py", ["--run", str(args.out)])
    (args.out / "chain.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def watch(args: argparse.Namespace, script: str, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Run one script under torchrun; the figures of each of its stages.

    Raises:
        SystemExit: the script failed; its output stands above.
    """
    # fmt: off
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks),
        "--max-restarts", "3" if args.kill else "0", "--", str(ROOT / "launch" / script), *arguments,
    ]
    # fmt: on
    stages: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    child = subprocess.Popen(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
    while child.poll() is None:
        time.sleep(SAMPLE_S)
        ranks = rank_processes(child.pid)
        stage, step, steps = where(args.out, script)
        now = stages.setdefault(stage, {"seconds": 0.0, "peak_gib": 0.0, "kills": 0, "starts": []})
        now["seconds"] += time.monotonic() - started
        started = time.monotonic()
        now["peak_gib"] = max(now["peak_gib"], tree_gib(child.pid))
        now["starts"] = sorted({*now["starts"], *(p.pid for p in ranks.values())})
        if args.kill and not now["kills"] and steps and step >= steps // 2 and args.ranks - 1 in ranks:
            print(f"chain: SIGKILL to rank {args.ranks - 1} in {stage}, step {step} of {steps}", flush=True)
            ranks[args.ranks - 1].kill()
            now["kills"] += 1
    if child.returncode:
        raise SystemExit(f"{script} failed with exit code {child.returncode}")
    return {
        k: {
            **v,
            "seconds": round(v["seconds"]),
            "peak_gib": round(v["peak_gib"], 2),
            "starts": len(v["starts"]) // args.ranks,
        }
        for k, v in stages.items()
    }


def where(out: Path, script: str) -> tuple[str, int, int]:
    """(stage, its last recorded step, its number of steps; 0 when unknown) of the run that is under way."""
    directory = out
    if script == "retrain.py":
        stage = "retrain"
        directory = max((out / "retrain").glob("*"), key=lambda p: p.stat().st_mtime, default=out)
    else:
        marks = sorted((out / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime)
        stage = marks[-1].stem if marks else "supernet"
    if not (out / "config.yaml").exists():
        return stage, 0, 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    if stage == "search":
        steps = int(config["search"]["policy"]["steps"])
    elif stage == "evolution":
        steps = int(config["search"]["evolution"]["generations"])
    else:
        section = config["train"] if stage == "retrain" else config["search"]["supernet"]
        rows = json.loads((Path(config["data"]["path"]) / "schema.json").read_text())["rows"]["train"]
        steps = int(section["epochs"]) * (rows // int(section["batch_size"]))
    return stage, last_step(directory / "metrics.jsonl", stage), steps


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
    """Print what differs between the results of two runs; 0 when nothing does."""
    different = 0
    for name, read in {"what was found": _found, "test metrics": _metrics, "weights": _weights}.items():
        same = read(one) == read(other)
        different += not same
        print(f"{name}: {'the same' if same else 'DIFFERENT'}")
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
