"""The command line of tools/gpu_check.py. Imports no torch."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.gpucheck.facts import facts
from tools.gpucheck.listing import CHECKS, Check, describe, selected
from tools.gpucheck.runner import run_checks, starter, write_line
from tools.gpucheck.table import FAILED, markdown, text_table

BUDGET_S = 420.0


def main(argv: Sequence[str] | None = None, document: str | None = None, checks: Sequence[Check] = ()) -> int:
    """Run what the command line asks for; 1 if a check failed. ``checks``: other ones than those of the list."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["cpu", "pretend", "cuda"]
    parser.add_argument("--device", choices=kinds, help="pretend: CUDA's rules and calls, computed on the CPU")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl, table.md and log.txt")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything [%(default)s]")
    names = [c.name for c in CHECKS]
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="NAME", help="run these alone")
    parser.add_argument("--data", type=Path, help="a data set of launch/prepare.py instead of made-up rows")
    parser.add_argument("--list", action="store_true", help="say what each check does, and run none")
    args = parser.parse_args(argv)
    if args.list:
        print(describe())
        return 0
    if not args.device or not args.out:
        parser.error("--device and --out are needed (or --list)")
    if args.budget <= 0:
        parser.error("--budget must be above 0 seconds")
    if args.data and not (args.data / "schema.json").exists():
        parser.error(f"--data {args.data}: no schema.json there; it is not a data set of launch/prepare.py")
    args.out.mkdir(parents=True, exist_ok=True)
    lines, log = args.out / "results.jsonl", args.out / "log.txt"
    for old in (lines, log, args.out / "table.md"):
        old.unlink(missing_ok=True)
    where, work = facts(args.device), Path(tempfile.mkdtemp(prefix="gpu_check-"))
    print(", ".join(f"{k} {v}" for k, v in where.items()), flush=True)
    results = []
    try:
        chosen, data = checks or selected(args.only), args.data and args.data.resolve()
        start = starter(args.device, log.resolve())
        for result in run_checks(chosen, args.device, args.budget, work, data, where, start):
            results.append(result)
            print(write_line(lines, result), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        words = " ".join(sys.argv[1:] if argv is None else argv)
        if results:
            (args.out / "table.md").write_text(markdown(results, where, f"python3 tools/gpu_check.py {words}"))
            print(f"\n{text_table(results)}", flush=True)
    return int(any(r["status"] == FAILED for r in results))
