"""What predicting with exported models costs: time, bytes, memory, and what the server makes of garbled requests.

    python tools/bench/serving.py predict --model exported/my --input rows.csv
    python tools/bench/serving.py programs --run runs/my/retrain/ues-16 runs/my/retrain/adass --out OUT --csv FILE
    python tools/bench/serving.py bounded --model exported/my --input rows.csv --rows 1000000 10000000 --out OUT
    python tools/bench/serving.py malformed --model exported/my --input rows.csv --bodies 1000

predict: rows per second of processor time on one core, in parts: for every piece of the input the time to parse, encode
and predict it, alternating with a floor in the same run: polars reads the same bytes as text columns, and bare
``nn.Linear`` layers of the sizes of the model's MLP multiply numbers that are there already. Processor time, so that a
busy machine changes little.
programs: exports every run at every precision and format, and measures them beside the training model and plain torch:
bytes, load time, median latency at batches of 1, 256 and 8192, largest difference of logits, AUC on the test split.
bounded: predict.py on the rows of the input, repeated, as CSV and as a folder of Parquet: rows/s, and the most memory
of all processes together. It must not grow with the rows.
malformed: bodies that are cut, garbled or of odd values, sent to the application in process; what is answered, and
whether memory grows.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import polars as pl
import psutil
import torch
from torch import nn

from embsearch_dist.errors import UserError
from embsearch_dist.precision import PRECISIONS
from embsearch_dist.serving.directory import open_directory
from embsearch_dist.serving.predict import Job, Scorer, logits_of


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["predict", "programs", "bounded", "malformed"])
    p.add_argument("--model", type=Path, nargs="+", help="predict, bounded, malformed: directory that export.py made")
    p.add_argument("--input", type=Path, help="the same: raw rows in the form of the training data")
    p.add_argument("--run", type=Path, nargs="+", help="programs: directories of retrain.py, RUN/retrain/NAME")
    p.add_argument("--out", type=Path, help="programs: folder of the exports; bounded: of the rows (they are removed)")
    p.add_argument("--csv", type=Path, help="programs, bounded: also write the figures here")
    p.add_argument("--precision", nargs="+", default=list(PRECISIONS), help="programs: (default all four)")
    p.add_argument("--format", nargs="+", default=["torch", "onnx"], help="programs: (default torch onnx)")
    p.add_argument("--aoti", action="store_true", help="programs: AOTInductor too, of the first run at fp32 (minutes)")
    p.add_argument("--repeats", type=int, default=200, help="programs: most calls of each (default 200)")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 256, 8192], help="programs: rows of the timed calls")
    p.add_argument("--source", default="", help="programs: what --source of export.py takes")
    p.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="bounded: (default 1M and 10M)")
    p.add_argument("--processes", type=int, default=2, help="bounded: of predict.py (default 2)")
    p.add_argument("--pieces", type=int, default=4, help="predict: pieces of the input that are timed (default 4)")
    p.add_argument("--bodies", type=int, default=1000, help="malformed: how many (default 1000)")
    args = p.parse_args()
    torch.set_num_threads(1)
    try:
        needed = {"programs": ["run", "out"], "bounded": ["model", "input", "out"]}.get(args.what, ["model", "input"])
        for name in needed:
            if getattr(args, name) is None:
                raise UserError(f"{args.what} needs --{name}. See --help")
        if args.what == "predict":
            predict(args.model[0], args.input, args.pieces)
        elif args.what == "malformed":
            malformed(args.model[0], args.input, args.bodies)
        else:
            (programs if args.what == "programs" else bounded)(args)
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


def programs(args: argparse.Namespace) -> None:
    """See above."""
    from tools.bench.serving_table import columns, markdown, table, write_csv

    args.out.mkdir(parents=True, exist_ok=True)
    rows = table(args.run, args.out, args.precision, args.format, args.aoti, args.repeats, args.batches, args.source)
    names = columns(args.batches)
    print(markdown(names[names.index("model") :], rows))
    if args.csv:
        write_csv(args.csv, names, rows)


def bounded(args: argparse.Namespace) -> None:
    """See above."""
    from tools.bench.serving_memory import COLUMNS, measure
    from tools.bench.serving_table import markdown, write_csv

    rows = measure(args.model[0], args.input, args.rows, args.processes, args.out)
    print(markdown(COLUMNS[COLUMNS.index("model") :], rows))
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)


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
