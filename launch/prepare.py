"""Turn raw click logs into a prepared data set.

    python launch/prepare.py --format synthetic --rows 200000 --out PREPARED
    python launch/prepare.py --format movielens_1m --input ml-1m/ --out PREPARED
    python launch/prepare.py --format criteo --input train.txt --out PREPARED --split time
    python launch/prepare.py --format table --input my_source.yaml --out PREPARED

Formats: criteo and avazu read Kaggle's train file, movielens_1m and movielens_100k the directory of the
archive, table your own CSV, TSV or Parquet through a YAML source file (copy configs/sources/example.yaml),
synthetic makes a data set whose best embedding widths are known. PREPARED gets schema.json, vocabulary/ and
the Parquet shards of train/, validation/ and test/ (8:1:1); it appears only when it is whole.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from embsearch_dist.data import synthetic
from embsearch_dist.data.formats import FORMATS
from embsearch_dist.data.prepare import HOW_TO_SPLIT, ROW_GROUP_ROWS, ROWS_PER_SHARD, prepare, summary
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--format", required=True, choices=[*FORMATS, "synthetic"])
    p.add_argument("--input", type=Path, help="raw file or directory; for table the YAML source file")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    p.add_argument("--rows", type=int, help=f"synthetic only: rows to make (default {synthetic.ROWS:,})")
    p.add_argument(
        "--split",
        choices=HOW_TO_SPLIT,
        default="random",
        help="random: by a seeded hash of the row number; time: oldest 80%% train, newest 10%% test (default random)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the random split, and of synthetic data (default 0)")
    p.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help="training rows a value needs for an id of its own; rarer ones share id 0 "
        "(default: criteo 10, avazu 4, movielens 1, table: its source file, else 1)",
    )
    p.add_argument("--rows-per-shard", type=int, default=ROWS_PER_SHARD, metavar="N", help="default %(default)s")
    p.add_argument(
        "--row-group-rows",
        type=int,
        default=ROW_GROUP_ROWS,
        metavar="N",
        help="rows read and shuffled as one piece in training (default %(default)s)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an earlier prepared data set in --out")
    p.add_argument("--quiet", action="store_true", help="no progress and no summary")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    start = time.monotonic()
    names = ("split", "seed", "min_count", "rows_per_shard", "row_group_rows", "overwrite", "quiet")
    options = {name: getattr(args, name) for name in names}
    try:
        schema = run(args, options)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    if not args.quiet:
        seconds = time.monotonic() - start
        print(summary(schema))
        print(f"{args.out}: {sum(schema.rows.values()):,} rows in {seconds:.1f} s")
    return 0


def run(args: argparse.Namespace, options: dict[str, Any]) -> Schema:
    if args.format == "synthetic":
        if args.input is not None:
            raise UserError("--format synthetic makes its own data. Leave out --input")
        return synthetic.make_synthetic(args.out, args.rows or synthetic.ROWS, **options)
    if args.rows is not None:
        raise UserError(f"--rows is for --format synthetic; {args.format} takes all rows. Leave it out")
    if args.input is None:
        raise UserError(f"--format {args.format} needs --input. See --help for what it should be")
    return prepare(args.format, args.input, args.out, **options)


if __name__ == "__main__":
    sys.exit(main())
