"""Kill tiny runs of every method at random moments, give the same command again, and compare with an unbroken run.

    python tools/breaking/kills.py                              120 cases, about 15 minutes on one core
    python tools/breaking/kills.py --cases 20 --seed 3 --methods ihas
    python tools/breaking/kills.py --only 17                    one case again, with all it printed

A case takes a command (prepare.py, search.py, retrain.py or evaluate.py) on one rank, on two, or under torchrun with
two, and sends SIGKILL at a random moment: to one rank, to all, or to the launcher (whose ranks are killed a moment
later, as a scheduler does). The rank that survives must end by itself, as there is no launcher to end it. All this may
happen to the second and third start again. Then the command runs to its end, and all that it leaves is compared with
what it leaves without kills: metrics and heat maps line by line, checkpoints by the checksums of their tensors,
prepared data byte by byte. Times and speeds are not compared.

    same          nothing differs
    late          the command was done before the kill
    DIVERGED      something differs
    FAILED        the last start ended with an error
    HUNG          a start, or the ranks that survived a kill, were not done in time

Exit code 1 if there is any of the last three. Cases depend on the seed and their number, moments also on how fast the
machine is. OUT/cases.jsonl keeps what is done: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.breaking import lab
from tools.breaking.bases import METHODS, NO_RETRAIN, RETRAIN, SEARCH, Bases, evaluate_words, prepare_words
from tools.breaking.outcome import differing, outcome
from tools.breaking.table import tables

WHO = ("alone", "one of two", "both of two", "launcher")
WEIGHTS = (4, 3, 2, 1)
PHASES = {"prepare": None, "search": "fresh", "retrain": "searched", "evaluate": "retrained"}  # and the state before
PHASE_WEIGHTS = (1, 5, 4, 1)
MEET_S = 30  # so long ranks of prepare.py wait for one that was killed before it came, as dist.timeout_s of the others
PATIENCE_S = 240  # of a start; tiny runs take seconds, under torchrun on a busy machine a minute
CLASSES = ("same", "late", "DIVERGED", "FAILED", "HUNG")
BAD = CLASSES[2:]


class Sweep:
    """Cases in ``folder/now``, from bases that are made once."""

    def __init__(self, folder: Path, methods: list[str], seed: int) -> None:
        self.bases, self.now, self.methods, self.seed = Bases(folder / "bases"), folder / "now", methods, seed
        self._right: dict[tuple[str, str, str], tuple[dict[str, Any], float]] = {}

    def case(self, number: int) -> dict[str, Any]:
        """Kill up to three times, run to the end, compare."""
        rng = random.Random(f"{self.seed} {number}")
        method = self.methods[number % len(self.methods)]
        phases = [p for p in PHASES if method not in NO_RETRAIN or p not in ("retrain", "evaluate")]
        phase = rng.choices(phases, [PHASE_WEIGHTS[list(PHASES).index(p)] for p in phases])[0]
        who = rng.choices(WHO, WEIGHTS)[0]
        right, seconds = self.right(method, phase, who)
        self._copy(method, phase)
        kills, hung = 0, False
        for _ in range(rng.choice((1, 1, 2, 3))):
            struck, done = self._struck(method, phase, who, rng.uniform(0.02, 1.0) * seconds, rng)
            kills, hung = kills + struck, hung or not done
        codes = self._start(method, phase, who)
        found = self._outcome(phase)
        different = differing(found, right)
        result = "same" if kills else "late"
        if hung or lab.HUNG in codes:
            result = "HUNG"
        elif any(codes):
            result = "FAILED"
        elif different:
            result = "DIVERGED"
        told = lab.read(self.now / "printed-0.err").strip().splitlines()[-1:] if any(codes) else []
        head = {"case": number, "method": method, "phase": phase, "who": who, "kills": kills, "class": result}
        return head | {"different": different[:6], "codes": codes, "text": told}

    def right(self, method: str, phase: str, who: str) -> tuple[dict[str, Any], float]:
        """What the command leaves without kills, and the seconds it takes."""
        key = (method, phase, who if who == "launcher" else str(_ranks(who)))
        if key not in self._right:
            self._copy(method, phase)
            started = time.monotonic()
            if any(self._start(method, phase, who)):
                printed = lab.read(self.now / "printed-0.out") + lab.read(self.now / "printed-0.err")
                raise SystemExit(f"{phase} of {method}, {who}, fails without kills:\n{printed}")
            self._right[key] = self._outcome(phase), time.monotonic() - started
        return self._right[key]

    def _outcome(self, phase: str) -> dict[str, Any]:
        return outcome(self.now / ("data" if phase == "prepare" else "run"))

    def _copy(self, method: str, phase: str) -> None:
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(self.bases.of(method, PHASES[phase] or "fresh"), self.now, symlinks=True)
        if phase == "prepare":
            shutil.rmtree(self.now / "data")

    def _processes(self, method: str, phase: str, who: str) -> list[int]:
        words = {"prepare": prepare_words(0), "search": SEARCH, "retrain": RETRAIN}.get(phase, evaluate_words(method))
        if phase == "prepare" and (self.now / "data").exists():
            shutil.rmtree(self.now / "data")  # it was done before the kill
        if who == "launcher":
            return [lab.start_launcher(words[0], words[1:], self.now, self.now / "printed-0")]
        size, port = _ranks(who), lab.free_port()
        found = []
        for rank in range(size):
            env = lab.rank_environment(rank, size, port) if size > 1 else {}
            found.append(lab.start(words[0], words[1:], self.now, self.now / f"printed-{rank}", env))
        return found

    def _start(self, method: str, phase: str, who: str) -> list[int]:
        return lab.finish(self._processes(method, phase, who), PATIENCE_S)

    def _struck(self, method: str, phase: str, who: str, after: float, rng: random.Random) -> tuple[bool, bool]:
        """Start and kill after so many seconds: whether somebody was killed, and whether the others ended."""
        pids = self._processes(method, phase, who)
        time.sleep(after)
        victims = [rng.choice(pids)] if who == "one of two" else pids
        for pid in victims:
            if who == "launcher":
                lab.kill_launcher(pid)
            else:
                lab.end_session(pid)
        codes = lab.finish(pids, PATIENCE_S)
        return -9 in codes, lab.HUNG not in codes


def _ranks(who: str) -> int:
    return 1 if who == "alone" else 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="folder to work in")
    parser.add_argument("--only", type=int, metavar="CASE", help="one case, with what its last start printed")
    args = parser.parse_args()
    lab.load()
    from embsearch_dist.data.prepare import team

    team.MEET_S = MEET_S
    args.out.mkdir(parents=True, exist_ok=True)
    work = Sweep(args.out.resolve(), args.methods, args.seed)
    if args.only is not None:
        cases = [work.case(args.only)]
        print(lab.read(work.now / "printed-0.out") + lab.read(work.now / "printed-0.err"))
    else:
        head = {"seed": args.seed, "methods": args.methods}
        cases = lab.resumed(args.out / "cases.jsonl", head, args.cases, work.case)
    by = {what: itemgetter(what) for what in ("phase", "who", "method")}
    print(tables(cases, by, CLASSES, ["kills"]))
    bad = [c for c in cases if c["class"] in BAD]
    for case in bad:
        print(json.dumps(case))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
