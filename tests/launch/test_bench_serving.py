"""The tools behind the serving figures: what they measure is what they say, and what is missing is told."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from embsearch_dist.errors import UserError  # noqa: E402
from embsearch_dist.serving.collect import ids_of_batch  # noqa: E402
from embsearch_dist.serving.directory import open_directory  # noqa: E402
from tests.served import exported, run_of, single  # noqa: E402
from tests.unit.test_serving_models import KINDS  # noqa: E402
from tools.bench import load_server, serving_memory, serving_table  # noqa: E402


@pytest.mark.parametrize("kind", ["first-order weights", "router of fields"])
def test_plain_torch_computes_the_same(kind: str, data: Path, tmp_path: Path) -> None:
    run, found = KINDS[kind](data)
    exported(run, found, tmp_path / "model")
    model = open_directory(tmp_path / "model").model()
    ids = ids_of_batch(next(iter(run.stream("test", 100, shuffle=False).epoch(0))), run.schema)
    plain = serving_table.plain_of(model)
    assert plain is not None and not any("PlainTables" in type(m).__name__ for m in plain.modules())
    with torch.no_grad():
        assert float((plain(ids) - model(ids)).abs().max()) < 1e-5


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_rows_are_repeated_in_order(form: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": np.arange(7), "b": [f"v{k}" for k in range(7)]})
    made = serving_memory.write(frame, 60, form, tmp_path)
    files = sorted(made.glob("*.parquet"))
    found = pl.read_csv(made) if form == "csv" else pl.concat(pl.read_parquet(f) for f in files)
    assert found["a"].to_list() == [k % 7 for k in range(60)] and found["b"][59] == "v3"


def test_without_wrk_the_load_test_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="wrk, which makes the load, is missing. Install it: apt-get install wrk"):
        load_server.measure(tmp_path, tmp_path, [1], [1], 1)


def test_bodies_hold_the_rows_of_the_input(data: Path, tmp_path: Path) -> None:
    run = run_of(data)
    exported(run, single(run), tmp_path / "model")
    directory = open_directory(tmp_path / "model")
    bodies = load_server.bodies_of(directory, data.parent / "clicks.csv", 3)
    encoder = load_server.RequestEncoder(directory)
    parts = [encoder(load_server.rows_of(body.encode(), 3)) for body in bodies]
    raw = pl.read_csv(data.parent / "clicks.csv", infer_schema=False).head(3 * load_server.BODIES)
    assert len(bodies) == load_server.BODIES
    big = dict(zip(directory.vocabulary("big"), range(1, 1 << 20)))
    assert torch.cat([p.ids.single["big"] for p in parts]).tolist() == [big.get(v, 0) for v in raw["big"]]


def figures(command: list, path: Path) -> list[dict[str, str]]:
    """What a tool writes into its CSV file."""
    subprocess.run([str(c) for c in [*command, "--csv", path]], check=True, capture_output=True)
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_table_has_every_form_and_the_memory_is_measured(
    data: Path, config: Path, tmp_path: Path, run_script: Callable
) -> None:
    settings = ["--data.path", data, "--run.dir", tmp_path / "run", "--run.device", "cpu", "--train.epochs", 1]
    run_script("retrain.py", "--config", config, *settings, "--allocation", "ues-4")
    run, tool = tmp_path / "run" / "retrain" / "ues-4", [sys.executable, ROOT / "tools" / "bench" / "serving.py"]
    words = ["--out", tmp_path / "out", "--precision", "fp32", "int8", "--format", "onnx", "--batches", 1, 100]
    rows = figures([*tool, "programs", "--run", run, *words], tmp_path / "p.csv")
    forms = [("training model", "fp32"), ("plain torch", "fp32"), ("directory", "fp32"), ("onnx", "fp32")]
    assert [(r["program"], r["precision"]) for r in rows] == [*forms, ("directory", "int8"), ("onnx", "int8")]
    assert all(float(r["p50_ms_1"]) > 0 and int(r["bytes"]) > 0 for r in rows)
    assert [float(r["max_difference"]) < 1e-5 for r in rows] == [True] * 4 + [False] * 2
    words = ["--input", data.parent / "clicks.csv", "--rows", 5000, 9000, "--out", tmp_path / "rows"]
    found = figures([*tool, "bounded", "--model", tmp_path / "out" / "ues-4-fp32", *words], tmp_path / "m.csv")
    assert [(r["form"], r["rows"]) for r in found] == [(f, n) for f in ("csv", "parquet") for n in ("5000", "9000")]
    assert all(int(r["pss_mb"]) > 50 for r in found) and list((tmp_path / "rows").iterdir()) == []
