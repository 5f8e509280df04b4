"""Candidates scored per second from cached activations, beside running the supernet with its tables.

    python tools/bench_search.py --run runs/synthetic_adass_deepfm --rows 100000

Both sides score the same random subnets on the same validation rows in one process, turn by turn; metrics
(AUC and logloss) are part of both. Prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs without installation too

import torch

from embsearch_dist.config import load_config
from embsearch_dist.dist.context import start
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.adass.config import PRECISIONS
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.methods.adass.supernet import load_supernet
from embsearch_dist.methods.base import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.metrics import evaluate
from tools.clock import now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory with a finished supernet")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="candidates per round on the cached side")
    parser.add_argument("--precision", default="bfloat16", choices=PRECISIONS)
    args = parser.parse_args()
    config = load_config({n: m.config for n, m in METHODS.items()}, args.run / "config.yaml")
    with start(config.run, config.dist) as context:
        run = Run(config, Schema.load(config.data.path), context)
        task = load_supernet(run)
        size = config.search.supernet.eval_batch_size
        stream = run.stream("validation", size, shuffle=False)
        count = min(-(-args.rows // size), stream.batches_per_epoch)
        batches = list(itertools.islice(stream.epoch(0), count))
        rows = sum(b.size for b in batches)
        started = now(context.device)
        scorer = SubnetScorer(task.model, batches, context, args.precision)
        build = now(context.device) - started
        keep = torch.ones(scorer.fields, dtype=torch.bool, device=context.device)
        generator = torch.Generator().manual_seed(0)
        whole, cached, apart = [], [], []
        for _ in range(args.rounds):
            choices = torch.randint(scorer.candidates, (args.batch, scorer.fields), generator=generator)
            first = choices[0].to(context.device)
            started = now(context.device)
            exact = evaluate(lambda b, c=first: task.model(b, c, keep)[0], batches, context)  # type: ignore[misc]
            whole.append(now(context.device) - started)
            scorer.archive.clear()
            started = now(context.device)
            found = scorer.score(choices)
            cached.append((now(context.device) - started) / len(choices))
            apart.append(abs(found[0]["auc"] - exact["auc"]))
    a, b = statistics.median(whole), statistics.median(cached)
    print(f"{rows:,} validation rows, {torch.get_num_threads()} thread(s), medians of {args.rounds} rounds")
    print(f"supernet with tables : {a * 1000:8.1f} ms per candidate  {1 / a:8.1f} candidates/s")
    print(f"cached activations   : {b * 1000:8.1f} ms per candidate  {1 / b:8.1f} candidates/s")
    print(f"building the cache   : {build:8.1f} s, once")
    print(f"ratio                : {a / b:8.1f}")
    print(f"AUC, cached ({args.precision}) against tables: {max(apart):.1e} apart at most")


if __name__ == "__main__":
    main()
