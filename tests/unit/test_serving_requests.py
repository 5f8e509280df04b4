"""The server: rows in, probabilities out, and one clear line for whatever is no row."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from starlette.testclient import TestClient

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.serving.directory import ModelDirectory, open_directory
from embsearch_dist.serving.predict import Job, predict, probabilities_of
from embsearch_dist.serving.requests import BadRequest, rows_of
from embsearch_dist.serving.server import Limits, application
from tests.raw_lists import make_lists
from tests.served import exported, run_of, single

LIMITS = Limits(body_bytes=20_000, rows=50)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """A model of lists, a categorical and a dense column; its raw rows lie beside it."""
    folder = tmp_path_factory.mktemp("served")
    source, _ = make_lists(folder / "raw", rows=1500)
    prepare("table", source, folder / "out", min_count=2, quiet=True)
    run = run_of(folder / "out")
    exported(run, single(run, {"user": 2, "tags": 4, "likes": 8, "big": 2}), folder / "model")
    return open_directory(folder / "model")


@pytest.fixture(scope="module")
def client(model: ModelDirectory) -> Iterator[TestClient]:
    with TestClient(application(model, LIMITS), raise_server_exceptions=False) as found:
        yield found


def raw_rows(model: ModelDirectory, n: int) -> list[dict[str, Any]]:
    frame = pl.read_csv(model.path.parent / "raw" / "clicks.csv", infer_schema=False).head(n)
    return frame.drop("click").to_dicts()


def ask(client: TestClient, rows: Any) -> Any:
    return client.post("/predict", json={"rows": rows})


def test_answers_are_those_of_batch_prediction(client: TestClient, model: ModelDirectory, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    predict(Job(model.path, model.path.parent / "raw" / "clicks.csv", out))
    wanted = pl.read_parquet(out)["probability"].to_list()
    rows = raw_rows(model, 50)
    answer = ask(client, rows)
    assert answer.status_code == 200 and answer.json()["probabilities"] == wanted[:50]
    alone = [ask(client, [row]).json()["probabilities"][0] for row in rows[:5]]
    assert alone == wanted[:5]


def test_values_may_come_as_json_has_them(client: TestClient, model: ModelDirectory) -> None:
    row = raw_rows(model, 1)[0] | {"tags": "t0|t3", "likes": "a:0.5|b:2", "big": "b1 b2", "x": "0.25"}
    same = row | {"tags": ["t0", "t3"], "likes": ["a:0.5", "b:2"], "big": ["b1", "b2"], "x": 0.25, "more": [1]}
    blank = row | {"tags": "", "likes": "", "big": "", "x": "", "user": ""}
    null = dict.fromkeys(row) | {"tags": []}
    first, other = ask(client, [row, blank]).json(), [ask(client, [r]).json() for r in (same, null)]
    assert first["probabilities"] == [o["probabilities"][0] for o in other]
    assert ask(client, [row | {"user": "nobody", "tags": ["nothing", "t0"]}]).json()["unseen"] == {"user": 1, "tags": 1}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "is not JSON"),
        (b"\xff\xfe", 400, "is not UTF-8"),
        (b"[" * 5000, 400, "is not JSON"),
        (b'{"rows": [{"x": NaN}]}', 400, "NaN is no JSON number"),
        (b'{"rows": [{"x": 1, "x": 2}]}', 400, "'x' is there twice"),
        (b'{"rows": []}', 400, "rows is empty"),
        (b'{"rows": {}}', 400, "the body must be"),
        (b'{"rows": [1]}', 400, "row 0 is no object"),
        (b'{"rows": [{}], "row": 1}', 400, "unknown key 'row'"),
        (b'{"rows": [{}]}', 400, "row 0 lacks column 'user'"),
        (b" " * 20_001, 413, "at most 20,000"),
        (b'{"rows": [' + b",".join([b"{}"] * 51) + b"]}", 413, "51 rows are more than 50"),
    ],
)
def test_a_wrong_body_is_told_in_one_line(client: TestClient, body: bytes, status: int, said: str) -> None:
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and said in answer.json()["error"]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("x", "much", "not a finite number: 'much'"),
        ("x", 1e999, "is not JSON"),
        ("x", int("9" * 400), "a number is too large"),
        ("x", [1], "takes a text, a number or null"),
        ("user", {"a": 1}, "takes a text, a number or null"),
        ("tags", 3, "a list of values"),
        ("tags", [["a"]], "a value of a list is"),
        ("likes", ["a:-1"], "from 0 on"),
        ("likes", ["a"], "Write one for each value"),
    ],
)
def test_a_wrong_value_is_told_with_its_column(
    client: TestClient, model: ModelDirectory, column: str, value: Any, said: str
) -> None:
    rows = raw_rows(model, 2)
    rows[1][column] = value
    rows[0][column] = None
    answer = client.post("/predict", content=json.dumps({"rows": rows}))
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_a_key_that_is_there_twice_among_very_many_is_found_at_once() -> None:
    keys = ",".join(f'"{k:x}":0' for k in range(60_000))
    started = time.process_time()
    with pytest.raises(BadRequest, match="key 'ea5f' is there twice"):
        rows_of(f'{{"rows": [{{{keys},"ea5f":0}}]}}'.encode(), 1)
    assert time.process_time() - started < 5  # to compare each with each takes minutes


def test_the_probability_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    logits = torch.linspace(-6, 6, 40_000)
    wanted = probabilities_of(logits)
    assert torch.equal(wanted[:64], torch.sigmoid(logits[:64]))
    for at in (0, 7, 12_345, 39_999):
        assert torch.equal(probabilities_of(logits[at:]), wanted[at:])
        assert torch.equal(probabilities_of(logits[at : at + 1]), wanted[at : at + 1])
    assert torch.equal(torch.cat([probabilities_of(part) for part in logits.split(3)]), wanted)
    assert len(probabilities_of(logits[:0])) == 0


def test_other_paths_and_kinds_of_content_are_refused(client: TestClient) -> None:
    assert client.get("/predict").status_code == 405 and client.get("/nowhere").status_code == 404
    assert "there are /predict" in client.get("/nowhere").json()["error"]
    said = client.post("/predict", content=b"a=1", headers={"content-type": "text/csv"})
    assert said.status_code == 415 and "application/json" in said.json()["error"]


def test_health_model_and_metrics(client: TestClient, model: ModelDirectory) -> None:
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    assert client.get("/model").json()["columns"]["likes"] == "list"
    before = counted(client)
    assert ask(client, raw_rows(model, 3)).status_code == 200 and ask(client, []).status_code == 400
    after = counted(client)
    gained = {key: after[key] - before.get(key, 0) for key in after}
    assert gained["embsearch_rows_total"] == gained["embsearch_batched_rows_total"] == 3
    assert gained['embsearch_requests_total{status="200"}'] == gained['embsearch_requests_total{status="400"}'] == 1
    assert gained["embsearch_request_seconds_count"] == 1


def counted(client: TestClient) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def mangled(body: bytes, rng: np.random.Generator) -> bytes:
    """A body that is no longer right: cut, with other bytes, or with other JSON in a place."""
    how = rng.integers(4)
    if how == 0:
        return body[: rng.integers(len(body) - 1)]
    if how == 1:
        found = bytearray(body)
        for place in rng.integers(len(found), size=rng.integers(1, 9)):
            found[place] = rng.integers(256)
        return bytes(found)
    if how == 2:
        return rng.bytes(rng.integers(0, 300))
    rows = json.loads(body)["rows"]
    odd: list[Any] = [[], {}, [[[]]], {"a": {}}, "\ud800", -1, 10**30, 1e300, "", "\x00", True, [None, 1, {}]]
    rows[rng.integers(len(rows))][str(rng.choice(list(rows[0])))] = odd[rng.integers(len(odd))]
    return json.dumps({"rows": rows}).encode()


def test_malformed_bodies_get_nothing_but_clear_errors(client: TestClient, model: ModelDirectory) -> None:
    rng, body = np.random.default_rng(0), json.dumps({"rows": raw_rows(model, 3)}).encode()
    refused = 0
    for _ in range(150):
        wrong = mangled(body, rng)
        answer = client.post("/predict", content=wrong)
        if answer.status_code == 200:  # a changed value may be a value
            found = answer.json()["probabilities"]
            assert len(found) == len(json.loads(wrong)["rows"]) and all(0 <= p <= 1 for p in found)
            continue
        refused += 1
        assert 400 <= answer.status_code < 500, wrong
        error = answer.json()["error"]
        assert error and "\n" not in error and len(error) < 500, wrong
    assert refused > 75
    assert ask(client, raw_rows(model, 1)).status_code == 200


def test_requests_that_wait_are_predicted_together(model: ModelDirectory) -> None:
    import asyncio

    from embsearch_dist.serving.batching import Batcher, Overloaded
    from embsearch_dist.serving.requests import RequestEncoder

    encoder, sizes = RequestEncoder(model), []
    parts = [encoder(raw_rows(model, n)).ids for n in (3, 1, 5, 2)]
    made = model.model()
    with torch.no_grad():
        wanted = [made(ids) for ids in parts]

    async def all_at_once() -> list[Any]:
        batcher = Batcher(lambda ids: made(ids), max_rows=8, max_waiting=11, seen=sizes.append)
        asks = [asyncio.ensure_future(batcher(ids)) for ids in parts]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher(parts[1])
        batcher.start()
        found = await asyncio.gather(*asks)
        await batcher.stop()
        return found

    with torch.no_grad():
        found = asyncio.run(all_at_once())
    assert sizes == [4, 7]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_batch_that_fails_fails_alone(model: ModelDirectory) -> None:
    import asyncio

    from embsearch_dist.serving.batching import Batcher
    from embsearch_dist.serving.requests import RequestEncoder

    ids = RequestEncoder(model)(raw_rows(model, 1)).ids
    answers: list[Any] = [RuntimeError("no"), torch.zeros(1)]

    def next_answer(_: Any) -> torch.Tensor:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def twice() -> Any:
        batcher = Batcher(next_answer, max_rows=1, max_waiting=9)
        batcher.start()
        with pytest.raises(RuntimeError):
            await batcher(ids)
        found = await batcher(ids)
        await batcher.stop()
        return found

    assert asyncio.run(twice()).tolist() == [0.0]


def test_a_batch_that_cannot_be_joined_fails_alone(model: ModelDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from embsearch_dist.serving import batching
    from embsearch_dist.serving.requests import RequestEncoder

    ids = RequestEncoder(model)(raw_rows(model, 1)).ids

    def no_memory(parts: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("not enough memory")

    async def twice() -> Any:
        monkeypatch.setattr(batching, "joined", no_memory)
        batcher = batching.Batcher(lambda ids: torch.zeros(ids.rows), max_rows=1, max_waiting=9)
        batcher.start()
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(batcher(ids), 10)
        found = await asyncio.wait_for(batcher(ids), 10)
        await batcher.stop()
        return found

    assert asyncio.run(twice()).tolist() == [0.0]


def test_a_request_of_more_rows_than_may_wait_is_answered_when_none_waits(model: ModelDirectory) -> None:
    import asyncio

    from embsearch_dist.serving.batching import Batcher, Overloaded
    from embsearch_dist.serving.requests import RequestEncoder

    ids = RequestEncoder(model)(raw_rows(model, 5)).ids

    async def both() -> Any:
        batcher = Batcher(lambda ids: torch.zeros(ids.rows), max_rows=2, max_waiting=4)
        first = asyncio.ensure_future(batcher(ids))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher(ids)
        batcher.start()
        found = await first
        await batcher.stop()
        return found

    assert len(asyncio.run(both())) == 5


def test_a_column_of_two_fields_is_read_for_each_in_its_way(tmp_path: Path) -> None:
    columns = {"click": [k % 2 for k in range(300)], "n": [("", "7", "8|9", "7|8")[k % 4] for k in range(300)]}
    pl.DataFrame(columns).write_csv(tmp_path / "a.csv")
    # The model sees them in both orders: which field is the last does not matter.
    fields = "{before: {column: n, kind: list}, one: {column: n}, behind: {column: n, kind: list, pooling: mean}}"
    (tmp_path / "s.yaml").write_text(f"files: a.csv\nlabel: click\nfields: {fields}\n")
    prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True)
    run = run_of(tmp_path / "out")
    exported(run, single(run, {"before": 4, "one": 2, "behind": 2}), tmp_path / "model")
    pl.DataFrame({"n": ["", "7", "8|9"]}).write_csv(tmp_path / "rows.csv")
    found = open_directory(tmp_path / "model")
    predict(Job(found.path, tmp_path / "rows.csv", tmp_path / "scores.parquet"))
    wanted = pl.read_parquet(tmp_path / "scores.parquet")["probability"].to_list()
    with TestClient(application(found, LIMITS), raise_server_exceptions=False) as client:
        assert client.get("/model").json()["columns"] == {"n": "categorical"}
        assert ask(client, [{"n": None}, {"n": 7}, {"n": "8|9"}]).json()["probabilities"] == wanted
        assert ask(client, [{"n": None}]).json()["probabilities"] == wanted[:1]
        assert ask(client, [{"n": 7.0}]).json()["probabilities"] == wanted[1:2]
        said = ask(client, [{"n": ["7"]}])
        assert said.status_code == 400 and "column 'n': a categorical column takes a text" in said.json()["error"]
