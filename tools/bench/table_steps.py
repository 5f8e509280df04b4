"""A step of the tables alone: look-up, backward and update, optimizer beside optimizer.

    python tools/bench/table_steps.py                       Criteo's 39 fields at 1M and 5M rows, MovieLens-1M's fields
    python tools/bench/table_steps.py --shape criteo --rows 1000000 --width 16

All sides live in one process, use one thread and take turns, a few steps each, on the same ids (Zipf). Figures are
medians of the process's CPU time, which other work on the machine disturbs less than the clock; ratios are to the first
side. ``dense Adam`` is how Adam ran on CPU before it was restricted to looked-up rows: TorchRec's dense kernel and
torch's fused Adam over whole tables. It lives in this file alone. CPU only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation too

import torch
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from tqdm import tqdm

from embsearch_dist.config.sections import DistConfig, OptimConfig, RunConfig
from embsearch_dist.data.load.dataset import BatchMaker
from embsearch_dist.kernels import adam
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.schema import Field, Schema
from embsearch_dist.sharding.placing import place
from embsearch_dist.sharding.sharded_tables import ShardedTables, Table
from embsearch_dist.sharding.tables import Sharder, make_collection
from tools.bench.steps import BATCHES, cardinalities, make_rows

MOVIELENS_1M = [6041, 3, 8, 22, 3440, 3677, 82, 302]
Step = Callable[[int], None]


class Case:
    """Tables of one width, and batches of ids for them.

    Args:
        sizes: rows of each table.
    """

    def __init__(self, sizes: Sequence[int], width: int, batch: int) -> None:
        self.sizes, self.width, self.batch = list(sizes), width, batch
        schema = Schema("benchmark", tuple(Field(f"f{i}", n) for i, n in enumerate(sizes)))
        maker = BatchMaker(schema)
        self.tables = [Table.of(f, width) for f in schema.fields]
        self.sparse = [maker.sparse(torch.from_numpy(ids)) for ids, _ in make_rows(self.sizes, batch, 0)]
        self.gradient = torch.randn(batch, width * len(self.sizes)) / batch

    def ours(self, context: Context, optimizer: str, partial: bool = False) -> Step:
        """The tables as every model has them."""
        tables = ShardedTables(
            self.tables, context, DistConfig(), OptimConfig(embedding=optimizer), 0, 0.01, partial=partial
        )

        def step(number: int) -> None:
            tables.zero_grad()
            tables(self.sparse[number % BATCHES]).values().backward(self.gradient)
            tables.step()

        return step

    def without_kernel(self, context: Context) -> Step:
        """The same where no C compiler was."""
        plain = self.ours(context, "adam")

        def step(number: int) -> None:
            with mock.patch.object(adam, "kernel", lambda: None):
                plain(number)

        return step

    def dense_adam(self, context: Context) -> Step:
        """Every row of every table in every step."""
        collection = make_collection(self.tables)
        kinds = {t.name: table_wise(rank=0, compute_kernel="dense") for t in self.tables}
        plan = construct_module_sharding_plan(collection, kinds, Sharder(), 1, 1, "cpu")  # type: ignore[arg-type]
        tables = place(collection, plan, context)
        optimizer = torch.optim.Adam(tables.parameters(), lr=1e-3, fused=True)

        def step(number: int) -> None:
            optimizer.zero_grad()
            tables(self.sparse[number % BATCHES]).values().backward(self.gradient)
            optimizer.step()

        return step


def measure(sides: dict[str, Step], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of every step of each side, turn by turn; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, step in sides.items():
            for k in range(steps):
                begun = time.process_time()
                step(turn * steps + k)
                if turn:
                    seconds[name].append(time.process_time() - begun)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """One line per side; the first is what the others are compared with."""
    print(f"\n{title}\n\n| side | ms a step | quartiles | ratio to the first |\n| --- | --- | --- | --- |")
    first = statistics.median(next(iter(seconds.values())))
    for name, found in seconds.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"| {name} | {1e3 * middle:.2f} | {1e3 * low:.2f}-{1e3 * high:.2f} | {middle / first:.2f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["criteo", "movielens", "both"], default="both")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000], help="of all tables (criteo)")
    parser.add_argument("--width", type=int, nargs="+", default=[16], help="columns of every table")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a step (movielens: 512)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--no-dense", action="store_true", help="without dense Adam, which takes long and much memory")
    args = parser.parse_args(argv)
    cases = {}
    for width in args.width:
        if args.shape != "movielens":
            for rows in args.rows:
                title = f"{len(cardinalities(rows))} fields, {rows:,} rows x {width}, batch {args.batch}"
                cases[title] = (cardinalities(rows), width, args.batch)
        if args.shape != "criteo":
            title = f"MovieLens-1M's {len(MOVIELENS_1M)} fields x {width}, batch 512"
            cases[title] = (MOVIELENS_1M, width, 512)
    with start(RunConfig(device="cpu", threads=1), DistConfig()) as context:
        for title, (sizes, width, batch) in cases.items():
            case = Case(sizes, width, batch)
            sides = {"Adam": case.ours(context, "adam"), "Adam, partial": case.ours(context, "adam", partial=True)}
            sides["Adam without the C kernel"] = case.without_kernel(context)
            if not args.no_dense:
                sides["dense Adam"] = case.dense_adam(context)
            sides |= {name: case.ours(context, name) for name in ("adagrad", "rowwise_adagrad", "sgd")}
            report(title, measure(sides, args.rounds, args.steps))


if __name__ == "__main__":
    main()
