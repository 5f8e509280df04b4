"""Serving where a user's names, values and disks are odd."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from starlette.testclient import TestClient

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.serving import predict as predicting
from embsearch_dist.serving import programs, server
from embsearch_dist.serving.card import cell
from embsearch_dist.serving.directory import ModelDirectory, open_directory, save_arrays
from embsearch_dist.serving.predict import Job, predict, told
from embsearch_dist.serving.programs import Port
from embsearch_dist.serving.server import Limits, application
from embsearch_dist.serving.tables import Ids, Padded
from embsearch_dist.serving.triton import config
from tests.served import exported, run_of, single

NAME = 'a"b/.. |ü'
VALUES = [
    'q"',
    "it's",
    "nul\0in",
    "😀",
    "x" * 70_000,
    "line\nbreak",
    "tab\tin",
    "co,ma",
    " lead",
    "\\n",
    "nan",
    "e\u0301",
]
ROWS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """A model with a field and values of odd names; ``rows.parquet`` beside it holds the raw rows."""
    folder, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    columns = {
        "click": rng.integers(0, 2, ROWS),
        NAME: [VALUES[k] for k in rng.integers(0, len(VALUES), ROWS)],
        "user": [f"u{k}" for k in rng.integers(0, 30, ROWS)],
        "x": rng.standard_normal(ROWS),
    }
    pl.DataFrame(columns).write_parquet(folder / "rows.parquet")
    fields = f"{{{json.dumps(NAME)}: categorical, user: categorical, x: dense}}"
    (folder / "s.yaml").write_text(f"files: rows.parquet\nlabel: click\nmin_count: 1\nfields: {fields}\n")
    prepare("table", folder / "s.yaml", folder / "out", quiet=True)
    run = run_of(folder / "out", "model.hidden=[8]")
    exported(run, single(run, {NAME: 4, "user": 2}), folder / "model")
    return open_directory(folder / "model")


def test_odd_names_and_values_are_served_as_trained(model: ModelDirectory, tmp_path: Path) -> None:
    raw = pl.read_parquet(model.path.parent / "rows.parquet").drop("click")
    assert model.body["measured"]["bitwise"] and set(model.vocabulary(NAME)) == set(VALUES)
    done = predict(Job(model.path, model.path.parent / "rows.parquet", tmp_path / "s.parquet", keep=(NAME,)))
    scores = pl.read_parquet(tmp_path / "s.parquet")
    assert done.unseen == {NAME: 0, "user": 0} and scores[NAME].to_list() == raw[NAME].to_list()
    with TestClient(application(model, Limits())) as client:
        rows = raw.unique(NAME, keep="first", maintain_order=True).to_dicts()
        answer = client.post("/predict", json={"rows": rows}).json()
    places = raw.with_row_index().unique(NAME, keep="first", maintain_order=True)["index"]
    assert answer == {"probabilities": scores["probability"].gather(places).to_list(), "unseen": {}}
    assert '| a"b/.. &#124;ü | a"b/.. &#124;ü | categorical | 12 known |' in (model.path / "README.md").read_text()


def test_names_are_written_so_that_other_programs_read_them() -> None:
    assert cell("a\n b|<i>") == "a b&#124;&lt;i&gt;" and cell(" ") == "' '"
    text = config("m", [Port('ids_a"b\\', "int64", -1, 'a"b\\')])
    assert r'input [ { name: "ids_a\"b\\", data_type: TYPE_INT64, dims: [ -1 ] } ]' in text


@pytest.fixture
def two(model: ModelDirectory) -> list[dict[str, object]]:
    return [{NAME: 'q"', "user": "u1", "x": 0.5}, {NAME: 'q"', "user": "u1", "x": 1e300}]


def test_a_number_beyond_float32_is_one_clear_line(
    two: list[dict[str, object]], model: ModelDirectory, tmp_path: Path
) -> None:
    with TestClient(application(model, Limits()), raise_server_exceptions=False) as client:
        answer = client.post("/predict", json={"rows": two})
    assert answer.status_code == 400 and "column 'x': 1e+300 is too large" in answer.json()["error"]
    pl.DataFrame(two).write_parquet(tmp_path / "r.parquet")
    with pytest.raises(UserError, match=r"column 'x': 1e\+300 is too large"):
        predict(Job(model.path, tmp_path / "r.parquet", tmp_path / "s.parquet"))


def test_rows_without_an_answer_are_told(
    two: list[dict[str, object]], model: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two[1]["x"] = 3e38
    overflown = torch.tensor([0.0, float("nan")])
    for module in (predicting, server):
        monkeypatch.setattr(module, "logits_of", lambda model, ids, batch_rows: overflown)
    with TestClient(application(model, Limits()), raise_server_exceptions=False) as client:
        answer = client.post("/predict", json={"rows": two})
    assert answer.status_code == 400 and "row 1: the model has no answer" in answer.json()["error"]
    pl.DataFrame(two).write_parquet(tmp_path / "r.parquet")
    done = predict(job := Job(model.path, tmp_path / "r.parquet", tmp_path / "s.parquet"))
    assert done.unanswered == 1 and "1 rows have no answer (NaN)" in told(done, job, 1.0)


def test_calibration_is_predicted_clicks_over_clicks(model: ModelDirectory) -> None:
    split = pl.concat(pl.read_parquet(p) for p in sorted((model.path.parent / "out" / "test").glob("*.parquet")))
    scores = model.path.parent / "scores.parquet"
    predict(Job(model.path, model.path.parent / "rows.parquet", scores, keep=("x",)))
    raw = pl.read_parquet(scores)
    mean, std = model.scale["x"]
    known = {np.float32((x - mean) / std): p for x, p in zip(raw["x"], raw["probability"])}
    wanted = sum(known[np.float32(x)] for x in split["x"]) / split["label"].sum()
    served = model.body["measured"]["served"]
    assert served["calibration"] == pytest.approx(wanted, rel=1e-5)
    assert f"| {served['calibration']:.4f} |" in (model.path / "README.md").read_text()


def test_arrays_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_arrays(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(UserError, match=r"no\.safetensors cannot be written"):
        save_arrays(tmp_path / "no.safetensors", {"x": torch.zeros(2), "\ud800": torch.zeros(2)})


def test_a_full_disk_is_told_before_torch_ends_the_process(
    model: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = programs.Program(model.model(), model.schema)
    ids = [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1)]
    traced = torch.export.export(program, tuple(ids), strict=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for save in (programs.save_torch, programs.save_aoti):
        with pytest.raises(UserError, match=r"p\.pt2 takes up to .* MB, the disk has 0\.0 MB left"):
            save(traced, tmp_path / "p.pt2")
    assert list(tmp_path.iterdir()) == []


def test_lists_that_were_short_may_be_longer_in_a_program(tmp_path: Path) -> None:
    """The rows that the model is traced with hold one value at most, and there is one of them."""
    rows = 300
    columns = {"click": [k % 2 for k in range(rows)], "user": [f"u{k % 9}" for k in range(rows)]}
    columns |= {"tags": [("", "a", "b")[k % 3] for k in range(rows)], "empty": [""] * rows}
    pl.DataFrame(columns).write_csv(tmp_path / "a.csv")
    fields = "{user: categorical, tags: {kind: list}, empty: {kind: list}}"
    (tmp_path / "s.yaml").write_text(f"files: a.csv\nlabel: click\nfields: {fields}\n")
    prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True)
    run = run_of(tmp_path / "out", "model.hidden=[8]")
    exported(run, single(run, {"user": 4, "tags": 2, "empty": 2}), tmp_path / "model")
    opened = open_directory(tmp_path / "model")
    program = programs.Program(opened.model(), run.schema)

    def made(count: int, length: int) -> Ids:
        shape, sizes = (count, length), {"tags": 3, "empty": 1}
        lists = {name: Padded(torch.randint(0, size, shape), torch.ones(shape)) for name, size in sizes.items()}
        return Ids({"user": torch.randint(0, 10, (count,))}, lists, torch.zeros(count, 0))

    torch.manual_seed(0)
    traced = programs.exported(program, made(1, 1)).module()
    for ids in (made(1, 1), made(5, 4), made(2, 1)):
        inputs = program.inputs(ids)
        torch.testing.assert_close(traced(*inputs), program(*inputs))
