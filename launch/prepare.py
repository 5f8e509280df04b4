"""Turn raw click logs into a prepared data set.

    python launch/prepare.py --format synthetic --rows 200000 --out PREPARED
    python launch/prepare.py --format populations --rows 400000 --out PREPARED
    python launch/prepare.py --format movielens_1m --input ml-1m/ --out PREPARED
    python launch/prepare.py --format criteo --input train.txt --out PREPARED --split time
    python launch/prepare.py --format criteo --input day_0.gz day_1.gz day_2.gz --out PREPARED
    python launch/prepare.py --format table --input my_source.yaml --out PREPARED
    python launch/prepare.py --format table --input today.yaml --out TODAY --vocabulary YESTERDAY
    python launch/prepare.py --format ids --input my_ids.yaml --out PREPARED
    python launch/prepare.py --format criteo --input s3://bucket/train.txt --out PREPARED
    python launch/prepare.py --verify PREPARED
    torchrun --standalone --nproc-per-node 2 -- launch/prepare.py --format criteo --input train.txt --out PREPARED

Formats: criteo and avazu read Kaggle's train file (or several: their rows in the order given, those of a
directory in the order of the names), movielens_1m, movielens_100k and kdd2012 the directory of the archive, table
your own CSV, TSV or Parquet through a YAML source file (copy configs/sources/example.yaml), ids Parquet in which
another engine has put ids (copy configs/sources/ids.yaml; docs/ids.md), synthetic makes
a data set whose best embedding widths are known, populations one of two hidden populations whose clicks depend
on different fields, with the best widths for each (truth.json) and the population of every row (populations/).
PREPARED gets schema.json, manifest.json, vocabulary/ and the Parquet shards of train/, validation/ and test/
(8:1:1); it appears only when it is whole. Interrupted or killed, the same command continues; several processes
share the work and give the same bytes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from embsearch_dist.ranks.environment import available_cores

if "RANK" in os.environ:  # polars counts when it is imported, and would give every process all cores
    cores = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    os.environ.setdefault("POLARS_MAX_THREADS", str(max(1, cores)))

from embsearch_dist.data.ids.taking import summary as ids_summary
from embsearch_dist.data.prepare.pipeline import summary
from embsearch_dist.data.prepare.team import from_environment
from embsearch_dist.errors import UserError
from embsearch_dist.pipes import quietly
from launch.prepare_arguments import IDS, check, parser
from launch.preparing import run, verify


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # a launcher's way of saying Ctrl-C
    first = os.environ.get("RANK", "0") == "0"
    start = time.monotonic()
    try:
        check(args)
        if args.verify is not None:
            return verify(args) if first else 0
        schema = run(args, from_environment())
    except UserError as e:
        if first or not e.everywhere:
            print(f"error: {e}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if first:
            print("error: interrupted; start the same command again to continue", file=sys.stderr, flush=True)
        return 130
    if first:
        for warning in schema.provenance.get("warnings", []):
            print(f"warning: {warning}", file=sys.stderr)
    if first and not args.quiet:
        seconds = time.monotonic() - start
        print(ids_summary(schema) if args.format == IDS else summary(schema))
        print(f"{args.out}: {sum(schema.rows.values()):,} rows in {seconds:.1f} s")
    return 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def script() -> int:
    return quietly(main)


if __name__ == "__main__":
    sys.exit(script())
