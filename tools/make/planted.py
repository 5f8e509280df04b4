"""Make click logs with planted widths and idle fields as asked for, prepared.

    python tools/make/planted.py --out runs/data/widths --idle                     no field that never touches the label
    python tools/make/planted.py --out runs/data/idle --idle 40 200 1000 5000      four of them, of so many values

The pairs of fields that matter are those of embsearch_dist/data/planted/synthetic.py, whose own data set
(launch/prepare.py --format synthetic) has four idle fields of 40 to 200 values. --out gets a prepared data set, raw/
and truth.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.data.planted.synthetic import DEFAULT, ROWS, make_synthetic
from embsearch_dist.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--idle", type=int, nargs="*", default=DEFAULT.idle, help="values of each idle field")
    args = parser.parse_args(argv)
    try:
        if min(args.idle, default=2) < 2:
            raise UserError(f"--idle {min(args.idle)}: a field has at least 2 values. Give more")
        schema = make_synthetic(args.out, args.rows, args.seed, replace(DEFAULT, idle=tuple(args.idle)), quiet=True)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {sum(schema.rows.values()):,} rows, {len(schema.fields)} fields, {len(args.idle)} of them idle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
