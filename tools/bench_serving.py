"""How fast predict.py goes: rows per second of processor time on one core, in parts, beside a floor in the same run.

    python tools/bench_serving.py predict --model exported/my --input rows.csv
    python tools/bench_serving.py programs --model exported/a exported/b --input rows.csv
    python tools/bench_serving.py malformed --model exported/my --input rows.csv --bodies 1000

predict: for every piece of the input the time to parse, encode and predict it, alternating with the floor: polars reads
the same bytes as text columns, and bare ``nn.Linear`` layers of the sizes of the model's MLP multiply numbers that are
there already. Processor time, so that a busy machine changes little.
programs: a table of latency (median) at batches of 1, 256 and 8192 for the directory and each of its programs, with
bytes and load time.
malformed: bodies that are cut, garbled or of odd values, sent to the application in process; what is answered, and
whether memory grows.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import polars as pl
import psutil
import torch
from torch import nn

from embsearch_dist.errors import UserError
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.predict import Job, Scorer, logits_of
from embsearch_dist.serving.programs import RUNNERS, Program
from embsearch_dist.serving.tables import Ids


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["predict", "programs", "malformed"])
    p.add_argument("--model", type=Path, nargs="+", required=True)
    p.add_argument("--input", type=Path, required=True, help="raw rows in the form of the training data")
    p.add_argument("--pieces", type=int, default=4, help="predict: pieces of the input that are timed (default 4)")
    p.add_argument("--repeats", type=int, default=15, help="programs: calls of each (default 15)")
    p.add_argument("--bodies", type=int, default=1000)
    args = p.parse_args()
    torch.set_num_threads(1)
    try:
        if args.what == "predict":
            predict(args.model[0], args.input, args.pieces)
        elif args.what == "programs":
            for model in args.model:
                programs(model, args.input, args.repeats)
        else:
            malformed(args.model[0], args.input, args.bodies)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def predict(model: Path, rows: Path, pieces: int) -> None:
    """See above."""
    directory = open_directory(model)
    scorer = Scorer(Job(model, rows, Path("unused")), directory)
    layers = floor_layers(scorer.model)
    spent: dict[str, float] = collections.defaultdict(float)
    count = 0

    def timed(what: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        found = work()
        spent[what] += time.process_time() - started
        return found

    for k, chunk in enumerate(scorer.source.chunks()):
        if k > pieces:
            break
        frame = timed("parse", lambda: chunk.frame)  # noqa: B023
        encoded = timed("encode", lambda: scorer.encoder(frame))  # noqa: B023
        timed("model", lambda: logits_of(scorer.model, encoded.ids, directory.batch_rows))  # noqa: B023
        data = text_of(frame)
        timed("floor: text", lambda: pl.read_csv(io.BytesIO(data), infer_schema=False, has_header=False))  # noqa: B023
        timed("floor: layers", lambda: run_layers(layers, encoded.rows, directory.batch_rows))  # noqa: B023
        if k == 0:
            spent.clear()  # warm
        else:
            count += encoded.rows
    own = spent["parse"] + spent["encode"] + spent["model"]
    floor = spent["floor: text"] + spent["floor: layers"]
    print(f"{count:,} rows, {len(directory.fields)} fields, one core, processor time")
    for name, seconds in spent.items():
        print(f"{name:14} {1e6 * seconds / count:8.2f} us a row")
    print(f"{count / own:,.0f} rows/s, floor {count / floor:,.0f} rows/s: {floor / own:.2f} of the floor")


def text_of(frame: pl.DataFrame) -> bytes:
    """The rows as delimited text."""
    lists = [name for name, kind in frame.schema.items() if kind.is_nested()]
    sink = io.BytesIO()
    frame.drop(lists).write_csv(sink, include_header=False)
    return sink.getvalue()


def floor_layers(model: Any) -> nn.Sequential:
    """Bare layers of the sizes of the model's dense part."""
    sizes = [
        (m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear) and m.out_features > 1
    ]
    return nn.Sequential(*(nn.Linear(*size) for size in sizes)).eval()


