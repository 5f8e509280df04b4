"""What a running stage shows and leaves behind: metric lines, TensorBoard, heat maps, progress.

Files in the run directory, all written by rank 0 alone::

    metrics.jsonl    one line per call of ``scalars``: time, stage, step, tags, values
    heatmaps.jsonl   one line per call of ``heatmap``: stage, step, name, rows, columns, values
    tb/<stage>/      TensorBoard events, tags ``<stage>/<name>`` or ``<stage>/<split>/<name>``

The report (``embsearch_dist.report``) reads the two JSONL files only; TensorBoard is for watching live.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from embsearch_dist.errors import naming
from embsearch_dist.files import ends_whole
from embsearch_dist.train.lines import HEATMAPS, METRICS, Lines, Sum, compare_lines, stage_of
from embsearch_dist.train.matrix_picture import draw_matrix
from embsearch_dist.train.progress import Progress

PICTURE_INTERVAL_S = 10.0
"""Between two TensorBoard images of one heat map: to draw one takes as long as several steps, and all ranks wait."""
RESERVED = frozenset({"time", "stage", "step"})


class Monitor:
    """Records and shows one stage of a run; on ranks other than 0 every method does nothing.

    One monitor per stage, closed before the next one opens: two open monitors on one run directory
    are safe until one of them calls ``resume_at``, which replaces the files under the other.

    Args:
        run_dir: the run directory; made when missing.
        stage: name of the stage, e.g. ``supernet``; the first part of every TensorBoard tag.
        rank: this process's rank; only rank 0 writes and prints.
        quiet: record, but show no progress and say nothing.
    """

    def __init__(self, run_dir: Path | str, stage: str, rank: int = 0, quiet: bool = False) -> None:
        self.run_dir = Path(run_dir)
        self.stage = stage
        self.active = rank == 0
        self.quiet = quiet
        self._files: dict[str, IO[str]] = {}
        self._sums = {METRICS: Sum(), HEATMAPS: Sum()}
        self._writer: Any = None
        self._tensorboard = True
        self._purge_step: int | None = None
        self._drawn: dict[str, float] = {}  # name of a heat map -> when it was last drawn
        self._waiting: dict[str, tuple[int, Any]] = {}  # -> step and picture of a later one that was not
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, Any], **tags: str | float) -> None:
        """Append one line to ``metrics.jsonl`` and the same scalars to TensorBoard.

        Args:
            step: the step the values belong to, counted within the stage.
            values: name -> number (or one-element tensor); NaN and infinity are written as null.
            tags: what tells this line from others of the stage, e.g. ``split="validation"``, ``epoch=1.0``.
                Tags that are text become part of the TensorBoard tag.
        """
        if not self.active:
            return
        clash = (RESERVED & (set(values) | set(tags))) | (set(values) & set(tags))
        if clash:
            raise ValueError(f"scalar or tag name {min(clash)!r} is taken; rename it")
        plain = {name: _number(value) for name, value in values.items()}
        head = {"time": round(time.time(), 3), "stage": self.stage, "step": int(step)}
        self._append(METRICS, {**head, **tags, **plain})
        writer = self._tensorboard_writer()
        if writer is not None:
            prefix = "/".join([self.stage, *(tag for tag in tags.values() if isinstance(tag, str))])
            with naming(self._events):
                for name, number in plain.items():
                    if number is not None:
                        writer.add_scalar(f"{prefix}/{name}", number, int(step))

    def heatmap(self, step: int, name: str, matrix: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
        """Record a matrix with named rows and columns, as a ``heatmaps.jsonl`` line and a TensorBoard image.

        Images of one name are at least :data:`PICTURE_INTERVAL_S` apart, but the last one before ``close`` is drawn.

        Args:
            step: the step the matrix belongs to.
            name: e.g. ``P_E``; the report draws the matrices of one name over time.
            matrix: ``[len(rows), len(columns)]`` numbers: tensor, array or nested lists.
            rows: row names, e.g. the fields.
            columns: column names, e.g. the candidate widths.
        """
        if not self.active:
            return
        values = np.asarray(matrix.detach().float().cpu() if hasattr(matrix, "detach") else matrix, dtype=float)
        if values.shape != (len(rows), len(columns)):
            raise ValueError(f"heat map {name!r}: {values.shape} values for {len(rows)} rows, {len(columns)} columns")
        # Six digits are more than a picture shows, and a third of the file.
        short = [[_number(float(f"{v:.6g}")) for v in row] for row in values.tolist()]
        labels = {"rows": [str(r) for r in rows], "columns": [str(c) for c in columns]}
        self._append(HEATMAPS, {"stage": self.stage, "step": int(step), "name": name, **labels, "values": short})
        if self._tensorboard_writer() is not None:
            title = f"{name}, step {step:,}"
            self._waiting[name] = (
                int(step),
                partial(draw_matrix, values.copy(), labels["rows"], labels["columns"], title),
            )
            if time.monotonic() - self._drawn.get(name, -math.inf) >= PICTURE_INTERVAL_S:
                self._draw_waiting(name)

    def _draw_waiting(self, name: str) -> None:
        step, picture = self._waiting.pop(name)
        self.figure(step, name, picture())
        self._drawn[name] = time.monotonic()

    def figure(self, step: int, name: str, fig: Any) -> None:
        """Add a matplotlib figure to TensorBoard under ``<stage>/<name>`` and close it (on every rank)."""
        writer = self._tensorboard_writer() if self.active else None
        if writer is not None:
            import matplotlib
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            canvas = FigureCanvasAgg(fig)
            with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a name is no formula
                canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            with naming(self._events):
                writer.add_image(f"{self.stage}/{name}", pixels, int(step), dataformats="HWC")
        # A figure made through pyplot lives until it is closed there; one made without it needs nothing.
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:
            pyplot.close(fig)

    @property
    def lines(self) -> Lines:
        """Count and checksum of what this stage has recorded, by file: for its checkpoints."""
        return {name: found.value for name, found in self._sums.items() if found.count}

    def resume_at(self, step: int, known: Lines | None = None) -> None:
        """Forget everything this stage recorded after ``step``, because training goes on from there.

        Lines of other stages stay. A last line cut off by a crash is dropped. Call it before the
        first record of a continued stage; ``resume_at(-1)`` forgets the whole stage.

        Args:
            known: :attr:`lines` at that time, if they were saved; that they are others now is said.
        """
        if not self.active:
            return
        self._close_files()
        self._waiting = {name: late for name, late in self._waiting.items() if late[0] <= step}
        for name in (METRICS, HEATMAPS):
            most = None if known is None else known.get(name, (0, ""))[0]
            self._sums[name] = _keep_lines(self.run_dir / name, self.stage, step, most)
        for text in compare_lines(self.run_dir, self.stage, known, self.lines):
            self.say(text)
        self._close_writer()
        # TensorBoard hides events from purge_step on; the events directory is per stage, since a
        # purge reaches every tag of its directory.
        self._purge_step = step + 1

    def progress(self, total: int, unit: str, initial: int = 0) -> Progress:
        """Start a progress display of ``total`` units, of which ``initial`` are done already (a resume).

        A bar when stderr is a terminal, otherwise one line every ten seconds. Use it in ``with``.
        """
        self._close_progress()
        shown = self.active and not self.quiet
        self._progress = Progress(self.stage, total, unit, initial, shown)
        return self._progress

    def say(self, text: str) -> None:
        """Print one line on rank 0, above an open progress bar."""
        if not self.active or self.quiet:
            return
        if self._progress is not None and self._progress.bar is not None:
            self._progress.bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)

    def flush(self) -> None:
        """Write buffered TensorBoard events out; the JSONL files are line-buffered and need no flush."""
        if self._writer is not None:
            with naming(self._events):
                self._writer.flush()

    def close(self) -> None:
        """End the progress display and close all files. A later call of any method opens them again."""
        self._close_progress()
        for name in list(self._waiting):
            self._draw_waiting(name)
        self._close_files()
        self._close_writer()

    def _append(self, name: str, body: dict[str, Any]) -> None:
        with naming(self.run_dir / name):
            self._write_line(name, json.dumps(body, allow_nan=False))

    def _write_line(self, name: str, line: str) -> None:
        stream = self._files.get(name)
        if stream is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            path = self.run_dir / name
            torn = path.exists() and not ends_whole(path)
            stream = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (stays open until close)
            self._files[name] = stream
            if torn:
                stream.write("\n")
        stream.write(line + "\n")
        self._sums[name].add(line)

    @property
    def _events(self) -> Path:
        return self.run_dir / "tb" / self.stage

    def _tensorboard_writer(self) -> Any:
        """The writer, made on first use: importing TensorBoard takes seconds. None when it is not installed."""
        if self._writer is None and self._tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                self._tensorboard = False
                self.say(f"TensorBoard is not available ({e}); metrics go to {METRICS} only. pip install tensorboard")
                return None
            directory = self._events
            if self._purge_step is not None:
                _before_now(directory)
            with naming(directory):
                self._writer = SummaryWriter(str(directory), purge_step=self._purge_step, flush_secs=30)
            self._purge_step = None
        return self._writer

    def _close_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def _close_files(self) -> None:
        for name, stream in self._files.items():
            with naming(self.run_dir / name):  # what could not be written is tried once more
                stream.close()
        self._files.clear()

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with naming(self._events):
                writer.close()


def _number(value: Any) -> float | int | None:
    """A JSON number, or None for what JSON lacks. Whole numbers stay whole."""
    if isinstance(value, (bool, int)):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _keep_lines(path: Path, stage: str, step: int, most: int | None = None) -> Sum:
    """Rewrite a JSONL file without the stage's lines after ``step`` and those beyond the first ``most``; whole or
    untouched, never half. What the kept lines of the stage are."""
    found = Sum()
    if not path.exists():
        return found
    temporary = path.with_name(path.name + ".tmp")
    # A byte that is no UTF-8 stays what it is: it must not stop the run.
    opened = partial(open, encoding="utf-8", errors="surrogateescape", newline="\n")
    with naming(path), opened(path) as source, opened(temporary, "w") as target:
        for line in source:
            place = stage_of(line)
            if place is None:  # cut off by a crash: nothing can read it
                continue
            if place[0] == stage:
                if place[1] > step or found.count == most:
                    continue
                found.add(line)
            target.write(line if line.endswith("\n") else line + "\n")
    temporary.replace(path)
    return found


def _before_now(directory: Path) -> None:
    """Rename event files so that one made now sorts behind them.

    TensorBoard reads a directory's files in the order of their names: second, host, process, number (so ``.10``
    before ``.9``). A purge in a file that it reads too early, made in the same second or by a clock that
    runs behind, would leave the old curve standing.
    """
    now = int(time.time())
    for place, path in enumerate(sorted(directory.glob("events.out.tfevents.*"))):
        stamp, _, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
        if not (stamp.isascii() and stamp.isdigit()) or int(stamp) >= now:
            path.replace(path.with_name(f"events.out.tfevents.{now - 1:010d}.{place:06d}.{rest}"))
