"""Do two checkouts give the same results, to the byte? Tiny runs of every method, and MovieLens-100K if it is there.

    git worktree add ../before main~20
    python tools/make/same_results.py write runs/same/before --tree ../before
    python tools/make/same_results.py write runs/same/after --methods adass,utilities --movielens RAW/ml-100k
    python tools/make/same_results.py compare runs/same/before runs/same/after

``write`` prepares data, searches, retrains what was found and a uniform width, and evaluates, all on one thread;
``compare`` reads every file of two such folders. Times, speeds, memory and checksums of files that hold them are left
out; weights, rows, widths and figures must be equal. Keys that only AFTER tells are named. Exit code 1: something
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from embsearch_dist.grouped import GROUPS
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.trial import merged
from embsearch_dist.networks.architecture import RESULT
from tools.breaking.bases import RUN, prepare_words, write_clicks

ROOT = Path(__file__).resolve().parents[2]
TIMED = re.compile(r"seconds|_per_s$|time|memory_mb|sha256|^lines$|^ms$|_ms_|_ms$|created")
"""Keys of records whose values two equal runs do not share."""
OF_A_RUN = (".metadata", "manifest.json", "run.lock", "written.json")
"""Files about other files of one run, or about its process."""
SHOWN = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="run everything once")
    write.add_argument("out", type=Path)
    write.add_argument("--tree", type=Path, default=ROOT, help="checkout whose scripts are run")
    write.add_argument("--methods", default=",".join(METHODS), help="whose tiny runs are made; none: no such run")
    write.add_argument("--movielens", type=Path, help="raw MovieLens-100K: its chain too, some minutes more")
    both = commands.add_parser("compare", help="compare two folders")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        differing = compare(args.before, args.after)
        return int(bool(differing))
    tree = args.tree.resolve()
    asked = args.methods.split(",")
    for method in [m for m in METHODS if m in asked]:
        chain_of(method, tree, args.out / method)
    if args.movielens:
        movielens(args.movielens.resolve(), tree, args.out / "movielens_100k")
    return 0


def chain_of(method: str, tree: Path, folder: Path) -> None:
    """A method under its trial settings on a thousand rows."""
    folder.mkdir(parents=True)
    write_clicks(folder, 0)
    body = {"method": method, **RUN, **merged(METHODS[method].trial)}
    (folder / "method.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    start(tree, folder, *prepare_words(0))
    start(tree, folder, "search.py", "--config", "method.yaml", "--run.dir", "run")
    if METHODS[method].result:
        start(tree, folder, "retrain.py", "--run", "run")
        if METHODS[method].result != RESULT:  # a network's tables have the width of its space
            start(tree, folder, "retrain.py", "--run", "run", "--allocation", "ues-4")
        trained = {p.parent for name in ("allocation.json", GROUPS) for p in folder.glob(f"run/retrain/*/{name}")}
        for result in sorted(trained):
            start(tree, folder, "evaluate.py", "--run", f"run/retrain/{result.name}", "--split", "validation")
    print(f"{method}: done", flush=True)


def movielens(raw: Path, tree: Path, folder: Path) -> None:
    """AdaS&S on MovieLens-100K split by time, as shipped."""
    folder.mkdir(parents=True)
    words = ("--format", "movielens_100k", "--split", "time", "--input", str(raw), "--out", "data", "--quiet")
    start(tree, folder, "prepare.py", *words)
    config = tree / "configs" / "movielens_100k" / "adass_deepfm.yaml"
    start(tree, folder, "search.py", "--config", str(config), "--data.path", "data", "--run.dir", "run")
    start(tree, folder, "retrain.py", "--run", "run")
    start(tree, folder, "retrain.py", "--run", "run", "--allocation", "ues-32")
    print("movielens_100k: done", flush=True)


def start(tree: Path, folder: Path, script: str, *words: str) -> None:
    """An entry script of a checkout, on one thread; what it says is shown only if it fails."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tree / "launch" / script), *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}: {script} {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def compare(before: Path, after: Path) -> list[str]:
    """Names of the files that differ or that one side lacks; they are printed, with how many are equal."""
    for folder in (before, after):
        if not folder.is_dir():
            raise SystemExit(f"{folder}: there is no such folder. Make it with the command write")
    old, new = _files(before), _files(after)
    differing = [f"only in {before}: {n}" for n in sorted(old.keys() - new.keys())]
    differing += [f"only in {after}: {n}" for n in sorted(new.keys() - old.keys())]
    shared = sorted(old.keys() & new.keys())
    told = {n: difference(old[n], new[n]) for n in shared}
    differing += [f"differs: {n}" for n, what in told.items() if what is None]
    for line in [*differing[:SHOWN], *(f"tells more: {n}: {', '.join(what)}" for n, what in told.items() if what)]:
        print(line)
    if len(differing) > SHOWN:
        print(f"and {len(differing) - SHOWN} more")
    print(f"{len(shared) - sum(d.startswith('differs') for d in differing)} of {len(shared)} files are equal")
    return differing


def difference(one: Path, other: Path) -> list[str] | None:
    """None where two files differ in more than times; else the keys that only the other one tells."""
    if one.read_bytes() == other.read_bytes():
        return []
    if one.suffix not in (".json", ".jsonl", ".yaml"):
        return None
    added: dict[str, None] = {}
    return list(added) if _holds(_records(one), _records(other), added) else None


def _holds(one: Any, other: Any, added: dict[str, None], where: str = "") -> bool:
    """Whether ``other`` tells all of ``one``; ``added`` takes the keys that it tells beside."""
    if isinstance(one, dict) and isinstance(other, dict):
        added |= dict.fromkeys(f"{where}{k}" for k in other if k not in one)
        return all(k in other and _holds(v, other[k], added, f"{where}{k}.") for k, v in one.items())
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(_holds(a, b, added, where) for a, b in zip(one, other, strict=True))
    return bool(one == other) and type(one) is type(other)


def untimed(body: Any) -> Any:
    """A record without what is a matter of the clock."""
    if isinstance(body, dict):
        return {k: untimed(v) for k, v in body.items() if not TIMED.search(k)}
    return [untimed(v) for v in body] if isinstance(body, list) else body


def _records(path: Path) -> list[Any]:
    text = path.read_text()
    if path.suffix == ".yaml":
        return [yaml.safe_load(text)]
    return [untimed(json.loads(line)) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def _files(folder: Path) -> dict[str, Path]:
    """Every file but TensorBoard's, whose names hold the second, locks, and lists of other files with their times."""
    kept = (p for p in folder.rglob("*") if p.is_file() and "tb" not in p.relative_to(folder).parts)
    return {str(p.relative_to(folder)): p for p in kept if p.name not in OF_A_RUN}


if __name__ == "__main__":
    sys.exit(main())
