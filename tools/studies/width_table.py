"""Train every allocation of a space alone, and write down what each scores: a table to try searches in.

    python launch/prepare.py --format movielens_100k --input RAW/ml-100k --out runs/data/movielens_100k --split time
    python tools/studies/width_table.py --space tools/tables/movielens_100k.yaml --data runs/data/movielens_100k \\
        --out tools/tables/movielens_100k.csv --seeds 2

A line per allocation and seed is added to OUT as soon as it is trained; what is there is not trained again, so the
same command continues a table. All allocations of a seed come before the next seed, in a random order: half a table
is a fair sample. docs/width_table.md tells what the columns mean and how to search in the table.
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import random
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from embsearch_dist.width_table import FACTS, FIGURES, Space, read_rows
from tools.gpucheck.facts import ROOT, commit, hardware

open_group = ExitStack()  # of this process, to its end

Todo = tuple[int, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", type=Path, required=True, help="groups of fields and their widths, YAML")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set")
    parser.add_argument("--out", type=Path, required=True, help="CSV that is begun or continued")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many trainings; 0 = all")
    args = parser.parse_args()
    space = Space.load(args.space)
    todo = missing(space, args.out, args.seeds)
    columns = [g.name for g in space.groups] + ["seed", "parameters", *FIGURES, *FACTS]
    started = not args.out.exists()
    same = {"commit": commit(ROOT), "hardware": hardware("1 thread"), "command": command(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = [(str(args.space), str(args.data), *t) for t in todo[: args.limit or None]]
    # A process trains one allocation after another; started anew, not forked: torch is not safe in a fork.
    with (
        multiprocessing.get_context("spawn").Pool(args.jobs) as pool,
        args.out.open("a", newline="") as file,
        tqdm(total=len(work), unit="allocation", disable=not sys.stderr.isatty()) as bar,
    ):
        writer = csv.DictWriter(file, columns)
        if started:
            writer.writeheader()
        for row in pool.imap_unordered(train, work):
            writer.writerow(row | same)
            file.flush()
            bar.update(1)
    print(f"{args.out}: {len(read_rows(args.out)):,} lines, {len(todo) - len(work):,} to do")


def missing(space: Space, out: Path, seeds: int) -> list[Todo]:
    """(seed, widths per group) of what the table lacks."""
    done = {(int(r["seed"]), tuple(int(r[g.name]) for g in space.groups)) for r in read_rows(out)}
    order = random.Random(0).sample(space.every, len(space.every))
    return [(seed, widths) for seed in range(seeds) for widths in order if (seed, widths) not in done]


def train(work: tuple[str, str, int, tuple[int, ...]]) -> dict[str, Any]:
    """Train one allocation in this process and score its best weights."""
    from embsearch_dist.allocation import Allocation
    from embsearch_dist.files import read_json
    from embsearch_dist.run import Run
    from embsearch_dist.train.metrics import evaluate
    from embsearch_dist.train.retrain import retrain

    path, data, seed, widths = work
    space, config, context, schema = opened(path, data)
    config.run.seed = seed
    allocation = Allocation(schema, space.widths(widths))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="width-table-") as folder:
        run = Run(config, schema, context)
        size = config.train.eval_batch_size
        training = run.stream("train", config.train.batch_size, shuffle=True)
        held_out = {split: run.stream(split, size, shuffle=False) for split in ("validation", "test")}
        task = retrain(config, allocation, training, held_out["validation"], context, Path(folder), quiet=True)
        steps = read_json(Path(folder) / "training.json")["best_step"]
        task.model.eval()
        metrics = {split: evaluate(task.predict, stream.epoch(0), context) for split, stream in held_out.items()}
    row: dict[str, Any] = {g.name: w for g, w in zip(space.groups, widths, strict=True)}
    figures: dict[str, Any] = {
        f"{split}_{key}": f"{m[key]:.6f}" for split, m in metrics.items() for key in ("auc", "logloss")
    }
    seconds = f"{time.monotonic() - begun:.1f}"
    return (
        row | figures | {"seed": seed, "parameters": allocation.total("parameters"), "steps": steps, "seconds": seconds}
    )


@cache
def opened(path: str, data: str) -> tuple[Any, Any, Any, Any]:
    """Space, config, context and schema of this process, opened once; the process group stays open to its end."""
    from embsearch_dist.config.read import load_config
    from embsearch_dist.ranks.context import start
    from embsearch_dist.schema import Schema
    from launch.common import CONFIGS

    logging.disable(logging.WARNING)
    space = Space.load(path)
    overrides = [f"{key}={value}" for key, value in space.overrides.items()]
    config = load_config(
        CONFIGS, ROOT / space.config, [*overrides, f"data.path={data}", "run.device=cpu", "run.threads=1"]
    )
    schema = Schema.load(Path(data))
    space.check(schema)
    return space, config, open_group.enter_context(start(config.run, config.dist)), schema


def command(args: argparse.Namespace) -> str:
    """As it is given to continue the table, without what does not change its figures."""
    return shlex.join(
        ["python", "tools/studies/width_table.py", "--space", str(args.space), "--seeds", str(args.seeds)]
    )


if __name__ == "__main__":
    main()
