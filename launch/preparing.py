"""What prepare.py does for a command line: formats that are read, ids that are taken over, data that are made up."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from embsearch_dist.data.ids.taking import take_over
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.progress import Progress
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.data.store import manifest
from embsearch_dist.schema import Schema
from embsearch_dist.stores.inputs import fetch_inputs
from launch.prepare_arguments import EARLIER, IDS, MADE, OPTIONS


def run(args: argparse.Namespace, team: Team) -> Schema:
    """Make what the command line asks for, together with the other processes of ``team``.

    Raises:
        UserError: anything wrong with the input or the options.
    """
    options = {name: getattr(args, name) for name in OPTIONS}
    if args.format not in MADE:
        fetch = partial(fetch_inputs, args.format, args.input, _silent if args.quiet else _say)
        if args.format == IDS:
            more = {name: options[name] for name in ("row_group_rows", "overwrite", "quiet")}
            return take_over(fetch, args.out, team=team, **more)
        earlier = {name: getattr(args, name) for name in EARLIER}
        return prepare(args.format, fetch, args.out, team=team, **options, **earlier)
    with team.together():  # small: one process makes it while the others wait
        if team.rank == 0:
            make, rows = MADE[args.format]
            make(args.out, rows if args.rows is None else args.rows, **options)
        team.barrier(args.format)
        return Schema.load(args.out)


def verify(args: argparse.Namespace) -> int:
    """Compare a prepared data set with its manifest; exit code 0.

    Raises:
        UserError: a file that differs.
    """
    with Progress("verify", manifest.size_of(args.verify), "bytes", args.quiet) as bar:
        files, size = manifest.verify(args.verify, bar.add)
    if not args.quiet:
        print(f"{args.verify}: {files} files, {size:,} bytes, all as in {manifest.MANIFEST}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass
