"""Format x precision x model: size, load time, latency, and how far logits and AUC are from the training model.

The work of ``serving.py programs``. Beside the exported forms stand the training model as evaluate.py uses it
(TorchRec) and plain torch: an ``nn.Embedding`` for each field and the same network, called eagerly.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.methods.ihas.routed_model import ROUTERS
from embsearch_dist.models.pooled import Pooled
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.serving.collect import collect, ids_of_batch, kind_of
from embsearch_dist.serving.directory import load_arrays, open_directory, save_arrays
from embsearch_dist.serving.export import Wish, export
from embsearch_dist.serving.model import Routed, Single
from embsearch_dist.serving.predict import logits_of
from embsearch_dist.serving.programs import RUNNERS, Program
from embsearch_dist.serving.tables import Ids
from embsearch_dist.serving.trained import trained
from embsearch_dist.train.metrics import score
from tools.gpucheck.facts import hardware
from tools.studies.jobs import commit

BATCHES = (1, 256, 8192)
LOADS = 3
WARM = 3
ABOUT = ("commit", "command", "seed", "hardware", "data", "model", "kind", "parameters", "precision", "program")


@dataclass(frozen=True)
class Case:
    """Some rows, as each side takes them."""

    batch: Batch
    ids: Ids
    inputs: list[torch.Tensor]


@dataclass
class Side:
    """A form of a model: its name, bytes on disk, how it is loaded, and what it makes of a case: logits ``[B]``."""

    program: str
    precision: str
    bytes: int
    load: Callable[[], Callable[[Case], torch.Tensor]]
    call: Callable[[Case], torch.Tensor] = lambda case: case.batch.label
    seconds: float = 0.0


def table(
    runs: Sequence[Path],
    out: Path,
    precisions: Sequence[str],
    formats: Sequence[str],
    aoti: bool,
    repeats: int,
    batches: Sequence[int] = BATCHES,
    source: str = "",
) -> list[dict[str, Any]]:
    """Export what ``out`` lacks and measure all of it; a dict of :func:`columns` for each form.

    Args:
        runs: directories of retrain.py.
        out: where the model directories are, or come to be.
        formats: programs of every model and precision.
        aoti: also compile the first model at fp32 with AOTInductor.
        repeats: most calls of one form at one batch; fewer at large ones.
        batches: rows of the calls that are timed.
        source: what ``--source`` of export.py takes.

    Raises:
        UserError: a run cannot be read, or its test split is shorter than the largest batch.
    """
    rows: list[dict[str, Any]] = []
    told = command(runs, precisions, formats, aoti, repeats)
    for k, directory in enumerate(runs):
        exports = {p: out / f"{directory.name}-{p}" for p in precisions}
        with trained(directory, kind_of(directory), source=source) as (run, found, stream):
            for precision, target in exports.items():
                compiled = ["aoti"] if aoti and k == 0 and precision == "fp32" else []
                wish = Wish(target, precision, [*formats, *compiled], False, directory.name)
                if not target.exists():
                    print(f"exporting {target.name}", file=sys.stderr)
                    export(wish, found, Path(run.config.data.path), run.schema, stream)
            about = {"commit": commit(), "command": told, "seed": run.config.run.seed, "hardware": hardware()}
            about |= {"data": f"{run.schema.dataset} {run.schema.fingerprint}", "model": directory.name}
            about |= {"kind": found.body["kind"], "parameters": sum(t.numel() for t in found.tables.values())}
            rows += [about | line for line in of_model(directory, run, stream, exports, repeats, batches)]
    return rows


def columns(batches: Sequence[int]) -> list[str]:
    """Of the CSV file."""
    times = [f"p50_ms_{n}" for n in batches]
    return [*ABOUT, "bytes", "load_seconds", *times, "max_difference", "auc", "auc_difference", "rows"]


def command(runs: Sequence[Path], precisions: Sequence[str], formats: Sequence[str], aoti: bool, repeats: int) -> str:
    """What a person types, without the folders of this machine."""
    named = " ".join(f"RUN/retrain/{r.name}" for r in runs)
    made = f"--precision {' '.join(precisions)} --format {' '.join(formats)}{' --aoti' * aoti} --repeats {repeats}"
    return f"python tools/bench/serving.py programs --run {named} {made} --out OUT"


def of_model(
    directory: Path,
    run: Run,
    stream: BatchStream,
    exports: Mapping[str, Path],
    repeats: int,
    batches: Sequence[int],
) -> list[dict[str, Any]]:
    """The lines of one model."""
    sides = sides_of(directory, run, exports)
    for side in sides:
        times = []
        for _ in range(LOADS):
            started = time.perf_counter()
            side.call = side.load()
            times.append(time.perf_counter() - started)
        side.seconds = statistics.median(times)
    program = Program(open_directory(next(iter(exports.values()))).model(), run.schema)
    latency = latencies(sides, {n: first_rows(run, n, program) for n in batches}, repeats)
    quality = qualities(sides, (case_of(b, run.schema, program) for b in stream.epoch(0)))
    return [
        {"precision": s.precision, "program": s.program, "bytes": s.bytes, "load_seconds": f"{s.seconds:.3f}"}
        | {f"p50_ms_{n}": f"{latency[n][k]:.3f}" for n in batches}
        | quality[k]
        for k, s in enumerate(sides)
    ]


def sides_of(directory: Path, run: Run, exports: Mapping[str, Path]) -> list[Side]:
    """The training model, plain torch, and each form of each precision."""
    sides = [Side("training model", "fp32", checkpoint_bytes(directory), partial(_trained, run, directory))]
    plain = plain_of(open_directory(exports["fp32"]).model()) if "fp32" in exports else None
    if plain is not None:
        weights = exports["fp32"].with_name(f"{directory.name}-plain.safetensors")
        save_arrays(weights, plain.state_dict())
        sides.append(Side("plain torch", "fp32", weights.stat().st_size, partial(_plain, plain, weights)))
    for precision, target in exports.items():
        sizes = open_directory(target).body["sizes"]
        arrays = sizes["tables.safetensors"] + sizes["dense.safetensors"]
        sides.append(Side("directory", precision, arrays, partial(_directory, target)))
        for name, (file, runner) in RUNNERS.items():
            path = target / file
            if path.exists():
                sides.append(Side(name, precision, path.stat().st_size, partial(_program, runner, path)))
    return sides


def _trained(run: Run, directory: Path) -> Callable[[Case], torch.Tensor]:
    found = collect(run, directory, ROUTERS[0])
    return lambda case: found.predict(case.batch)


def _plain(plain: nn.Module, path: Path) -> Callable[[Case], torch.Tensor]:
    plain.load_state_dict(load_arrays(path))
    return lambda case: plain(case.ids)


def _directory(path: Path) -> Callable[[Case], torch.Tensor]:
    opened = open_directory(path)
    model = opened.model()
    return lambda case: logits_of(model, case.ids, opened.batch_rows)


def _program(runner: Callable[[Path], Any], path: Path) -> Callable[[Case], torch.Tensor]:
    run = runner(path)
    return lambda case: run(case.inputs)


def checkpoint_bytes(directory: Path) -> int:
    """Of the checkpoints that hold the best weights, the optimizer's state among them."""
    found = 0
    for best in directory.rglob("best.json"):
        place = best.parent / f"step-{read_json(best)['step']}"
        found += sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
    return found


