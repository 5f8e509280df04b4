"""Damage files of tiny runs of every method at random, give the next command, and see whether anybody notices.

    python tools/breaking/corruption.py                                  500 cases, about 15 minutes on one core
    python tools/breaking/corruption.py --cases 60 --seed 7 --methods adass ihas
    python tools/breaking/corruption.py --only 123 --seed 0              one case again, with all it printed

A case damages one file of the prepared data or of a run directory (a byte flipped, cut, emptied, removed, that of
another run, that of an earlier state, a directory or a loop of links in its place, bytes appended) and gives the
command that a user would give next: search.py again, retrain.py, evaluate.py or report.py. It ends as

    refused     exit code 2 and one line that names the file
    healed      the same result as without damage, bit by bit, and the file is whole again
    harmless    the same result; the file is not read by this command
    told        another result, and a line that names the file
    SILENT, UNNAMED, TRACEBACK, HUNG     another result without a word, an error that names another place, a crash

Exit code 1 if there is any of the last line. Every case depends on the seed and its number alone. OUT/cases.jsonl keeps
what is done: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.breaking import lab
from tools.breaking.bases import METHODS, Bases, State, states
from tools.breaking.damage import KINDS, ORDER, WEIGHTS, files_of, fingerprint, strike
from tools.breaking.outcome import BAD, CLASSES, differing, judge, outcome
from tools.breaking.table import Case, tables

END_BYTES = 256
"""So much of both ends of a shard is compared when it is opened, instead of 64 KiB: tiny shards shall have a middle."""

BY: dict[str, Callable[[Case], str]] = {
    "damage": itemgetter("kind"),
    "command": lambda case: str(case["command"]).split()[0],
    "method": itemgetter("method"),
}


class Sweep:
    """Cases in ``folder/now``, from bases that are made once."""

    def __init__(self, folder: Path, methods: list[str], seed: int) -> None:
        self.bases, self.now, self.methods, self.seed = Bases(folder / "bases"), folder / "now", methods, seed
        self._right: dict[tuple[str, str, tuple[str, ...]], dict[str, Any]] = {}

    def case(self, number: int) -> dict[str, Any]:
        """Damage, run, judge."""
        rng = random.Random(f"{self.seed} {number}")
        method = self.methods[number % len(self.methods)]
        state, words = rng.choice([(s, words) for s in states(method) for words in s.commands])
        base = self.bases.of(method, state.name)
        right = self.right(method, state, words)
        while True:  # until a kind is found that this file can suffer
            file, kind = rng.choice(files_of(base)), rng.choices(KINDS, WEIGHTS)[0]
            self._copy(base)
            if strike(self.now / file, kind, rng, self._partners(method, state, file, kind)):
                break
        broken = fingerprint(self.now / file)
        done = lab.run(words[0], words[1:], self.now, self.now / "printed")
        found, wanted = outcome(self.now / "run"), right
        inside = str(file.relative_to("run")) if file.parts[0] == "run" else ""
        restored = found.get(inside) == wanted.get(inside) and fingerprint(self.now / file) != broken
        untouched = fingerprint(self.now / file) == broken
        different = [d for d in differing(found, wanted) if not (untouched and d == inside)]
        result = judge(done, file, kind, different, restored)
        told = (done.err if done.code else done.out).strip().splitlines()
        head = {"case": number, "method": method, "state": state.name, "command": " ".join(words), "file": str(file)}
        return head | {"kind": kind, "class": result, "different": different[:6], "code": done.code, "text": told[-1:]}

    def right(self, method: str, state: State, words: tuple[str, ...]) -> dict[str, Any]:
        """The outcome of a command where nothing is damaged."""
        key = (method, state.name, words)
        if key not in self._right:
            self._copy(self.bases.of(method, state.name))
            done = lab.run(words[0], words[1:], self.now, self.now / "printed")
            if done.code:
                raise SystemExit(f"{' '.join(words)} fails without damage ({method}, {state.name}):\n{done.text}")
            self._right[key] = outcome(self.now / "run")
        return self._right[key]

    def _copy(self, base: Path) -> None:
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(base, self.now, symlinks=True)

    def _partners(self, method: str, state: State, file: Path, kind: str) -> list[Path]:
        if kind == "swap":
            return [self.bases.of(method, state.name, "other") / file]
        if kind == "stale":
            before = ORDER[: ORDER.index(state.name)]
            return [self.bases.of(method, name) / file for name in reversed(before) if name != "fresh"]
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/corruption"), help="folder to work in")
    parser.add_argument("--only", type=int, metavar="CASE", help="one case, with what it printed")
    args = parser.parse_args()
    cases = sweep(args)
    shown = [c for c in CLASSES if any(x["class"] == c for x in cases)]
    print(tables(cases, BY, shown))
    bad = [c for c in cases if c["class"] in BAD]
    for case in bad:
        print(json.dumps(case))
    sys.exit(1 if bad else 0)


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, those that an earlier start has done included."""
    lab.load()
    from embsearch_dist.data.store import manifest

    manifest.END_BYTES = END_BYTES
    args.out.mkdir(parents=True, exist_ok=True)
    work = Sweep(args.out.resolve(), args.methods, args.seed)
    if args.only is not None:
        found = work.case(args.only)
        print(lab.read(work.now / "printed.out") + lab.read(work.now / "printed.err"))
        print(json.dumps(found, indent=2))
        return [found]
    head = {"seed": args.seed, "methods": args.methods}
    return lab.resumed(args.out / "cases.jsonl", head, args.cases, work.case)


if __name__ == "__main__":
    main()
