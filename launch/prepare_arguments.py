"""The command line of ``prepare.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from embsearch_dist.data.formats import FORMATS, GENRES, NUMBERS
from embsearch_dist.data.planted import populations, synthetic
from embsearch_dist.data.prepare.earlier import HOW_NEW
from embsearch_dist.data.prepare.pipeline import HOW_TO_SPLIT, ROW_GROUP_ROWS, ROWS_PER_SHARD
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema
from embsearch_dist.stores.urls import is_url

# Formats that need no input: how each is made, and the rows it has by default.
MADE: dict[str, tuple[Callable[..., Schema], int]] = {
    "synthetic": (synthetic.make_synthetic, synthetic.ROWS),
    "populations": (populations.make_populations, populations.ROWS),
}
IDS = "ids"
MADE_NAMES = " and ".join(MADE)
OPTIONS = ("split", "seed", "min_count", "rows_per_shard", "row_group_rows", "overwrite", "quiet", "genres", "numbers")
EARLIER = ("vocabulary", "vocabulary_new")  # for raw data alone


def path_or_url(word: str) -> Path | str:
    """A path; a URL stays text, whose slashes a path would lose."""
    return word if is_url(word) else Path(word)


def parser(document: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--format", choices=[*FORMATS, IDS, *MADE])
    p.add_argument(
        "--input",
        type=path_or_url,
        nargs="+",
        help="raw file or directory, or URL (s3://...) of one, for criteo and avazu also several, in the order of "
        "their rows; for table and ids the YAML source file",
    )
    p.add_argument("--out", type=path_or_url, help="directory to make")
    p.add_argument(
        "--verify", type=Path, metavar="PREPARED", help="instead: compare all files with PREPARED/manifest.json"
    )
    default = ", ".join(f"{name} {rows:,}" for name, (_, rows) in MADE.items())
    p.add_argument("--rows", type=int, help=f"{MADE_NAMES} only: rows to make (default: {default})")
    p.add_argument(
        "--split",
        choices=HOW_TO_SPLIT,
        default="random",
        help="random: by a seeded hash of the row number; time: oldest 80%% train, newest 10%% test (default random)",
    )
    p.add_argument("--seed", type=int, default=0, help=f"of the random split, and of {MADE_NAMES} data (default 0)")
    p.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help="training rows a value needs for an id of its own; rarer ones share id 0 "
        "(default: criteo and kdd2012 10, avazu 4, movielens 1, table: its source file, else 1)",
    )
    p.add_argument(
        "--genres",
        choices=GENRES,
        default="one",
        help="MovieLens only: the genres of a movie as one value, their combination, or as a list (default one)",
    )
    p.add_argument(
        "--numbers",
        choices=NUMBERS,
        default="bucketed",
        help="criteo only: I1 to I13 as 13 more fields, or as dense columns beside 26 fields, as DLRM and NASRec have "
        "them (default bucketed)",
    )
    _about_vocabulary(p)
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


def _about_vocabulary(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--vocabulary",
        type=path_or_url,
        metavar="OLD",
        help="prepared data of an earlier day: ids, and means and deviations of dense columns, are kept",
    )
    p.add_argument(
        "--vocabulary-new",
        choices=HOW_NEW,
        default="extend",
        help="values that OLD lacks: those that reach --min-count get the ids behind OLD's (extend), or all share id 0 "
        "(freeze; default extend)",
    )


def check(args: argparse.Namespace) -> None:
    """Raise ``UserError`` for arguments that are missing or do not go together."""
    if args.verify is not None:
        if any(x is not None for x in (args.format, args.input, args.out)):
            raise UserError("--verify only looks at PREPARED. Leave out --format, --input and --out")
        return
    for name in ("format", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing. See --help")
    if is_url(args.out):
        raise UserError(
            f"--out {args.out}: data are prepared on a disk. Give a folder, and upload it (docs/object_stores.md)"
        )
    if args.format == IDS and (args.split, args.seed, args.min_count) != ("random", 0, None):
        raise UserError("--format ids takes splits and ids as they are. Leave out --split, --seed and --min-count")
    if args.vocabulary is None and args.vocabulary_new != "extend":
        raise UserError("--vocabulary-new says what becomes of values that --vocabulary lacks. Give both")
    if args.format in (*MADE, IDS):
        if args.vocabulary is not None:
            raise UserError(f"--vocabulary is for raw data; --format {args.format} has its own ids. Leave it out")
        if args.genres != "one":
            raise UserError("--genres is for MovieLens. Leave it out")
        if args.numbers != "bucketed":
            raise UserError("--numbers is for criteo. Leave it out")
        if args.format in MADE and args.input is not None:
            raise UserError(f"--format {args.format} makes its own data. Leave out --input")
    if args.format in MADE:
        return
    if args.rows is not None:
        raise UserError(f"--rows is for --format {MADE_NAMES}; {args.format} takes all rows. Leave it out")
    if args.input is None:
        raise UserError(f"--format {args.format} needs --input. See --help for what it should be")