def case_of(batch: Batch, schema: Schema, program: Program) -> Case:
    ids = ids_of_batch(batch, schema)
    return Case(batch, ids, program.inputs(ids))


def first_rows(run: Run, n: int, program: Program) -> Case:
    """The first ``n`` rows of the test split."""
    stream = run.stream("test", n, shuffle=False)
    if stream.rows < n:
        raise UserError(
            f"the test split of {run.config.data.path} has {stream.rows} rows, fewer than {n}. Use more data"
        )
    return case_of(next(iter(stream.epoch(0))), run.schema, program)


@torch.no_grad()  # TorchRec does not work in inference mode
def latencies(sides: Sequence[Side], cases: Mapping[int, Case], repeats: int) -> dict[int, list[float]]:
    """Median milliseconds of a call: batch -> a figure for each side. The sides take turns."""
    found = {}
    for n, case in cases.items():
        taken: list[list[float]] = [[] for _ in sides]
        for repeat in range(WARM + max(15, min(repeats, repeats * 100 // n))):
            for k, side in enumerate(sides):
                started = time.perf_counter()
                side.call(case)
                if repeat >= WARM:
                    taken[k].append(time.perf_counter() - started)
        found[n] = [1e3 * statistics.median(times) for times in taken]
    return found


@torch.no_grad()  # TorchRec does not work in inference mode
def qualities(sides: Sequence[Side], cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Of each side on all rows: AUC, and the differences to the first side."""
    logits: list[list[torch.Tensor]] = [[] for _ in sides]
    labels = []
    for case in cases:
        labels.append(case.batch.label)
        for k, side in enumerate(sides):
            logits[k].append(side.call(case).float().clone())
    label, every = torch.cat(labels), [torch.cat(parts) for parts in logits]
    base = score(every[0], label)["auc"]
    found = []
    for mine in every:
        auc = score(mine, label)["auc"]
        apart = float((mine - every[0]).abs().max())
        found.append({"max_difference": f"{apart:.2g}", "auc": f"{auc:.6f}", "auc_difference": f"{auc - base:+.1e}"})
    return [line | {"rows": len(label)} for line in found]


class PlainSingle(nn.Module):
    """One model of an allocation in the layers of torch: eager, without blocks of rows or folded products."""

    def __init__(self, model: Single) -> None:
        super().__init__()
        self.specs, self.head = model.tables.specs, model.head
        self.starts = tuple(sum(s.columns for s in self.specs[:k]) for k in range(len(self.specs)))
        self.weights = tuple(s + x.width for s, x in zip(self.starts, self.specs) if x.columns > x.width)
        tables = [model.tables.get_buffer(f"t{k}") for k in range(len(self.specs))]
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(table) for table in tables)

    def forward(self, ids: Ids) -> torch.Tensor:
        parts = [layer(ids.single[spec.field.name]) for spec, layer in zip(self.specs, self.tables)]
        widths = tuple(s.width for s in self.specs)
        pooled = Pooled(torch.cat(parts, 1), self.starts, widths, self.weights)
        return self.head(ids.dense, pooled)  # type: ignore[no-any-return]


class PlainRouted(nn.Module):
    """Such a model for each group, behind the router of the model directory."""

    def __init__(self, model: Routed) -> None:
        super().__init__()
        self.router, self.groups = model.router, nn.ModuleList(PlainSingle(m) for m in model.models)  # type: ignore[arg-type]

    def forward(self, ids: Ids) -> torch.Tensor:
        group, logits = self.router(ids), torch.empty(ids.rows)
        for k, one in enumerate(self.groups):
            rows = (group == k).nonzero().flatten()
            if len(rows):
                logits[rows] = one(ids.take(rows))
        return logits


def plain_of(model: Any) -> nn.Module | None:
    """In plain layers; None for searched models, whose columns are weighed row by row, and for lists."""
    parts = model.models if isinstance(model, Routed) else [model]
    if any(s.field.is_list for m in parts if isinstance(m, Single) for s in m.tables.specs):
        return None
    if isinstance(model, Single):
        return PlainSingle(model).eval()
    return PlainRouted(model).eval() if isinstance(model, Routed) else None


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Some columns of a table."""
    lines = [f"| {' | '.join(c.replace('_', ' ') for c in columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row.get(c, '')) for c in columns)} |" for row in rows)]) + "\n"
