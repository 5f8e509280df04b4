"""From a trained run into use: export.py, its programs, predict.py with several processes, and the server itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
import torch

from embsearch_dist.files import read_json
from embsearch_dist.serving.collect import ids_of_batch
from embsearch_dist.serving.directory import open_directory
from embsearch_dist.serving.programs import OnnxRunner, Program, TorchRunner, exported, save_onnx, save_torch
from tests.served import exported as export_model
from tests.served import run_of, single
from tests.unit.test_serving_models import KINDS

WIDTHS = "ues-4"


def test_a_run_becomes_programs_that_give_its_logits(
    data: Path, config: Path, tmp_path: Path, run_script: Callable
) -> None:
    run, out, scores = tmp_path / "run", tmp_path / "model", tmp_path / "scores.parquet"
    settings = ["--data.path", data, "--run.dir", run, "--run.device", "cpu", "--train.epochs", 1]
    run_script("retrain.py", "--config", config, *settings, "--allocation", WIDTHS)
    trained = run / "retrain" / WIDTHS
    done = run_script("export.py", "--run", trained, "--out", out, "--format", "torch", "onnx", "triton")
    assert "the same bits" in done.stdout
    measured = read_json(out / "model.json")["measured"]
    assert measured["trained"]["auc"] == read_json(trained / "evaluation.json")["auc"] == measured["served"]["auc"]
    assert max(measured[name]["max_difference"] for name in ("torch", "onnx")) < 1e-5
    repository = out / "triton" / WIDTHS
    assert (repository / "1" / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()
    given = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in inputs_of(out)}
    assert given == {"ids": ["batch", 4], "dense": ["batch", 1]}
    assert 'name: "ids", data_type: TYPE_INT64, dims: [ 4 ]' in (repository / "config.pbtxt").read_text()
    # A process that knows torch alone.
    program = f"import torch; print(float(torch.export.load({str(out / 'model.pt2')!r}).module()("
    program += "torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1))[0]))"
    alone = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    ids = [torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1)]
    assert float(alone.stdout) == pytest.approx(float(OnnxRunner(out / "model.onnx")(ids)), abs=1e-5)

    raw = data.parent / "clicks.csv"
    done = run_script("predict.py", "--model", out, "--input", raw, "--out", scores, "--keep", "big", "--processes", 2)
    assert f"{scores}: 4,000 rows" in done.stdout
    found = pl.read_parquet(scores)
    assert found["big"].to_list() == pl.read_csv(raw, infer_schema=False)["big"].to_list()
    split = rows_of_test(found, out, data)
    assert np.array_equal(split, evaluated(out, data))


def inputs_of(out: Path) -> list:
    return list(onnx.load(out / "model.onnx").graph.input)


def rows_of_test(found: pl.DataFrame, out: Path, data: Path) -> np.ndarray:
    """The logits of the rows of the test split, in its order: ``big`` and ``x`` together name a row."""
    from embsearch_dist.data.prepare.encode import standardised

    raw = pl.read_csv(data.parent / "clicks.csv")
    scale = read_json(out / "source.json")["dense"]["x"]
    x = standardised(raw["x"].to_numpy(), scale["mean"], scale["std"])
    places = {value: k for k, value in enumerate(x.tolist())}
    split = pl.concat(pl.read_parquet(p) for p in sorted((data / "test").glob("*.parquet")))
    return found["logit"].to_numpy()[[places[value] for value in split["x"].to_list()]]


def evaluated(out: Path, data: Path) -> np.ndarray:
    """The logits of the test split by the model directory, in the batches of an evaluation."""
    run, model = run_of(data), open_directory(out).model()
    batches = run.stream("test", 200, shuffle=False).epoch(0)
    with torch.no_grad():
        return torch.cat([model(ids_of_batch(b, run.schema)) for b in batches]).numpy()


def test_the_server_listens_on_this_machine_and_answers(data: Path, tmp_path: Path) -> None:
    run = run_of(data)
    export_model(run, single(run), tmp_path / "model")
    command = [sys.executable, "-m", "embsearch_dist.serve", str(tmp_path / "model"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # it says so once it listens
        assert line.startswith("listening on http://127.0.0.1:")
        address = line.split()[2]
        body = json.dumps({"rows": [{"left": 1, "big": 2, "right": "3", "x": 0.5}]}).encode()
        asked = urllib.request.Request(f"{address}/predict", body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert 0 < json.load(answer)["probabilities"][0] < 1
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bfloat16"])
def test_every_kind_of_model_becomes_programs(kind: str, precision: str, data: Path, tmp_path: Path) -> None:
    run, found = KINDS[kind](data)
    body = export_model(run, found, tmp_path / "model", precision, ["torch", "onnx"])
    for name in ("torch", "onnx"):
        assert body["measured"][name]["max_difference_to_served"] < 2e-5
    assert open_directory(tmp_path / "model").fields == found.fields(run.schema)
    batch = next(iter(run.stream("test", 1, shuffle=False).epoch(0)))
    model = open_directory(tmp_path / "model").model()
    program = Program(model, run.schema)
    inputs = program.inputs(ids_of_batch(batch, run.schema))  # a single row
    for runner in (TorchRunner(tmp_path / "model" / "model.pt2"), OnnxRunner(tmp_path / "model" / "model.onnx")):
        assert float(runner(inputs)) == pytest.approx(float(program(*inputs)[0]), abs=2e-5)


@pytest.mark.slow
def test_lists_go_into_programs_padded(tmp_path: Path) -> None:
    from embsearch_dist.data.prepare.pipeline import prepare
    from tests.raw_lists import make_lists

    source, _ = make_lists(tmp_path / "raw", rows=1500)
    prepare("table", source, tmp_path / "out", min_count=2, quiet=True)
    run = run_of(tmp_path / "out")
    program = Program(trained_of(run), run.schema)
    ids = ids_of_batch(next(iter(run.stream("test", 200, shuffle=False).epoch(0))), run.schema)
    traced = exported(program, ids.take(slice(0, 5)))
    save_torch(traced, tmp_path / "p.pt2")
    save_onnx(program, traced, tmp_path / "p.onnx")
    with torch.no_grad():
        wanted = program.model(ids)
    for runner in (TorchRunner(tmp_path / "p.pt2"), OnnxRunner(tmp_path / "p.onnx")):
        assert float((runner(program.inputs(ids)) - wanted).abs().max()) < 2e-5


def trained_of(run):  # type: ignore[no-untyped-def]
    folder = Path(run.config.data.path).parent / "model"
    export_model(run, single(run, {"user": 2, "tags": 4, "likes": 8, "big": 2}), folder)
    return open_directory(folder).model()
