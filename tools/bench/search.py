"""How fast subnets are scored and searched.

    python tools/bench/search.py --run runs/synthetic_adass_deepfm --rows 100000
    python tools/bench/search.py --fields 39 --rows 20000
    python tools/bench/search.py --fields 1200 --rows 50000 --whole

With a run's supernet: candidates per second from kept terms beside the supernet with its tables. With made-up fields:
from kept terms beside terms that are made anew in each pass (what a sample that does not fit into memory does), and
subnets near one another beside them. In both cases the sides score the same random subnets on the same rows in one
process, turn by turn; metrics (AUC and logloss) are part of all. Prints medians and ratios.

``--whole`` times a whole search on made-up fields instead, pictures included. The supernet is untrained and the clicks
follow one of its subnets, so the time is that of a real search and the widths found mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation too

import torch

from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.making import BatchMaker
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.adass.config import PRECISIONS
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.methods.adass.search_stage import Searcher, budgets_of
from embsearch_dist.methods.adass.supernet_stage import load_supernet
from embsearch_dist.methods.adass.terms import sample_rows
from embsearch_dist.models.model import SupernetModel
from embsearch_dist.ranks.context import Context, start
from embsearch_dist.run import Run
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from tools.bench.clock import now

CARDINALITY = 200  # of a made-up field: memory is for rows, and a look-up happens once
NEAR = 2  # fields in which subnets near a base differ from it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="run directory with a finished supernet")
    what.add_argument("--fields", type=int, help="so many made-up fields instead")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="candidates per round")
    parser.add_argument("--precision", default="bfloat16", choices=PRECISIONS[1:])
    parser.add_argument("--whole", action="store_true", help="with --fields: time a whole search")
    parser.add_argument("overrides", nargs="*", help="with --fields: section.key=value, e.g. model.hidden=[256,128]")
    args = parser.parse_args()
    sections = {n: m.config for n, m in METHODS.items()}
    if args.run:
        config = load_config(sections, args.run / "config.yaml")
    else:
        config = load_config(sections, None, [f"search.policy.rows={args.rows}", *args.overrides], method="adass")
    with start(config.run, config.dist) as context:
        if args.run:
            beside_tables(args, config, context)
        elif args.whole:
            whole_search(args, config, context)
        else:
            made_anew(args, config, context)


def beside_tables(args: argparse.Namespace, config: Config, context: Context) -> None:
    """Kept terms beside the supernet with its tables, as :func:`main` says."""
    run = Run(config, Schema.load(config.data.path), context)
    task = load_supernet(run)
    size = config.search.supernet.eval_batch_size
    stream = run.stream("validation", size, shuffle=False)
    count = min(-(-args.rows // size), stream.batches_per_epoch)
    batches = list(itertools.islice(stream.epoch(0), count))
    scorer = SubnetScorer(task.model, batches, context, args.precision)
    keep = torch.ones(scorer.fields, dtype=torch.bool, device=context.device)
    apart = []

    def tables(choices: torch.Tensor) -> None:
        first = choices[0].to(context.device)
        exact = evaluate(lambda b: task.model(b, first, keep)[0], batches, context)
        apart.append(abs(scorer.score(choices[:1])[0]["auc"] - exact["auc"]))

    compare({"kept terms": scorer.score, "supernet with tables": tables}, args, scorer, {"supernet with tables": 1})
    print(f"AUC, kept terms ({args.precision}) against tables: {max(apart):.1e} apart at most")


def made_anew(args: argparse.Namespace, config: Config, context: Context) -> None:
    """Kept terms beside terms of each pass, as :func:`main` says."""
    model, batches, _ = made_up(args.fields, args.rows, config, context)
    kept = SubnetScorer(model, batches, context, args.precision, cache_mb=1 << 20)
    anew = SubnetScorer(model, batches, context, args.precision, cache_mb=0)
    base, drawn = torch.ones(kept.fields, dtype=torch.int64), torch.Generator().manual_seed(1)

    def near(choices: torch.Tensor) -> None:
        changed = torch.rand(choices.shape, generator=drawn).argsort(1) < NEAR
        anew.score_near(base.tolist(), torch.where(changed, choices, base))

    compare({"kept terms": kept.score, "terms of each pass": anew.score, "near one another": near}, args, kept, {})


def compare(
    sides: dict[str, Callable[[torch.Tensor], object]],
    args: argparse.Namespace,
    scorer: SubnetScorer,
    alone: dict[str, int],
) -> None:
    """Print candidates per second of each side, turn by turn. ``alone``: sides that score so many of a batch only."""
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        choices = torch.randint(scorer.candidates, (args.batch, scorer.fields), generator=generator)
        for name, side in sides.items():
            started = now(scorer.context.device)
            side(choices)
            seconds[name].append((now(scorer.context.device) - started) / alone.get(name, len(choices)))
    first = statistics.median(seconds["kept terms"])
    print(f"{scorer.rows:,} rows, {torch.get_num_threads()} thread(s), medians of {args.rounds} rounds")
    for name, found in seconds.items():
        each = statistics.median(found)
        print(f"{name:21s}: {each * 1000:8.1f} ms per candidate  {1 / each:8.1f} candidates/s  {first / each:6.2f}")


def made_up(fields: int, rows: int, config: Config, context: Context) -> tuple[SupernetModel, list[Batch], Schema]:
    """An untrained supernet and rows whose clicks follow a random subnet of it."""
    schema = Schema("made-up", tuple(Field(f"f{i}", CARDINALITY) for i in range(fields)), ())
    model = SupernetModel(config, schema, config.search.candidates, config.search.scheme, context, True).eval()
    generator, make, batches = torch.Generator().manual_seed(0), BatchMaker(schema), []
    choice = torch.randint(len(config.search.candidates), (fields,), generator=generator).to(context.device)
    keep = torch.ones(fields, dtype=torch.bool, device=context.device)
    for begin in range(0, rows, 2048):
        size = min(2048, rows - begin)
        ids = torch.randint(CARDINALITY, (fields, size), generator=generator, dtype=torch.int32)
        batch = Batch(torch.zeros(size, 0), make.sparse(ids), torch.zeros(size), Position(0, 1))
        with torch.no_grad():
            logits = model(batch.to(context.device), choice, keep)[0].cpu()
        clicks = torch.rand(size, generator=generator) < (3 * (logits - logits.mean()) / logits.std()).sigmoid()
        batches.append(Batch(batch.dense, batch.sparse, clicks.float(), batch.position))
    return model, batches, schema


def whole_search(args: argparse.Namespace, config: Config, context: Context) -> None:
    """Time a search with its pictures, as :func:`main` says."""
    policy, search = config.search.policy, config.search
    schema = Schema("made-up", tuple(Field(f"f{i}", CARDINALITY) for i in range(args.fields)), ())
    width = max(search.candidates) if search.scheme == "shared" else sum(search.candidates)
    backbone = SupernetModel(config, schema, search.candidates, search.scheme, context, True).bare_head.backbone
    rows = sample_rows(args.rows, policy.rows, args.fields, width, backbone, policy.cache_mb)
    model, batches, schema = made_up(args.fields, rows, config, context)
    started, busy = now(context.device), time.process_time()
    scorer = SubnetScorer(model, batches, context, args.precision, policy.cache_mb, policy.refit)
    searcher = Searcher(schema, search, scorer)
    with (
        tempfile.TemporaryDirectory() as folder,
        Monitor(folder, "search") as monitor,
        monitor.progress(searcher.subnets(), "subnets") as bar,
    ):
        found = searcher.find(0, budgets_of(search, schema)[0][1], monitor, bar.update)
    taken, busy = now(context.device) - started, time.process_time() - busy
    print(
        f"{args.fields:,} fields, {rows:,} of {args.rows:,} rows fit into {policy.cache_mb:,} MiB, "
        f"{torch.get_num_threads()} thread(s): {taken:.0f} s, {busy:.0f} s of processor time, "
        f"{len(searcher.archive):,} subnets scored on all of these rows, {found.pruned:,} columns taken away"
    )


if __name__ == "__main__":
    main()
