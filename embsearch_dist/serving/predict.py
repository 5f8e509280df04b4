"""Raw rows -> probabilities, in bounded memory, by several processes, in the order of the rows.

Every process cuts the input alike and takes each n-th piece, as preparation does: it parses, encodes and predicts it
and hands the scores to the first process, which writes them piece by piece in order. A process that is ahead waits, so
no more than a piece a process is in memory.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.nn import functional

from embsearch_dist.config.own_module import load_module
from embsearch_dist.data.formats.columns import KEPT, Chunk, Reading, Source
from embsearch_dist.data.formats.described import as_options
from embsearch_dist.errors import UserError
from embsearch_dist.files import temporary
from embsearch_dist.serving import OWN
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.encoding import RowEncoder, add_counts
from embsearch_dist.serving.narrow import narrow_columns
from embsearch_dist.serving.reading import (
    MARK,
    check_apart,
    check_unchanged,
    fitting,
    holds_scores,
    kept_names,
    kept_types,
    refuse_scores,
    states_of,
)
from embsearch_dist.serving.tables import Ids
from embsearch_dist.train.metrics import Predictions, figures, shown

LOGIT, PROBABILITY = "logit", "probability"
VECTORS = 64  # a multiple of the numbers in a processor's vector
ONE_THREAD = 1 << 14  # torch shares more than twice as many among threads


@dataclass(frozen=True)
class Job:
    """What to predict.

    Attributes:
        model: the model directory.
        input: file or folder of raw rows.
        out: the Parquet file to write.
        format: of the rows: that of the training data (``own``), or ``table``: columns by name.
        keep: columns of the input that are written beside the scores; see :func:`.reading.kept_names`.
        processes: how many work.
        overwrite: replace scores that an earlier call has written.
        label: one of ``keep``, 0 or 1, by which the answers are measured; empty: they are not.
        module: registers the model's backbone, where it is the user's own; every process imports it.
        text: ``delimiter`` and ``encoding`` of text files with columns by name, where they are not the training data's.
    """

    model: Path
    input: Path
    out: Path
    format: str = OWN
    keep: tuple[str, ...] = ()
    processes: int = 1
    overwrite: bool = False
    label: str = ""
    module: str = ""
    text: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Done:
    """What was predicted: rows, how many of them have a logit that is no number (a dense value is too far from those of
    the training), for each field the values that have no id, and the figures of the answers where labels were named."""

    rows: int = 0
    unanswered: int = 0
    unseen: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def logits_of(model: Any, ids: Ids, batch_rows: int) -> torch.Tensor:
    """``[N]`` float32, batch by batch."""
    parts = [model(ids.take(slice(a, a + batch_rows))) for a in range(0, ids.rows, batch_rows)]
    return torch.cat(parts).float() if parts else torch.zeros(0)


def probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """``[N]`` float32 of ``[N]`` logits; that of a row does not depend on how many others there are.

    torch takes what is left over behind whole vectors, at the end of each thread's share, by other code than the rest,
    with another last bit. So every call gets whole vectors, and few enough of them for one thread.
    """
    count = len(logits)
    whole = functional.pad(logits, (0, -count % VECTORS))
    return torch.cat([torch.sigmoid(part) for part in whole.split(ONE_THREAD)])[:count]


class Scorer:
    """One process's model, encoder and source."""

    def __init__(self, job: Job, directory: ModelDirectory) -> None:
        self.job, self.directory = job, directory
        self.model = directory.model()
        self.encoder = RowEncoder(directory)
        self.source = open_input(job, directory, directory.columns)
        # Public data come as text.
        table = format_of(job, directory) == "table"
        self.narrow = narrow_columns(directory, self.source.files) if table else []

    def score(self, chunk: Chunk) -> tuple[pa.Table, dict[str, int]]:
        """Kept columns, logits and probabilities of a piece, and the values that have no id."""
        frame = chunk.frame
        for column in self.narrow:
            column.check(frame)
        encoded = self.encoder(frame)
        logits = logits_of(self.model, encoded.ids, self.directory.batch_rows)
        kept = [frame[f"{KEPT}{name}"].alias(name) for name in self.job.keep]
        scores = {LOGIT: logits.numpy(), PROBABILITY: probabilities_of(logits).numpy()}
        columns = [*kept, *(pl.Series(name, values) for name, values in scores.items())]
        return pl.DataFrame(columns).to_arrow(), encoded.unseen


