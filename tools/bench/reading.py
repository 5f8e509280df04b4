"""How fast prepare reads a table, against another checkout of this project: the two take turns, the ratio is printed.

    python tools/bench/reading.py --against ../before --rows 2000000 --repeats 3

The table is a CSV of ten columns (``--quoted``: every text cell in quotes). Each measure is a process of its own, so
that two versions of the same modules do not meet; the time is that of reading alone, from the opened source to the
last frame, as threads of prepare do it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


SOURCE = """
files: [clicks.csv]
label: click
time: at
fields: {user: categorical, item: categorical, site: categorical, price: bucketed, score: dense,
         city: categorical, query: categorical, hour: categorical}
"""
READ = """
import sys, time
from embsearch_dist.data.formats import open_source
from embsearch_dist.data.prepare.progress import in_order
from functools import partial
start, busy = time.perf_counter(), time.process_time()
rows = sum(in_order(partial(lambda c: c.frame.height, c) for c in open_source("table", sys.argv[1]).chunks()))
print(rows, time.perf_counter() - start, time.process_time() - busy)
"""
PREPARE = """
import sys, time
from pathlib import Path
from embsearch_dist.data.prepare.pipeline import prepare
start, busy = time.perf_counter(), time.process_time()
schema = prepare("table", Path(sys.argv[1]), Path(sys.argv[1]).parent / "out", split="time", overwrite=True, quiet=True)
print(sum(schema.rows.values()), time.perf_counter() - start, time.process_time() - busy)
"""


def make(folder: Path, rows: int, quoted: bool) -> Path:
    rng = np.random.default_rng(0)
    size = {"user": 200_000, "item": 20_000, "site": 300, "city": 2_000, "query": 50_000, "hour": 24}
    columns = {"click": rng.integers(0, 2, rows), "at": 1_400_000_000 + np.arange(rows)}
    columns |= {name: rng.integers(0, n, rows) for name, n in size.items()}
    frame = pl.DataFrame(columns).with_columns([pl.format(name[0] + "-{}", pl.col(name)).alias(name) for name in size])
    frame = frame.with_columns(price=rng.integers(0, 900, rows), score=rng.normal(0, 1, rows).round(3))
    frame.write_csv(folder / "clicks.csv", quote_style="non_numeric" if quoted else "necessary")
    (folder / "source.yaml").write_text(SOURCE)
    return folder / "source.yaml"


def measure(root: Path, code: str, source: Path) -> tuple[float, float]:
    """Seconds by the clock, and of all cores together."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code, source], cwd=root, env=environment, check=True, capture_output=True, text=True
    )
    _, clock, cores = done.stdout.split()
    return float(clock), float(cores)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", type=Path, required=True, help="root of the other checkout")
    p.add_argument("--rows", type=int, default=2_000_000)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--quoted", action="store_true", help="quotes around every text cell")
    p.add_argument("--whole", action="store_true", help="all of prepare, not reading alone")
    args = p.parse_args()
    here, code = Path(__file__).resolve().parents[2], PREPARE if args.whole else READ
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder), args.rows, args.quoted)
        roots = [args.against.resolve(), here]
        found: dict[Path, list[tuple[float, float]]] = {root: [] for root in roots}
        for k in range(args.repeats):
            for root in roots[:: -1 if k % 2 else 1]:
                found[root].append(measure(root, code, source))
    print(f"{args.rows:,} rows, {args.repeats} turns")
    for k, what in enumerate(("by the clock", "of all cores")):
        before, now = ([turn[k] for turn in found[root]] for root in roots)
        pairs = [b / a for a, b in zip(before, now)]
        a, b = statistics.median(before), statistics.median(now)
        print(f"{what}: {a:.2f} s before, {b:.2f} s now: {b / a:.3f} (turns {min(pairs):.3f} to {max(pairs):.3f})")


if __name__ == "__main__":
    main()
