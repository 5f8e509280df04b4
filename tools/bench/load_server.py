"""The HTTP server under load from wrk, a public tool: requests/s, latency and memory, beside calls in the process.

    python tools/bench/load_server.py --model exported/my --input rows.csv
    python tools/bench/load_server.py --model exported/my --input rows.csv --rows 1 16 --connections 1 8 --seconds 10

Starts ``python -m embsearch_dist.serve``, and for each size of body and number of connections wrk, which sends bodies
cut out of the input (64 of them in turn) as fast as answers come. Beside it, in this process and one after another, the
same bodies: parsed, encoded and predicted without HTTP; and what the model's ONNX program alone takes for their rows
(``export.py --format onnx``). Memory is the server's resident size before and after each load. On a machine of few
cores wrk takes its share of them.

wrk is in the package managers of Debian, Ubuntu, Fedora and Homebrew: ``apt-get install wrk``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import polars as pl
import psutil
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.predict import Job, Scorer, logits_of
from embsearch_dist.serving.programs import OnnxRunner, Program
from embsearch_dist.serving.requests import RequestEncoder, rows_of
from tools.bench.serving_table import markdown, write_csv
from tools.gpucheck.facts import hardware
from tools.studies.jobs import commit

ROOT = Path(__file__).resolve().parents[2]
BODIES = 64
COLUMNS = (
    "commit command hardware model how body_rows connections requests_per_second rows_per_second p50_ms p99_ms "
    "requests failed rss_before_mb rss_after_mb"
).split()

# wrk's own language. A thread of wrk reads the bodies once and sends them in turn.
SCRIPT = """
local bodies, at = {{}}, 0
for line in io.lines({bodies}) do bodies[#bodies + 1] = line end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function()
   at = at % #bodies + 1
   return wrk.format(nil, nil, nil, bodies[at])
end
done = function(summary, latency, requests)
   local e = summary.errors
   local failed = e.connect + e.read + e.write + e.status + e.timeout
   io.write(string.format("DONE %d %d %f %f %f\\n", summary.requests, failed, summary.duration / 1e6,
      latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="directory that export.py made")
    p.add_argument("--input", type=Path, required=True, help="raw rows in the form of the training data")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256], help="of a body (default 1 16 256)")
    p.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32], help="at a time (default 1 8 32)")
    p.add_argument("--seconds", type=int, default=10, help="of each load (default 10)")
    p.add_argument("--csv", type=Path, help="also write the figures here")
    args = p.parse_args()
    try:
        rows = measure(args.model, args.input, args.rows, args.connections, args.seconds)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(markdown(COLUMNS[COLUMNS.index("how") :], rows))
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)
    return 0