def open_input(job: Job, directory: ModelDirectory, columns: frozenset[str]) -> Source:
    """The raw rows of a job.

    Raises:
        UserError: they cannot be read, or lack a column.
    """
    for name in job.keep:
        if name in (LOGIT, PROBABILITY):
            raise UserError(f"--keep {name}: that is the name of a column of scores. Rename the column of the input")
    return directory.source.open(job.input, format_of(job, directory), Reading(False, columns, job.keep), job.text)


def format_of(job: Job, directory: ModelDirectory) -> str:
    """The form in which the rows of a job come."""
    return directory.source.format if job.format == OWN else job.format


def predict(job: Job, tick: Callable[[int], None] = lambda n: None) -> Done:
    """Write the scores of all rows of the input.

    Args:
        tick: called with the bytes of the input that were dealt with.

    Raises:
        UserError: the model directory is damaged, the rows do not fit it, or ``job.out`` is in the way. Nothing is
            written then.
    """
    check_out(job)
    load_module(job.module, "--module")
    directory = open_directory(job.model)
    try:
        return _predict(job, directory, tick)
    except UserError as e:
        raise UserError(as_options(str(e))) from e


def _predict(job: Job, directory: ModelDirectory, tick: Callable[[int], None]) -> Done:
    refuse_scores(directory.source, job.input, format_of(job, directory))
    job = replace(job, keep=kept_names(job.keep, lambda word: word == job.label or _has(job, directory, word)))
    if job.processes == 1:
        scorer = Scorer(job, directory)
        return _write(job, directory, scorer.source, _alone(scorer), tick)
    # What every process would refuse is told before any is started.
    source = open_input(job, directory, directory.columns)
    with _Workers(job, _Seen(directory.seal, states_of(source.files))) as workers:
        return _write(job, directory, source, workers.pieces(), tick)


def _has(job: Job, directory: ModelDirectory, column: str) -> bool:
    """Whether the rows have a column of that name; public data have none with a comma, which alone is asked for."""
    if format_of(job, directory) != "table":
        return False
    try:
        open_input(replace(job, keep=(column,)), directory, frozenset())
    except UserError:
        return False
    return True


_Piece = tuple[pa.Table, dict[str, int], int]


def check_out(job: Job) -> None:
    """Raises:
    UserError: the output is no Parquet file's name, would be read as input by the next call, exists and may not be
    replaced, or its folder is missing.
    """
    out = job.out
    if out.suffix.lower() in (".csv", ".tsv", ".txt", ".json"):
        raise UserError(f"--out {out}: scores are written as Parquet. Give a name that ends in .parquet")
    check_apart(job.input, out)
    if out.exists() or out.is_symlink():
        if not holds_scores(out):
            raise UserError(f"--out {out} exists and holds no scores: it is left alone. Give another --out")
        if not job.overwrite:
            raise UserError(f"--out {out} exists. Give another --out, or --overwrite to replace the scores")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder. Make it, or give another --out")


def _write(
    job: Job, directory: ModelDirectory, source: Source, pieces: Iterator[_Piece], tick: Callable[[int], None]
) -> Done:
    done, unfinished, before = Done(), temporary(job.out), states_of(source.files)
    writer: pq.ParquetWriter | None = None
    told = f"{directory.body['name']}, tables at {directory.body['precision']}"
    try:
        for table, unseen, consumed in pieces:
            if writer is None:
                wide = kept_types(source.files, job.keep)
                types = [(f.name, wide.get(f.name, f.type)) for f in table.schema]
                schema = pa.schema(types, {MARK: told.encode()})
                writer = pq.ParquetWriter(unfinished, schema, compression="zstd", compression_level=1)
            writer.write_table(fitting(table, writer.schema))
            done.rows += table.num_rows
            done.unanswered += pc.sum(pc.is_nan(table[LOGIT])).as_py() or 0
            add_counts(done.unseen, unseen)
            tick(consumed)
        if writer is None:
            raise UserError(f"--input {job.input}: it has no rows. Give a file with at least one")
        writer.close()
        check_unchanged(job.input, before, source.files)
        if job.label:
            done.figures = measured(unfinished, job.label)
        unfinished.replace(job.out)
    except OSError as e:
        raise UserError(f"--out {job.out}: cannot be written ({e.strerror or e}). Check the disk and the path") from e
    finally:
        if writer is not None and writer.is_open:
            writer.close()
        unfinished.unlink(missing_ok=True)
    return done


