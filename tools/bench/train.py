"""Training speed beside a peer and beside itself: samples/s, parts of a step, memory.

    python tools/bench/train.py size --peer DIR    UES-16 DeepFM at three table sizes, beside pytorch-fm
    python tools/bench/train.py ranks              2 ranks beside 1
    python tools/bench/train.py levers             malloc settings, oneDNN, bfloat16, one by one
    python tools/bench/train.py supernet           the AdaS&S supernet beside UES-64

DeepFM over Criteo's 39 fields, made-up ids (Zipf), batch 4096, MLP 400x3 (size, ranks, levers) or 256-128
(supernet), one thread a rank. All sides run in processes of their own and take turns, a few steps each, so that
what else the machine does hits all alike; figures are medians over all steps, with the quartiles. The peer:
    pip install --no-deps --target DIR torchfm
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation too

from embsearch_dist.ranks.environment import GLIBC_TUNABLES

STEPS = Path(__file__).with_name("steps.py")
SIZES = (230_000, 1_100_000, 5_400_000)
FUSED = ["optim.embedding=rowwise_adagrad", "model.unify=mixed"]
COARSE = [*FUSED, "model.precision=bfloat16"]
Sides = dict[str, dict[str, Any]]


class Side:
    """The process, or the ranks, of one side; they wait until they are asked for steps."""

    def __init__(self, spec: dict[str, Any]) -> None:
        world = spec.get("ranks", 1)
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        base = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        base |= {"OMP_NUM_THREADS": str(spec.get("threads", 1)), "EMBSEARCH_TUNED": "1"}
        if spec.get("malloc", True):
            base["GLIBC_TUNABLES"] = GLIBC_TUNABLES
        self.batch = spec.get("batch", 4096)
        self.ranks = []
        for rank in range(world):
            env = base | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            if world > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
                env["MASTER_PORT"] = str(port)
            words = [sys.executable, "-W", "ignore", str(STEPS), json.dumps(spec)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.ranks.append(subprocess.Popen(words, env=env, text=True, **pipes))  # type: ignore[call-overload]
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.memory = 0.0

    def run(self, steps: int, count: bool) -> None:
        """Do ``steps`` steps on all ranks and keep the figures of rank 0 (memory: of all ranks)."""
        for p in self.ranks:
            p.stdin.write(f"{steps}\n")
            p.stdin.flush()
        lines = [p.stdout.readline() for p in self.ranks]
        if not all(lines):
            raise SystemExit(f"train.py: a side ended early: {self.ranks[0].args[-1]}")
        found = [json.loads(line) for line in lines]
        self.memory = sum(f["memory_gib"] for f in found)
        if count:
            self.seconds += found[0]["seconds"]
            self.parts += found[0]["parts"]

    def close(self) -> None:
        """End the ranks."""
        for p in self.ranks:
            p.stdin.close()
        for p in self.ranks:
            p.wait()

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def part(self, *names: str) -> float:
        """Median seconds of some parts of a step together."""
        return statistics.median(sum(p.get(n, 0.0) for n in names) for p in self.parts)


def measure(sides: Sides, rounds: int, steps: int) -> dict[str, Side]:
    """All sides, turn by turn; the first round warms up and does not count."""
    running = {name: Side(spec) for name, spec in sides.items()}
    for k in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for side in running.values():
            side.run(steps, count=k > 0)
    for side in running.values():
        side.close()
    return running


def table(running: dict[str, Side]) -> None:
    """One line per side; the first is what the others are compared with."""
    parts = list(dict.fromkeys(p for s in running.values() for p in s.parts[0]))
    print("| side | samples/s (quartiles) | ratio | memory GiB | " + " | ".join(f"{p} ms" for p in parts) + " |")
    print("|" + " --- |" * (4 + len(parts)))
    first = next(iter(running.values()))
    for name, s in running.items():
        low, _, high = (s.batch / q for q in reversed(statistics.quantiles(s.seconds, n=4)))
        ratio = (s.batch / s.median) / (first.batch / first.median)
        split = " | ".join(f"{1000 * s.part(p):.1f}" if p in s.parts[0] else "" for p in parts)
        rate = f"{s.batch / s.median:,.0f} ({low:,.0f}-{high:,.0f})"
        print(f"| {name} | {rate} | {ratio:.2f} | {s.memory:.2f} | {split} |", flush=True)


def sides_of(what: str, rows: int, peer: str) -> Sides:
    """What to compare; the reference comes first."""
    ours = {"kind": "ues", "rows": rows, "overrides": FUSED}
    if what == "size":
        coarse = {"embsearch_dist, bfloat16": ours | {"overrides": COARSE}}
        theirs = {"kind": "torchfm", "rows": rows, "path": [peer]}
        other = {"pytorch-fm": theirs | {"malloc": False}, "pytorch-fm, our malloc settings": theirs}
        return (other if peer else {}) | {"embsearch_dist": ours} | coarse
    if what == "ranks":
        two = {"2 ranks, batch 4096 each": ours | {"ranks": 2, "batch": 8192}}
        two["2 ranks, batch 2048 each"] = ours | {"ranks": 2}
        return {"1 rank": ours} | two | {"1 process, 2 threads": ours | {"threads": 2}}
    if what == "levers":
        plain = ours | {"malloc": False, "onednn": False}
        return {
            "none": plain,
            "malloc settings": plain | {"malloc": True},
            "oneDNN": plain | {"onednn": True},
            "both (the default)": ours,
            "both, bfloat16": ours | {"overrides": COARSE},
        }
    small = {"rows": rows, "hidden": [256, 128]}
    adagrad = ["optim.embedding=adagrad"]
    wide = small | {"kind": "ues", "width": 64}
    return {
        "UES-64": wide | {"overrides": [*adagrad, "model.unify=mixed"]},
        "UES-64 with transform to 32": wide | {"overrides": adagrad},
        "supernet, D up to 64, d_f 32": small | {"kind": "supernet", "overrides": adagrad},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["size", "ranks", "levers", "supernet"])
    parser.add_argument("--peer", default="", help="folder that pytorch-fm (torchfm) was installed to")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of all tables together")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    args = parser.parse_args(argv)
    for rows in args.rows or (SIZES if args.what == "size" else SIZES[1:2]):
        print(f"\n{args.what}: {rows:,} rows in all tables, {args.rounds} turns of {args.steps} steps\n")
        running = measure(sides_of(args.what, rows, args.peer), args.rounds, args.steps)
        table(running)
        if args.what == "supernet":
            base, *_, net = running.values()
            tables = net.part("look-up", "tables") / base.part("look-up", "tables")
            print(f"\nsupernet / UES-64: embedding part {tables:.2f}, whole step {net.median / base.median:.2f}")


if __name__ == "__main__":
    main()
