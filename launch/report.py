"""Write an HTML report of a search and its retrained models.

    python launch/report.py runs/movielens                        # one run
    python launch/report.py runs/seed0 runs/seed1 runs/seed2      # seeds of one experiment, merged
    python launch/report.py runs/movielens --out /tmp/report      # write it elsewhere

The page is RUN_DIR/report/index.html: one self-contained file (no network needed) with a sentence that says
what came out, a table against uniform widths, the widths found, size against quality, learning and search
curves, and where everything comes from. Its plots lie beside it as PNG files.

A run directory may be unfinished: the report shows what is there and names what is missing. Runs given
together must be on the same data; results of one name (say "adass") become a mean with its spread, so
searches under different budgets need different names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.errors import UserError
from embsearch_dist.pipes import quietly


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="directory that search.py or retrain.py wrote"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where to write (default: report/ in the first RUN_DIR)"
    )
    args = parser.parse_args(argv)
    from embsearch_dist.report import write_report  # matplotlib: not needed for --help
    from embsearch_dist.stores.mirror import push_once

    try:
        print(write_report(args.run_dirs, args.out))
        if args.out is None:
            push_once(args.run_dirs[0], print)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def script() -> int:
    return quietly(main)


if __name__ == "__main__":
    sys.exit(script())