def measured(scores: Path, label: str) -> dict[str, float]:
    """:func:`embsearch_dist.train.metrics.figures` of the rows of a file of scores that have an answer.

    Raises:
        UserError: the labels are not 0 and 1.
    """
    table = pq.read_table(scores, columns=[label, LOGIT])
    try:
        labels = table[label].cast(pa.float32())
    except (pa.ArrowException, ValueError) as e:
        raise UserError(f"--label {label}: its values are no numbers. Name a column of 0 and 1") from e
    if labels.null_count or not pc.all(pc.is_in(labels, value_set=pa.array([0, 1], pa.float32()))).as_py():
        raise UserError(f"--label {label}: it has values other than 0 and 1. Name a column of 0 and 1")
    logits, known = torch.from_numpy(table[LOGIT].to_numpy()), torch.from_numpy(labels.to_numpy())
    answered = ~logits.isnan()
    return figures(Predictions(logits[answered], known[answered], None, None))


def _alone(scorer: Scorer) -> Iterator[_Piece]:
    for chunk in scorer.source.chunks():
        yield *scorer.score(chunk), chunk.consumed


@dataclass(frozen=True)
class _Seen:
    """What the first process has found, and all have to: the model's seal, and the states of the files."""

    seal: str
    states: dict[str, list[int]]

    def check(self, scorer: Scorer) -> None:
        """Raises:
        UserError: a process has another model before it, or other files.
        """
        scorer.directory.check_seal(self.seal)
        check_unchanged(scorer.job.input, self.states, scorer.source.files)


class _Workers:
    """Processes that score each n-th piece."""

    def __init__(self, job: Job, seen: _Seen) -> None:
        self.job, self.seen = job, seen
        self.ends: list[Connection] = []
        self.processes: list[Any] = []

    def __enter__(self) -> _Workers:
        context = multiprocessing.get_context("spawn")
        # polars counts the cores when it is loaded, and would give all of them to every process.
        before = {name: os.environ.get(name) for name in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS")}
        os.environ.update(dict.fromkeys(before, "1"))
        try:
            for rank in range(self.job.processes):
                mine, other = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(other, self.job, self.seen, rank), daemon=True)
                process.start()
                other.close()
                self.ends.append(mine)
                self.processes.append(process)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.terminate()
            process.join()

    def pieces(self) -> Iterator[_Piece]:
        """All pieces in order.

        Raises:
            UserError: what a process found, in the order of the rows; or a process was killed.
        """
        k = 0
        while True:
            end = self.ends[k % len(self.ends)]
            try:
                said = end.recv()
                if said[0] == "end":
                    return
                if said[0] == "error":
                    raise UserError(said[1])
                data = end.recv_bytes()
            except EOFError as e:
                raise UserError(
                    "a process ended before its rows were done (killed, or out of memory?). Start again, perhaps with "
                    "fewer --processes"
                ) from e
            with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
                yield reader.read_all(), said[1], said[2]
            k += 1


def _work(end: Connection, job: Job, seen: _Seen, rank: int) -> None:
    """A process of :class:`_Workers`. The first that comes to the end of the input says so in its turn."""
    torch.set_num_threads(1)
    try:
        try:
            load_module(job.module, "--module")
            scorer = Scorer(job, open_directory(job.model, checked=True))
            seen.check(scorer)
            for k, chunk in enumerate(scorer.source.chunks()):
                if k % job.processes == rank:
                    table, unseen = scorer.score(chunk)
                    end.send(("piece", unseen, chunk.consumed))
                    end.send_bytes(_packed(table))
            end.send(("end",))
        except UserError as e:
            end.send(("error", str(e)))
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # the first process has gone, and says why


def _packed(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def told(done: Done, job: Job, seconds: float) -> str:
    """For people: rows, speed, and the values that the training did not know."""
    lines = [f"{job.out}: {done.rows:,} rows in {seconds:.1f} s"]
    if done.unanswered:
        lines.append(f"{done.unanswered:,} rows have no answer (NaN): their numbers are too far from the training's")
    if done.figures:
        words = "  ".join(f"{key} {shown(done.figures[key])}" for key in ("auc", "logloss", "ne", "calibration", "ece"))
        lines.append(f"by {job.label}: {words}")
    for name, n in done.unseen.items():
        if n:
            lines.append(f"{name}: {n:,} values have no id of their own ({n / done.rows:.2%} of the rows' number)")
    return "\n".join(lines)
