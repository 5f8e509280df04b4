"""Write made-up click logs in the form of Criteo's train.txt, as many rows as asked for.

    python tools/make/criteo.py --out runs/criteo_like                         # the 45,840,617 of Kaggle, 11 GB
    python tools/make/criteo.py --out runs/small --rows 300000
    python tools/make/criteo.py --out runs/parts --parts 8 --workers 8         # train-00000.txt ... train-00007.txt
    python tools/make/criteo.py --out runs/late --start 45000000 --rows 300000 # a stretch from near the end
    python tools/make/criteo.py --out runs/tenth --every 10 --rows 4584061     # a tenth of the rows, of all times
    python tools/make/criteo.py --out runs/crosses --rows 2000000 --clicks crosses     # not inner products alone
    python launch/prepare.py --format criteo --input runs/small --out runs/data/criteo_like --split time

What the rows are like: embsearch_dist/data/planted/criteo_like.py, and for --clicks crosses the file beside it.
Row n depends on --seed and n alone, so parts put behind one another are the file that one part would have been,
byte for byte. --clicks changes nothing of a row but its label. --out is a directory (for
train.txt) unless its name ends in a suffix. truth.json beside the data says what is planted and is written
last; files have a name ending in .partial until all are whole. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from io import BufferedWriter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.data.planted import criteo_crosses as crosses
from embsearch_dist.data.planted import criteo_like
from embsearch_dist.data.planted.criteo_like import CATEGORIES, LAST_ROW, NUMBERS, RANKS, REFERENCE_ROWS
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json

CHUNK_ROWS = 65_536
BYTES_PER_ROW = 243
TRUTH = "truth.json"
SAMPLE_ROWS = 200_000


def make(
    out: Path,
    rows: int,
    *,
    start: int = 0,
    seed: int = 0,
    parts: int = 1,
    workers: int = 1,
    quiet: bool = False,
    clicks: str = "pairs",
    every: int = 1,
) -> list[Path]:
    """Write ``rows`` rows, each ``every``-th from ``start`` on, and ``truth.json``; gives the data files.

    Raises:
        UserError: impossible numbers, something is there already, or the disk is full or read-only.
    """
    counts = {"rows": rows, "every": every, "parts": parts, "workers": workers}
    for option, value, least in (("start", start, 0), *((k, n, 1) for k, n in counts.items())):
        if value < least:
            raise UserError(f"--{option} must be at least {least}, got {value}. Give more")
    if parts > rows:
        raise UserError(f"--parts {parts} is more than the {rows} rows. Give fewer")
    stop = start + rows * every
    if stop > LAST_ROW:
        times = " times --every" * (every > 1)
        raise UserError(f"rows end at {LAST_ROW:,} and --start plus --rows{times} is {stop:,}. Give less")
    files = targets(out, parts)
    truth_file = files[0].with_name(TRUTH)
    _refuse_existing([*files, truth_file])
    model = criteo_like.model(seed, clicks)
    bayes_auc = model.bayes_auc(start, stop, SAMPLE_ROWS)
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        need, free = rows * BYTES_PER_ROW, shutil.disk_usage(files[0].parent).free
        if need > free:
            raise UserError(f"{rows:,} rows take {need / 1e9:.1f} GB, {free / 1e9:.1f} are free. Give fewer --rows")
        edges = [start + rows * i // parts * every for i in range(parts + 1)]
        with whole_files(files, truth_file) as written:
            clicked = _fill(written, edges, every, seed, workers, quiet, clicks)
    except OSError as e:
        raise UserError(f"{e.filename or out}: {e.strerror or e}. Check the disk and its permissions") from e
    write_json(
        truth_file,
        {
            "rank": RANKS if clicks == "pairs" else crosses.ranks(RANKS),
            "bayes_auc": bayes_auc,
            "bayes_auc_rows": min(rows, SAMPLE_ROWS),
            "base_rate": clicked / rows,
            "rows": rows,
            "start": start,
            **({} if every == 1 else {"every": every}),
            "seed": seed,
            "reference_rows": REFERENCE_ROWS,
            "files": [f.name for f in files],
            "numbers": [asdict(c) for c in NUMBERS],
            "categories": [asdict(c) for c in CATEGORIES],
            "pairs": [asdict(p) for p in model.pairs],
            **({} if clicks == "pairs" else more_truth(clicks)),
        },
    )
    return files


def more_truth(clicks: str) -> dict[str, object]:
    """What truth.json says of clicks that are not the default ones."""
    triples, hinges = [asdict(t) for t in crosses.TRIPLES], [asdict(h) for h in crosses.HINGES]
    return {"clicks": clicks, "triples": triples, "hinges": hinges}


def targets(out: Path, parts: int) -> list[Path]:
    """The data files: ``out`` itself or train.txt in it, with a part number when there are several."""
    file = out if out.suffix and not out.is_dir() else out / "train.txt"
    return [file] if parts == 1 else [file.with_stem(f"{file.stem}-{i:05d}") for i in range(parts)]


@contextmanager
def whole_files(files: list[Path], truth: Path) -> Iterator[list[BufferedWriter]]:
    """Open ``<file>.partial`` for each file; all get their names when the block ends without an error.

    Raises:
        UserError: a file or ``truth`` exists, or another process is writing the same files.
    """
    partial = [f.with_name(f.name + ".partial") for f in files]
    with ExitStack() as open_files:
        handles: list[BufferedWriter] = []
        try:
            for path in partial:
                handle = open_files.enter_context(path.open("ab"))
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    raise UserError(f"{path}: another process is writing it. Wait, or give another --out") from e
                handles.append(handle)
            # Not before the locks are held: until then another process might have finished.
            _refuse_existing([*files, truth])
            for handle in handles:
                handle.truncate(0)  # what a killed run left
            yield handles
            for handle in handles:
                handle.flush()
                os.fsync(handle.fileno())
            for path, file in zip(partial, files, strict=True):
                path.rename(file)
        except BaseException:
            # Only what this process holds the lock of is its own to remove.
            for path, _ in zip(partial, handles, strict=False):
                path.unlink(missing_ok=True)
            raise


def _refuse_existing(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists. Give another --out, or remove it")


def _fill(
    files: list[BufferedWriter], edges: list[int], every: int, seed: int, workers: int, quiet: bool, kind: str
) -> int:
    """Write each ``every``-th row from ``edges[i]`` to ``edges[i + 1]`` to file i; gives the number of clicks.
    ``kind`` is ``--clicks``."""
    # Here and not above: it brings polars, which the worker processes have no use for.
    from embsearch_dist.data.prepare.pipeline import Progress

    clicks = 0
    with Progress("write", (edges[-1] - edges[0]) // every, "rows", quiet) as bar:
        for part, n, (data, clicked) in _chunks(edges, every, seed, workers, kind):
            files[part].write(data)
            clicks += clicked
            bar.add(n)
    return clicks


def _chunks(
    edges: list[int], every: int, seed: int, workers: int, kind: str
) -> Iterator[tuple[int, int, tuple[bytes, int]]]:
    """(part, rows, (text, clicks)) of all chunks in order."""
    plan = (
        (part, first, min(first + CHUNK_ROWS * every, stop))
        for part, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))
        for first in range(start, stop, CHUNK_ROWS * every)
    )
    if workers == 1:
        for part, first, stop in plan:
            yield part, (stop - first) // every, criteo_like.text(seed, first, stop, kind, every)
        return
    waiting: deque[tuple[int, int, Future[tuple[bytes, int]]]] = deque()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_ignore_interrupt)
    try:
        for part, first, stop in plan:
            chunk = pool.submit(criteo_like.text, seed, first, stop, kind, every)
            waiting.append((part, (stop - first) // every, chunk))
            # As much ahead as keeps every process busy, so that memory does not grow when the disk is slow.
            if len(waiting) > 2 * workers:
                part, n, future = waiting.popleft()
                yield part, n, future.result()
        for part, n, future in waiting:
            yield part, n, future.result()
    except BrokenProcessPool as e:
        raise UserError("a worker process died, perhaps for want of memory. Give fewer --workers") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C reaches every process of a terminal; the first one tells the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory, or file if the name has a suffix")
    parser.add_argument("--rows", type=int, default=REFERENCE_ROWS, metavar="N", help="default %(default)s")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first row (default 0)")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only each K-th row (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed plants other effects (default 0)")
    parser.add_argument("--clicks", choices=crosses.CLICKS, default="pairs", help="how they come about (default pairs)")
    parser.add_argument("--parts", type=int, default=1, metavar="K", help="files to write (default 1)")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes (default 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        files = make(**vars(args))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; no data file was left", file=sys.stderr)
        return 130
    if not args.quiet:
        seconds = time.monotonic() - began
        where = files[0] if len(files) == 1 else f"{files[0]} to {files[-1].name}"
        gigabytes = sum(f.stat().st_size for f in files) / 1e9
        print(f"{where}: {args.rows:,} rows, {gigabytes:.2f} GB in {seconds:.1f} s ({args.rows / seconds:,.0f} rows/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
