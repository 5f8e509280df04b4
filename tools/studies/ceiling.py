"""How good an allocation of a budget can be: a local search that trains every allocation alone.

    python tools/studies/ceiling.py --config configs/movielens_1m_time/adass_deepfm.yaml --data PREPARED \\
        --start runs/my/allocation.json --budget 25% --out ceiling.csv --models 60

From the widths of --start it changes one field by one candidate, or one up and another down, at random, trains each
allocation that fits the budget with the config's recipe and --seed, and goes on from the best validation score so far.
The --top best ones, the start and the uniform widths around the budget are then trained with --seeds further seeds,
which the choice has not seen: the gap of their means is what a perfect search could gain here. What luck adds to the
best score of one seed is the difference between its own seed and the others.

Each line is written as soon as it is known; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.methods.budget import parse_budget
from embsearch_dist.schema import Schema
from embsearch_dist.width_table import FACTS, FIGURES, read_rows
from launch.common import CONFIGS
from tools.gpucheck.facts import ROOT, commit, hardware
from tools.studies.width_table import train

TRIES = 1000  # random changes in a row that were all trained before, or do not fit: the neighbourhood is done
Widths = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="its recipe trains each allocation")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set")
    parser.add_argument("--start", type=Path, required=True, help="allocation.json of a search")
    parser.add_argument("--budget", required=True, help="as search.budget takes it")
    parser.add_argument("--out", type=Path, required=True, help="CSV that is begun or continued")
    parser.add_argument("--models", type=int, default=60, help="allocations that are trained with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=2, help="further seeds of the best ones")
    parser.add_argument("--top", type=int, default=3)
    args = parser.parse_args()
    Climb(args).run()


class Climb:
    """The local search; its state is the table of what was trained."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.schema = Schema.load(args.data)
        self.candidates: list[int] = load_config(CONFIGS, args.config).search.candidates
        self.budget = parse_budget(args.budget, self.schema, "--budget")
        self.rows = read_rows(args.out)
        self.space = Path(tempfile.mkdtemp(prefix="ceiling-")) / "space.yaml"
        groups = {n: {"fields": [n], "widths": self.candidates} for n in self.schema.names}
        self.space.write_text(yaml.safe_dump({"config": str(args.config.resolve()), "groups": groups}, sort_keys=False))

    def run(self) -> None:
        args = self.args
        start = tuple(Allocation.load(args.start, self.schema).widths[n] for n in self.schema.names)
        whole = [(w,) * len(start) for w in self.candidates if w]
        uniform = [*[u for u in whole if self.fits(u)][-1:], *[u for u in whole if not self.fits(u)][:1]]
        with tqdm(
            total=args.models + (args.seeds + 1) * (args.top + 3), unit="model", disable=not sys.stderr.isatty()
        ) as bar:
            for widths in self.climb(start, bar):
                self.train(widths, args.seed)
            for widths in dict.fromkeys([*uniform, start, *self.best()[: args.top]]):
                for seed in range(args.seed, args.seed + args.seeds + 1):
                    self.train(widths, seed)
                    bar.update(1)
        print(self.table(start, uniform))

    def climb(self, start: Widths, bar: Any) -> Iterator[Widths]:
        """Allocations to train with --seed, one after another; each choice knows the scores of those before."""
        bar.update(len(self.trained()))
        if start not in self.trained():
            yield start
        while len(self.trained()) < self.args.models:
            # The state is the table, so a continued climb draws what an unbroken one would have drawn.
            rng, best = random.Random(len(self.trained())), self.best()[0]
            steps = (self.change(best, rng) for _ in range(TRIES))
            step = next((s for s in steps if self.fits(s) and s not in self.trained()), None)
            if step is None:
                return
            yield step
            bar.update(1)

    def change(self, widths: Widths, rng: random.Random) -> Widths:
        """One field one candidate wider or narrower, or one wider and another narrower."""
        places = [min(range(len(self.candidates)), key=lambda j, w=w: abs(self.candidates[j] - w)) for w in widths]
        fields = rng.sample(range(len(places)), rng.choice((1, 2)))
        for k, step in zip(fields, rng.sample((-1, 1), len(fields)), strict=True):
            places[k] += step
        last = len(self.candidates) - 1
        return tuple(self.candidates[min(max(p, 0), last)] for p in places)

    def fits(self, widths: Sequence[int]) -> bool:
        if not any(widths):
            return False
        named = dict(zip(self.schema.names, widths, strict=True))
        return Allocation(self.schema, named).total(self.budget.resource) <= self.budget.limit

    def trained(self, seed: int | None = None) -> dict[Widths, dict[str, str]]:
        """What was trained with a seed, by default that of the climb."""
        wanted = self.args.seed if seed is None else seed
        return {tuple(int(r[n]) for n in self.schema.names): r for r in self.rows if int(r["seed"]) == wanted}

    def best(self) -> list[Widths]:
        """By validation AUC of the climb's seed, among those of the budget."""
        done = {w: r for w, r in self.trained().items() if self.fits(w)}
        return sorted(done, key=lambda w: -float(done[w]["validation_auc"]))

    def train(self, widths: Widths, seed: int) -> None:
        if widths in self.trained(seed):
            return
        told = ["--config", str(self.args.config), "--budget", self.args.budget, "--seed", str(self.args.seed)]
        row = train((str(self.space), str(self.args.data), seed, widths))
        row |= {
            "commit": commit(ROOT),
            "hardware": hardware("1 thread"),
            "command": " ".join(["python tools/studies/ceiling.py", *told]),
        }
        columns = [*self.schema.names, "seed", "parameters", *FIGURES, *FACTS]
        new = not self.args.out.exists()
        with self.args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({k: str(v) for k, v in row.items()})

    def table(self, start: Widths, uniform: Sequence[Widths]) -> str:
        """Means over the seeds that the climb did not see, and the climb's own seed beside them."""
        args = self.args
        lines = [
            f"{len(self.trained())} allocations trained with seed {args.seed}; validation and test AUC of that seed, "
            f"then of {args.seeds} further seeds (mean, sd)",
            "| allocation | parameters | validation | test | validation, other seeds | test, other seeds |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        named = {u: f"UES-{u[0]}" for u in uniform} | {start: "start"}
        for rank, widths in enumerate(self.best()[: args.top], 1):
            named.setdefault(widths, f"best {rank} by validation")
        for widths, name in named.items():
            own = self.trained()[widths]
            others = [self.trained(s)[widths] for s in range(args.seed + 1, args.seed + args.seeds + 1)]
            cells = [f"{float(own[k]):.4f}" for k in ("validation_auc", "test_auc")]
            cells += [spread([float(r[k]) for r in others]) for k in ("validation_auc", "test_auc")]
            lines.append(f"| {name} | {int(own['parameters']):,} | {' | '.join(cells)} |")
        highest = max(self.trained().values(), key=lambda r: float(r["test_auc"]))
        lines.append(f"Highest test AUC of all, picked by test rows themselves: {float(highest['test_auc']):.4f}")
        return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.4f}" + (f" ({statistics.stdev(values):.4f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
