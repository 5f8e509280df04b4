"""Raw files -> a prepared data set: staged once, counted on the training split, encoded to shards.

Memory does not grow with the rows but with one block of input, the distinct values of one field and
the vocabularies that are kept: Criteo's 45.8M rows are meant to pass within 6 GiB. Every row is handled
by vectorised polars or numpy.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from embsearch_dist.data import vocabulary
from embsearch_dist.data.formats import LABEL, TIME, Source, open_source
from embsearch_dist.data.shards import ShardWriter
from embsearch_dist.data.vocabulary import VOCABULARY, Vocabulary
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Field, Schema

ROW, SPLIT, STAGE, MARK = "__row", "__split", "stage", "PREPARING"
ROW_GROUP_ROWS = 65_536
ROWS_PER_SHARD = 4_194_304
HOW_TO_SPLIT = ("random", "time")


@dataclass
class Options:
    """How to prepare.

    Attributes:
        split: ``random`` (a seeded hash of the row number) or ``time``; both 8:1:1.
        seed: of the random split.
        min_count: training rows a value needs for an id of its own; ``None``: the format's default.
        rows_per_shard: rows of one Parquet file, rounded up to whole row groups.
        row_group_rows: rows of one row group: the unit in which training reads.
        overwrite: replace an earlier prepared data set.
        quiet: no progress.
    """

    split: str = "random"
    seed: int = 0
    min_count: int | None = None
    rows_per_shard: int = ROWS_PER_SHARD
    row_group_rows: int = ROW_GROUP_ROWS
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.split not in HOW_TO_SPLIT:
            raise UserError(f"--split {self.split!r} is none of {', '.join(HOW_TO_SPLIT)}. Write one of them")
        if self.seed < 0:
            raise UserError(f"--seed must be at least 0, got {self.seed}. Give another")
        for name in ("min_count", "rows_per_shard", "row_group_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}. Give another")


def prepare(format: str, input: Path | str, out: Path | str, **options: object) -> Schema:
    """Prepare raw data of a named format into directory ``out`` (layout: :mod:`embsearch_dist.schema`).

    ``options`` are the attributes of :class:`Options`. The same input and options give the same bytes,
    whatever the number of threads.

    Raises:
        UserError: anything wrong with the input or the options; nothing half-written remains.
    """
    checked = Options(**options)  # type: ignore[arg-type]
    source = open_source(format, input)
    inside = [f for f in source.files if f.resolve().is_relative_to(Path(out).resolve())]
    if inside:
        raise UserError(f"{inside[0]} lies in {out}, which would be replaced. Give another --out")
    with whole_directory(Path(out), checked.overwrite) as partial:
        return prepare_into(partial, source, checked)


@contextmanager
def whole_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A directory ``<out>.partial`` to fill, which becomes ``out`` when the block ends without an error.

    Raises:
        UserError: ``out`` exists and may not or must not be replaced, or another process is filling it.
    """
    out = Path(os.path.abspath(out))
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise UserError(f"{out} exists. Give another --out, or --overwrite to replace it")
        ours = out.is_dir() and not out.is_symlink() and ((out / "schema.json").exists() or not any(out.iterdir()))
        if not ours:
            raise UserError(f"{out} is not a prepared data set, so --overwrite leaves it alone. Give another --out")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        _remove_leftover(partial)
    lock = -1
    try:
        partial.mkdir(parents=True)
        lock = os.open(partial / MARK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        (partial / MARK).unlink()
        if out.exists():
            # Two renames: at no moment is a half-deleted directory called `out`.
            old = out.with_name(out.name + ".replaced")
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        what = f"{e.filename or out}: {e.strerror or e}"
        raise UserError(f"{what}. Check the disk, its free space and its permissions") from e
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def _remove_leftover(partial: Path) -> None:
    """Remove what a killed prepare left; a living one holds a lock, which the kernel drops when it dies."""
    if not (partial / MARK).exists():
        raise UserError(f"{partial} is in the way and not from an earlier prepare. Move it, or give another --out")
    lock = os.open(partial / MARK, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial)
    except BlockingIOError as e:
        raise UserError(f"{partial}: another prepare is at work there. Wait for it, or give another --out") from e
    finally:
        os.close(lock)


def prepare_into(directory: Path, source: Source, options: Options) -> Schema:
    """The work of :func:`prepare` in a directory that is there and empty. Writes ``schema.json`` last."""
    if options.split == "time" and source.no_time is not None:
        raise UserError(f"a chronological split is not possible: {source.no_time}")
    stage = directory / STAGE
    stage.mkdir()
    parts, rows = _stage(source, stage, options)
    counts, train = _splits(parts, rows, options)
    for name, n in counts.items():
        if n == 0:
            raise UserError(f"{source.dataset}: the {name} split is empty ({rows} rows in all). Give more rows")
    fields = [c.name for c in source.columns if c.kind != "dense"]
    dense = [c.name for c in source.columns if c.kind == "dense"]
    min_count = options.min_count or source.min_count
    books = []
    with Progress("count", len(fields), "fields", options.quiet) as bar:
        for name in fields:
            books.append(vocabulary.build(parts, name, train == 0, min_count))
            books[-1].save(directory / VOCABULARY)
            bar.add(1)
    scales = _scales(parts, dense, train)
    means = _encode(parts, rows, directory, books, dense, scales, train, options)
    shutil.rmtree(stage)
    schema = Schema(
        dataset=source.dataset,
        fields=tuple(Field(b.name, b.cardinality) for b in books),
        dense=tuple(dense),
        rows=counts,
        provenance={
            "files": [{"name": f.name, "bytes": f.stat().st_size} for f in source.files],
            "notes": list(source.notes),
            "split": options.split,
            "seed": options.seed,
            "min_count": min_count,
            "row_group_rows": options.row_group_rows,
            "label_mean": means,
            "fields": {
                b.name: {
                    "distinct": b.distinct,
                    "rare_share": round(b.rare_share, 6),
                    "missing_share": round(b.missing_share, 6),
                }
                for b in books
            },
            "dense": {n: {"mean": m, "std": s} for n, (m, s) in scales.items()},
        },
    )
    schema.save(directory)
    return schema


def _stage(source: Source, stage: Path, options: Options) -> tuple[list[Path], int]:
    """Parse the raw files once into typed Parquet parts with a row number and (random) a split."""
    parts: list[Path] = []
    rows = 0
    writing: deque[Future[None]] = deque()
    # Writing Parquet takes one core; a thread of its own lets the next block be parsed meanwhile.
    with Progress("read", source.bytes, "bytes", options.quiet) as bar, ThreadPoolExecutor(1) as pool:
        for chunk in source.chunks():
            frame = chunk.frame
            number = np.arange(rows, rows + frame.height, dtype=np.int64)
            extra = [pl.Series(ROW, number)]
            if options.split == "random":
                extra.append(pl.Series(SPLIT, random_split(number, options.seed)))
            parts.append(stage / f"part-{len(parts):05d}.parquet")
            writing.append(pool.submit(_write_part, frame.with_columns(extra), parts[-1]))
            if len(writing) > 1:
                writing.popleft().result()
            rows += frame.height
            bar.add(chunk.consumed)
        for last in writing:
            last.result()
    if rows == 0:
        raise UserError(f"{source.dataset}: the files have no rows. Give at least ten")
    return parts, rows


def _write_part(frame: pl.DataFrame, path: Path) -> None:
    frame.write_parquet(path, compression="lz4", statistics=False)


def random_split(row: np.ndarray, seed: int) -> np.ndarray:
    """``[N]`` row numbers -> ``[N]`` uint8: 0 train, 1 validation, 2 test in 8:1:1, by SplitMix64 of the number.

    A hash rather than a drawn permutation: it depends on nothing but the row's number and the seed.
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        z = start + (row.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    tenth = (z % np.uint64(10)).astype(np.uint8)
    return np.maximum(tenth, 7) - np.uint8(7)


def _splits(parts: list[Path], rows: int, options: Options) -> tuple[dict[str, int], pl.Expr]:
    """Rows of each split, and an expression on staged parts that gives a row's split (0, 1, 2)."""
    if options.split == "random":
        split = pl.col(SPLIT)
    else:
        when = pl.scan_parquet(parts).select(TIME).collect(engine="streaming")[TIME].to_numpy()
        after_train = _not_before(when, rows * 8 // 10)
        after_validation = _not_before(when, rows * 9 // 10)
        split = after_train.cast(pl.UInt8) + after_validation.cast(pl.UInt8)
    lazy = pl.scan_parquet(parts).select(split.alias(SPLIT)).group_by(SPLIT).len()
    found = dict(lazy.collect(engine="streaming").rows())
    return {name: found.get(i, 0) for i, name in enumerate(SPLITS)}, split


def _not_before(when: np.ndarray, rank: int) -> pl.Expr:
    """Whether a row is at ``rank`` (from 0) or later in the order of (time, row number).

    Only the row at that rank is looked for; nothing is sorted.
    """
    time = np.partition(when, rank)[rank]
    row = np.flatnonzero(when == time)[rank - int((when < time).sum())]
    return (pl.col(TIME) > float(time)) | ((pl.col(TIME) == float(time)) & (pl.col(ROW) >= int(row)))


def _scales(parts: list[Path], dense: list[str], split: pl.Expr) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of dense columns over the training split.

    Part by part in order (Chan's update), because a parallel sum would depend on the number of threads.
    """
    total = dict.fromkeys(dense, (0, 0.0, 0.0))
    for part in parts if dense else []:
        frame = pl.scan_parquet(part).filter(split == 0).select(dense).collect()
        for name in dense:
            x = frame[name].drop_nulls().to_numpy()
            if len(x) == 0:
                continue
            n, mean, m2 = total[name]
            delta, both = float(x.mean()) - mean, n + len(x)
            m2 += float(((x - x.mean()) ** 2).sum()) + delta**2 * n * len(x) / both
            total[name] = (both, mean + delta * len(x) / both, m2)
    scales = {name: (mean, (m2 / n) ** 0.5 if n else 0.0) for name, (n, mean, m2) in total.items()}
    for name, scale in scales.items():
        if not all(map(math.isfinite, scale)):
            raise UserError(f"dense column {name!r}: its values are too large to standardise. Scale or bucket them")
    return scales


def _encode(
    parts: list[Path],
    rows: int,
    directory: Path,
    books: list[Vocabulary],
    dense: list[str],
    scales: dict[str, tuple[float, float]],
    split: pl.Expr,
    options: Options,
) -> dict[str, float]:
    """Write the shards of all splits, rows in their raw order; gives the label mean of each split."""
    columns = [pl.col(LABEL).alias("label"), *(b.encode() for b in books)]
    for name in dense:
        mean, std = scales[name]
        # A missing value sits at the mean; a constant column carries nothing and becomes zeros.
        columns.append(
            (((pl.col(name) - mean) / std) if std > 0 else pl.lit(0.0)).fill_null(0).cast(pl.Float32).alias(name)
        )
    types = [("label", pa.float32()), *((b.name, pa.int32()) for b in books), *((n, pa.float32()) for n in dense)]
    schema = pa.schema([pa.field(n, t, nullable=False) for n, t in types])
    writers = [ShardWriter(directory / name, schema, options.row_group_rows, options.rows_per_shard) for name in SPLITS]
    try:
        with Progress("encode", rows, "rows", options.quiet) as bar:
            for part in parts:
                frame = pl.read_parquet(part).select(*columns, split.alias(SPLIT))
                for i, writer in enumerate(writers):
                    writer.write(frame.filter(pl.col(SPLIT) == i).drop(SPLIT))
                bar.add(frame.height)
    finally:
        for writer in writers:
            writer.close()
    return {name: round(w.label_sum / w.rows, 6) for name, w in zip(SPLITS, writers, strict=True)}


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line now and then, with the time left."""

    every_s = 5.0

    def __init__(self, what: str, total: int, unit: str, quiet: bool) -> None:
        self.what, self.total, self.unit, self.quiet = what, max(total, 1), unit, quiet
        self.done, self.start = 0, time.monotonic()
        self.said = self.start
        self.bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=what, unit=unit[0].upper(), unit_scale=True, leave=False)

    def add(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
            return
        now = time.monotonic()
        if self.quiet or now - self.said < self.every_s:
            return
        self.said = now
        share = min(self.done / self.total, 1.0)
        left = (now - self.start) * (1 - share) / max(share, 1e-9)
        print(f"{self.what}: {share:4.0%} of {self.total:,} {self.unit}, about {left:,.0f} s left", file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def summary(schema: Schema) -> str:
    """A table for people: fields with cardinality and shares, then rows and label mean of each split."""
    seen = schema.provenance["fields"]
    assert isinstance(seen, dict)
    width = max(len("field"), *(len(n) for n in [*schema.names, *schema.dense]))
    lines = [f"{'field':<{width}} {'cardinality':>12} {'distinct':>12} {'rare':>7} {'missing':>7}"]
    for f in schema.fields:
        s = seen[f.name]
        lines.append(
            f"{f.name:<{width}} {f.cardinality:>12,} {s['distinct']:>12,} "
            f"{s['rare_share']:>7.2%} {s['missing_share']:>7.2%}"
        )
    lines += [f"{n:<{width}} {'dense':>12}" for n in schema.dense]
    means = schema.provenance["label_mean"]
    assert isinstance(means, dict)
    lines.append(f"{'split':<{width}} {'rows':>12} {'label mean':>12}")
    lines += [f"{n:<{width}} {schema.rows[n]:>12,} {means[n]:>12.4f}" for n in SPLITS]
    return "\n".join(lines)