def measure(
    model: Path, rows: Path, sizes: Sequence[int], connections: Sequence[int], seconds: int
) -> list[dict[str, Any]]:
    """A dict of :data:`COLUMNS` for each load and each call in the process.

    Raises:
        UserError: wrk is missing, the server did not start, or the directory cannot be read.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise UserError("wrk, which makes the load, is missing. Install it: apt-get install wrk (or dnf, brew)")
    torch.set_num_threads(1)
    directory = open_directory(model)
    words = f"--rows {' '.join(map(str, sizes))} --connections {' '.join(map(str, connections))} --seconds {seconds}"
    about = {"commit": commit(), "command": f"python tools/bench/load_server.py --model EXPORTED --input ROWS {words}"}
    about |= {"hardware": hardware(), "model": f"{directory.body['name']} {directory.body['precision']}"}
    found = []
    with tempfile.TemporaryDirectory() as folder, serving(model) as (process, address):
        for size in sizes:
            bodies = bodies_of(directory, rows, size)
            text = Path(folder) / f"{size}.jsonl"
            text.write_text("\n".join(bodies) + "\n")
            script = Path(folder) / f"{size}.lua"
            script.write_text(SCRIPT.format(bodies=json.dumps(str(text))))
            for count in connections:
                line = load([wrk, "-t1", f"-c{count}", "-s", str(script)], address, seconds, process)
                found.append(about | line | {"how": "HTTP", "body_rows": size, "connections": count})
            found += [about | line for line in in_process(directory, bodies, size, seconds)]
    for row in found:
        row["rows_per_second"] = round(row["requests_per_second"] * row["body_rows"])
        row["requests_per_second"] = round(row["requests_per_second"])
    return found


@contextmanager
def serving(model: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The server in a process of its own, and its address."""
    command = [sys.executable, "-m", "embsearch_dist.serve", str(model.absolute()), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise UserError(f"{model}: the server did not start; its message is above")
        yield psutil.Process(process.pid), line.split()[2]
    finally:
        process.terminate()
        process.wait()


def load(command: Sequence[str], address: str, seconds: int, server: psutil.Process) -> dict[str, Any]:
    """One run of wrk, after a second to warm up."""
    subprocess.run([*command, "-d1s", f"{address}/predict"], capture_output=True)
    before = server.memory_info().rss
    done = subprocess.run([*command, f"-d{seconds}s", f"{address}/predict"], capture_output=True, text=True)
    said = next((x for x in done.stdout.splitlines() if x.startswith("DONE ")), None)
    if done.returncode or said is None:
        raise UserError(f"wrk failed: {' '.join((done.stderr or done.stdout).split())[:200]}")
    requests, failed, lasted, p50, p99 = map(float, said.split()[1:])
    return {
        "requests_per_second": requests / lasted,
        "p50_ms": f"{p50:.2f}",
        "p99_ms": f"{p99:.2f}",
        "requests": int(requests),
        "failed": int(failed),
        "rss_before_mb": round(before / 1e6),
        "rss_after_mb": round(server.memory_info().rss / 1e6),
    }


def in_process(directory: ModelDirectory, bodies: Sequence[str], size: int, seconds: int) -> list[dict[str, Any]]:
    """The same bodies without HTTP, and the ONNX program alone, if the directory has one."""
    model, encoder = directory.model(), RequestEncoder(directory)

    def whole(k: int) -> Any:
        return logits_of(model, encoder(rows_of(bodies[k].encode(), size)).ids, directory.batch_rows)

    calls: dict[str, Callable[[int], Any]] = {"in process: JSON to logits": whole}
    if (directory.path / "model.onnx").exists():
        run, program = OnnxRunner(directory.path / "model.onnx"), Program(model, directory.schema)
        inputs = [program.inputs(encoder(rows_of(b.encode(), size)).ids) for b in bodies]
        calls["in process: ONNX program alone"] = lambda k: run(inputs[k])
    return [timed(how, call, len(bodies), size, seconds) for how, call in calls.items()]


def timed(how: str, call: Callable[[int], Any], bodies: int, size: int, seconds: int) -> dict[str, Any]:
    """One call after another for ``seconds``."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        call(len(taken) % bodies)
        taken.append(time.perf_counter() - started)
    ordered = sorted(taken)
    return {
        "how": how,
        "body_rows": size,
        "connections": 1,
        "requests_per_second": len(taken) / sum(taken),
        "p50_ms": f"{1e3 * statistics.median(taken):.2f}",
        "p99_ms": f"{1e3 * ordered[int(0.99 * (len(taken) - 1))]:.2f}",
        "requests": len(taken),
    }


def bodies_of(directory: ModelDirectory, rows: Path, size: int) -> list[str]:
    """:data:`BODIES` bodies of ``size`` rows each, out of the beginning of the input, which is repeated."""
    scorer = Scorer(Job(directory.path, rows, Path("unused")), directory)
    frame = next(iter(scorer.source.chunks())).frame
    raw = directory.source.raw
    frame = frame.select(pl.col(n).alias(raw[n]) for n in sorted(directory.columns))
    dicts = frame.head(BODIES * size).to_dicts()
    return [json.dumps({"rows": [dicts[(k * size + j) % len(dicts)] for j in range(size)]}) for k in range(BODIES)]


if __name__ == "__main__":
    sys.exit(main())
