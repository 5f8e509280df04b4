"""Predict raw rows with a model directory that export.py made.

    python launch/predict.py --model exported/my --input tomorrow.csv --out scores.parquet
    python launch/predict.py --model exported/my --input parts/ --out scores.parquet --keep user item --processes 8
    python launch/predict.py --model exported/my --input 'parts/*/*.parquet' --out scores.parquet

Rows come in the form of the training data (the columns of the source file, in CSV, TSV or Parquet; Criteo's train or
test file; MovieLens's folder; ...), the label is not needed. --format table reads any model's columns by name. Values
that the training did not know count as id 0, and their number is printed. The output has a row for each of the input,
in its order: the columns of --keep, logit and probability. It appears whole or not at all. With --label COLUMN (0 or 1)
that column is kept too, and the answers' AUC, logloss, normalised entropy, calibration and ECE are printed.
"""

from __future__ import annotations

import argparse
import glob
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from embsearch_dist.ranks.environment import available_cores, reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch, or it would be loaded twice

from embsearch_dist.errors import UserError
from embsearch_dist.serving import OWN


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="directory that export.py made")
    p.add_argument("--input", type=Path, required=True, help="file or folder of raw rows, or a pattern in quotes")
    p.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    p.add_argument("--format", choices=[OWN, "table"], default=OWN, help="own: that of the training data (default)")
    p.add_argument("--delimiter", metavar="SIGN", help="of text, where not that of the training data: ',', ';', tab")
    p.add_argument("--encoding", metavar="NAME", help="of text, where not that of the training data: utf-8 or latin-1")
    p.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="columns to write beside the scores")
    p.add_argument("--label", default="", metavar="COLUMN", help="0 or 1: measure the answers by it, and keep it")
    p.add_argument("--processes", type=int, default=0, metavar="N", help="default: as many as there are cores")
    p.add_argument("--module", default="", metavar="FILE.py", help="registers a backbone of your own; its code is run")
    p.add_argument("--overwrite", action="store_true", help="replace scores of an earlier call")
    p.add_argument("--quiet", action="store_true", help="no progress and no summary")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from embsearch_dist.data.prepare.progress import Progress
    from embsearch_dist.serving.predict import Job, predict, told  # torch: not needed for --help

    signal.signal(signal.SIGTERM, _interrupt)  # a launcher's way of saying Ctrl-C
    started = time.monotonic()
    try:
        if args.processes < 0:
            raise UserError(f"--processes must be at least 1, got {args.processes}. Give another")
        keep = (*args.keep, args.label)
        processes = args.processes or available_cores()
        job = Job(
            args.model,
            args.input,
            args.out,
            args.format,
            keep,
            processes,
            args.overwrite,
            args.label,
            args.module,
            {key: value for key in ("delimiter", "encoding") if (value := getattr(args, key)) is not None},
        )
        with Progress("predict", _bytes(args.input), "bytes", args.quiet) as bar:
            done = predict(job, bar.add)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 2
    except (OSError, MemoryError) as e:
        print(f"error: {' '.join(str(e).split()) or 'memory ran out'}. Check path, disk and memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr, flush=True)
        return 130
    if not args.quiet:
        print(told(done, job, time.monotonic() - started))
    return 0


def _bytes(path: Path) -> int:
    """Of a file, or of all files of a folder or a pattern; for the progress."""
    if path.is_file():
        return path.stat().st_size
    files = path.rglob("*") if path.is_dir() else map(Path, glob.iglob(str(path), recursive=True))
    return sum(f.stat().st_size for f in files if f.is_file())


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