@torch.inference_mode()
def run_layers(layers: nn.Sequential, rows: int, batch: int) -> None:
    for layer in layers:
        x = torch.ones(min(batch, rows), layer.in_features)  # type: ignore[arg-type, call-overload]
        for start in range(0, rows, batch):
            layer(x[: min(batch, rows - start)])


def first_ids(directory: ModelDirectory, rows: Path, n: int) -> Ids:
    """The first ``n`` rows, encoded; repeated where there are fewer."""
    scorer = Scorer(Job(directory.path, rows, Path("unused")), directory)
    ids = scorer.encoder(next(scorer.source.chunks()).frame).ids
    return ids.take(torch.arange(n) % ids.rows)


def programs(model: Path, rows: Path, repeats: int) -> None:
    """See above."""
    started = time.perf_counter()
    directory = open_directory(model)
    made = directory.model()
    seconds = {"directory": time.perf_counter() - started}
    program = Program(made, directory.schema)
    calls: dict[str, Callable[[Ids, list[torch.Tensor]], Any]] = {
        "directory": lambda ids, inputs: logits_of(made, ids, directory.batch_rows)
    }
    sizes = {"directory": sum(directory.body["sizes"][f"{n}.safetensors"] for n in ("tables", "dense"))}
    for name, (file, runner) in RUNNERS.items():
        if (model / file).exists():
            started = time.perf_counter()
            run = runner(model / file)
            seconds[name] = time.perf_counter() - started
            calls[name] = lambda ids, inputs, run=run: run(inputs)  # type: ignore[misc]
            sizes[name] = (model / file).stat().st_size
    measured, body = directory.body["measured"], directory.body
    print("| model | precision | program | bytes | load s | p50 ms at 1 | at 256 | at 8192 | max difference | AUC |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in (1, 256, 8192):
        ids = first_ids(directory, rows, n)
        inputs = program.inputs(ids)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 2):
            for name, call in calls.items():  # in turn, so that all have the same neighbours
                begun = time.perf_counter()
                call(ids, inputs)
                if repeat >= 2:
                    taken[name].append(time.perf_counter() - begun)
        for name in calls:
            times[name].append(1e3 * statistics.median(taken[name]))
    for name in calls:
        m = measured["served" if name == "directory" else name]
        figures = " | ".join(f"{t:.3f}" for t in times[name])
        head = f"| {body['name']} | {body['precision']} | {name} | {sizes[name]:,} | {seconds[name]:.2f}"
        print(f"{head} | {figures} | {m['max_difference']:.2g} | {m['auc']:.5f} |")


def malformed(model: Path, rows: Path, bodies: int) -> None:
    """See above."""
    from starlette.testclient import TestClient

    from embsearch_dist.serving.server import Limits, application

    directory = open_directory(model)
    raw = pl.read_csv(rows, infer_schema=False).head(3) if rows.suffix == ".csv" else pl.read_parquet(rows).head(3)
    body = json.dumps({"rows": raw.to_dicts()}, default=str).encode()
    rng, statuses = np.random.default_rng(0), collections.Counter[int]()
    unclear = 0
    with TestClient(application(directory, Limits()), raise_server_exceptions=False) as client:
        assert client.post("/predict", content=body).status_code == 200
        before = psutil.Process().memory_info().rss
        for _ in range(bodies):
            answer = client.post("/predict", content=garbled(body, rng))
            statuses[answer.status_code] += 1
            if answer.status_code != 200:
                error = answer.json().get("error", "")
                unclear += not (400 <= answer.status_code < 500 and error and "\n" not in error)
        after = psutil.Process().memory_info().rss
    print(
        f"{bodies:,} bodies: {dict(sorted(statuses.items()))}, {unclear} without a clear 4xx; "
        f"memory {before / 1e6:.0f} -> {after / 1e6:.0f} MB"
    )


def garbled(body: bytes, rng: np.random.Generator) -> bytes:
    """A body that was cut, got other bytes, or is noise."""
    how = rng.integers(3)
    if how == 0:
        return body[: rng.integers(len(body) - 1)]
    if how == 2:
        return rng.bytes(rng.integers(0, 300))
    found = bytearray(body)
    for place in rng.integers(len(found), size=rng.integers(1, 9)):
        found[place] = rng.integers(256)
    return bytes(found)


if __name__ == "__main__":
    sys.exit(main())
