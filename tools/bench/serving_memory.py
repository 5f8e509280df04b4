"""predict.py on many rows: how fast it goes, and the most memory of all its processes together.

The work of ``serving.py bounded``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.errors import UserError
from embsearch_dist.serving.directory import open_directory
from embsearch_dist.serving.predict import Job, Scorer
from tools.gpucheck.facts import hardware
from tools.studies.jobs import commit

ROOT = Path(__file__).resolve().parents[2]
PARTS = 8  # files of a Parquet folder
LOOK_S = 0.2
COLUMNS = (
    "commit command hardware model fields form processes rows bytes seconds rows_per_second pss_mb largest_rss_mb"
).split()


def measure(model: Path, rows: Path, counts: Sequence[int], processes: int, out: Path) -> list[dict[str, Any]]:
    """A dict of :data:`COLUMNS` for each form and number of rows.

    Args:
        rows: raw rows in the form of the training data; their first piece is repeated.
        counts: of rows.
        out: where the repeated rows and the scores are for a while.

    Raises:
        UserError: predict.py failed, or the scores of the repeated rows are not those of the rows.
    """
    directory = open_directory(model)
    scorer = Scorer(Job(model, rows, out / "unused"), directory)
    chunk = next(iter(scorer.source.chunks()))
    raw = directory.source.raw
    frame = chunk.frame.select(pl.col(n).alias(raw[n]) for n in sorted(directory.columns))
    if any(kind.is_nested() for kind in frame.schema.values()):
        raise UserError(f"{model}: lists cannot be written as CSV here. Give a model without list fields")
    wanted = scorer.score(chunk)[0]["logit"].to_numpy()
    out.mkdir(parents=True, exist_ok=True)
    told = f"python tools/bench/serving.py bounded --model EXPORTED --input ROWS --rows {' '.join(map(str, counts))}"
    found = []
    for form in ("csv", "parquet"):
        for count in counts:
            made = write(frame, count, form, out)
            size = sum(f.stat().st_size for f in [made, *made.glob("*")] if f.is_file())
            line = watched(model, made, out / "scores.parquet", processes)
            scores = pq.read_table(out / "scores.parquet", columns=["logit"])["logit"]
            same = np.array_equal(scores[: len(wanted)].to_numpy(), wanted[:count]) and len(scores) == count
            (out / "scores.parquet").unlink()
            shutil.rmtree(made) if made.is_dir() else made.unlink()
            if not same:
                raise UserError(f"{count:,} rows as {form}: other scores than those of the rows that were repeated")
            about = {"commit": commit(), "command": f"{told} --processes {processes} --out OUT", "hardware": hardware()}
            about |= {"model": directory.body["name"], "fields": len(directory.columns), "form": form, "rows": count}
            rate = {"rows_per_second": round(count / line["seconds"]), "bytes": size, "processes": processes}
            found.append(about | line | rate)
            print(f"{form}, {count:,} rows: {line['seconds']:.1f} s, {line['pss_mb']:.0f} MB", file=sys.stderr)
    return [row | {"seconds": f"{row['seconds']:.1f}"} for row in found]


def write(frame: pl.DataFrame, count: int, form: str, out: Path) -> Path:
    """The rows again and again, ``count`` of them, in one CSV file or a folder of Parquet files."""
    path = out / f"rows.{form}"
    if form == "csv":
        with path.open("wb") as file:
            for k, part in enumerate(parts_of(frame, count)):
                part.write_csv(file, include_header=k == 0)
        return path
    path.mkdir()
    share = -(-count // PARTS)
    for k in range(PARTS):
        rows = min(share, count - k * share)
        start = k * share % frame.height
        turned = pl.concat([frame.slice(start), frame.head(start)])
        with pq.ParquetWriter(path / f"part-{k}.parquet", frame.to_arrow().schema) as writer:
            for part in parts_of(turned, rows):
                writer.write_table(part.to_arrow())
    return path


def parts_of(frame: pl.DataFrame, count: int) -> list[pl.DataFrame]:
    whole, rest = divmod(count, frame.height)
    return [frame] * whole + ([frame.head(rest)] if rest else [])


def watched(model: Path, rows: Path, scores: Path, processes: int) -> dict[str, Any]:
    """Run predict.py: seconds, and memory in MB: PSS of all processes (shared pages once), RSS of the largest one."""
    words = ["--model", model, "--input", rows, "--out", scores, "--format", "table", "--processes", processes]
    command = [sys.executable, str(ROOT / "launch" / "predict.py"), *map(str, words), "--quiet"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    together, largest = 0, 0
    while process.poll() is None:
        pss, rss = memory(process.pid)
        together, largest = max(together, pss), max(largest, rss)
        time.sleep(LOOK_S)
    seconds = time.perf_counter() - started
    assert process.stderr is not None
    if process.returncode:
        raise UserError(f"predict.py failed: {(process.stderr.read().strip().splitlines() or ['no message'])[-1]}")
    return {"seconds": seconds, "pss_mb": round(together / 1e6), "largest_rss_mb": round(largest / 1e6)}


def memory(pid: int) -> tuple[int, int]:
    """Of a process and all below it: PSS together and the largest RSS, in bytes."""
    together, largest = 0, 0
    try:
        tree = [psutil.Process(pid)]
        tree += tree[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return 0, 0
    for one in tree:
        try:
            info = one.memory_full_info()
        except psutil.Error:
            continue  # it has ended
        together, largest = together + info.pss, max(largest, info.rss)
    return together, largest
