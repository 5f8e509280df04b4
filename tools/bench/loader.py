"""Rows per second of the loader alone on one core, from disk and from the page cache, and its memory over an epoch.

    python tools/bench/loader.py --data PREPARED --trainer-rate 40000 --json loader.json    a whole epoch per pass
    python tools/bench/loader.py --data PREPARED --batches 512 --sample-s 0.5               a quick look

Four passes over the same row groups of the training split: pyarrow reads their columns (the floor), the loader makes
the shuffled batches of epoch 0 as a training does (a thread reads ahead); first from disk (pages are dropped before),
then from the page cache. All threads share one core. Resident memory is sampled through the last pass: it is flat
when the last quarter peaks as the first. --trainer-rate is the samples_per_s in a training's metrics.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.ranks.environment import reexec_with_tuned_environment

if __name__ == "__main__":
    reexec_with_tuned_environment()  # before anything loads torch: a training does so too

import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from embsearch_dist.data.load.dataset import WINDOW_ROWS, BatchStream
from embsearch_dist.files import write_json
from embsearch_dist.schema import Schema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what launch/prepare.py wrote")
    parser.add_argument("--batch", type=int, default=4096, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=0, help="batches per pass; 0 = the whole epoch")
    parser.add_argument("--window-rows", type=int, default=WINDOW_ROWS, help="data.window_rows of the training")
    parser.add_argument("--trainer-rate", type=float, default=0.0, metavar="X", help="samples/s that a trainer takes")
    parser.add_argument("--sample-s", type=float, default=5.0, help="seconds between two looks at the memory")
    parser.add_argument("--json", type=Path, help="where to write the figures, too")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    schema, memory = Schema.load(args.data), [0.0]
    stream = BatchStream(args.data, schema, "train", args.batch, window_rows=args.window_rows)
    count = min(args.batches or stream.batches_per_epoch, stream.batches_per_epoch)
    found: dict[str, float] = {"fields": len(schema.fields), "split_rows": stream.rows, "batches": count}
    found |= {"batch": args.batch, "window_rows": args.window_rows}
    for state in ("disk", "cache"):
        for what, make in (("pyarrow", read_plain), ("loader", load)):
            for path in {group.path for group in stream.shards.groups} if state == "disk" else ():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            bar = tqdm(make(stream, count), f"{what}, {state}", count * args.batch, unit="row", unit_scale=True)
            memory, (rows, seconds, read) = timed(bar, args.sample_s)
            values = {"rows": rows, "rows_per_s": rows / seconds, "mb_from_disk": read / 2**20}
            found |= {f"{what}_{state}_{key}": value for key, value in values.items()}
        rate = found[f"loader_{state}_rows_per_s"]
        found[f"loader_to_pyarrow_{state}"] = rate / found[f"pyarrow_{state}_rows_per_s"]
        if args.trainer_rate:
            found[f"loader_to_trainer_{state}"] = rate / args.trainer_rate
    first, last = (max(part) for part in (memory[: (len(memory) + 3) // 4], memory[-((len(memory) + 3) // 4) :]))
    found |= {"memory_samples": len(memory), "first_quarter_peak_mb": first, "last_quarter_peak_mb": last}
    for key, value in found.items():
        print(f"{key:<28}" + (f"{value:>16,.3f}" if isinstance(value, float) and value < 1000 else f"{value:>12,.0f}"))
    if args.json:
        write_json(args.json, found)


def load(stream: BatchStream, count: int) -> Iterator[int]:
    stream._kept = None  # a split of one window would not be read again
    yield from (batch.size for batch in itertools.islice(stream.epoch(0), count))


def read_plain(stream: BatchStream, count: int) -> Iterator[int]:
    """Rows of each row group that those batches come from, in the order in which the loader reads them."""
    columns, need = ["label", *stream.schema.names, *stream.schema.dense], count * stream.global_batch
    for window in stream.windows(0):
        for path, groups in itertools.groupby(window, key=lambda group: group.path):
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                yield from (file.read_row_group(g.index, columns, use_threads=False).num_rows for g in groups)
        if (need := need - sum(group.rows for group in window)) <= 0:
            return


def timed(bar: tqdm, every_s: float) -> tuple[list[float], tuple[int, float, int]]:
    """Go through a pass: resident MB from the first batch to the end, then rows, seconds, bytes from disk."""
    memory: list[float] = []
    over, begin, before, rows = threading.Event(), time.perf_counter(), disk_bytes(), 0

    def sample() -> None:
        memory.append(resident_mb())
        while not over.wait(every_s):
            memory.append(resident_mb())

    with bar:
        for n in bar.iterable:
            if not rows:  # the first window is there
                threading.Thread(target=sample, daemon=True).start()
            rows += n
            bar.update(n)
    over.set()
    return [*memory, resident_mb()], (rows, time.perf_counter() - begin, disk_bytes() - before)


def disk_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
