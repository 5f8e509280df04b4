"""Data of one's own: what a source must be, its rows as batches, and searches and trainings from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

import embsearch_dist as es
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.sources import split as module
from embsearch_dist.data.sources.registry import schema_of
from embsearch_dist.data.sources.split import SourceSplit, rows_of
from embsearch_dist.errors import UserError
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.trial import merged
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.warm.ids import Data, check_values, id_map
from tests.method_contract import records, weights

ROWS = {"train": 900, "validation": 200, "test": 200}


class Clicks:
    """A source of one's own: rows come from a function of their number, as from a store that is asked for them."""

    schema = es.Schema("clicks", (es.Field("user", 40), es.Field("item", 12)), ("price",))

    def __init__(self, version: str = "monday") -> None:
        self.fingerprint = version

    def rows(self, split: str) -> int:
        return ROWS[split]

    def read(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        row = np.arange(start, stop) + 1000 * list(ROWS).index(split)
        user, item = row * 7919 % 40, row * 104729 % 12
        label = (user + item + len(self.fingerprint)) % 3 == 0
        return {"user": user, "item": item, "price": np.sin(row), "label": label}


def settings(method: str) -> dict[str, object]:
    sections = merged(METHODS[method].trial)
    return {f"{section}.{key}": value for section, body in sections.items() for key, value in body.items()} | {
        "run.device": "cpu",
        "run.threads": 1,
    }


def frame(rows: int = 300, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(0, 30, rows),
        "x": rng.standard_normal(rows),
        "clicked": rng.integers(0, 2, rows),
    }


def splits(**changes: Any) -> dict[str, Any]:
    return {"train": frame(300, 0), "validation": frame(100, 1), "test": frame(100, 2)} | changes


def source(**changes: Any) -> es.ArraySource:
    return es.ArraySource(["user"], splits(**changes), dense=["x"], label="clicked")


def test_a_search_a_retraining_and_an_evaluation_from_a_source_of_ones_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = es.search(run_dir=run, data=Clicks(), method="utilities", settings=settings("utilities"))
    assert isinstance(found, es.Allocation) and set(found.widths) == {"user", "item"}
    (name, figures), *_ = es.retrain(run, data=Clicks()).items()
    assert es.evaluate(run / "retrain" / name, data=Clicks())["auc"] == figures["auc"]
    with pytest.raises(UserError, match="made from data .*, data source 'given' is .*: the same fields"):
        es.search(run / "config.yaml", run_dir=run, data=Clicks("tuesday"))
    with pytest.raises(UserError, match="handed over by a program"):
        es.retrain(run)


def test_a_search_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source has no state: the place in the data is the checkpoint's."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    own = settings("adass") | {"search.budget": "60%", "search.supernet.save_every": 4}
    es.search(run_dir=whole, data=Clicks(), method="adass", settings=own)
    monkeypatch.setenv(VARIABLE, "raise step=5 stage=supernet")
    with pytest.raises(RuntimeError, match=VARIABLE):
        es.search(run_dir=parts, data=Clicks(), method="adass", settings=own)
    monkeypatch.delenv(VARIABLE)
    assert list(parts.glob("checkpoints/supernet/step-*")) and not (parts / "allocation.json").exists()
    es.search(run_dir=parts, data=Clicks(), method="adass", settings=own)
    assert records(parts) == records(whole) and weights(parts) == weights(whole)
    assert weights(whole)


def test_batches_hold_every_row_once_in_an_order_of_seed_and_epoch_for_any_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 128)
    own = Clicks()
    schema = schema_of(own)

    def batches(rank: int, ranks: int, start: int = 0, epoch: int = 0) -> list[torch.Tensor]:
        of = SourceSplit(own, schema, "train")
        made = BatchStream(of, schema, "train", 100, rank, ranks, seed=3, window_rows=300)
        return [batch.dense[:, 0] for batch in made.epoch(epoch, start)]

    whole = batches(0, 1)
    assert sorted(torch.cat(whole).tolist()) == sorted(np.sin(np.arange(900)).astype(np.float32).tolist())
    for a, b, both in zip(batches(0, 2), batches(1, 2), whole, strict=True):
        assert torch.equal(torch.cat([a, b]), both)
    assert all(torch.equal(a, b) for a, b in zip(batches(0, 1, start=4), whole[4:], strict=True))
    assert not torch.equal(batches(0, 1, epoch=1)[0], whole[0])


@pytest.mark.parametrize("kind", [pl.DataFrame, lambda t: pl.DataFrame(t).to_arrow(), lambda t: iter([t]), "halves"])
def test_any_table_is_the_same_source(kind: Any) -> None:
    halves = [{k: v[:120] for k, v in frame().items()}, {k: v[120:] for k, v in frame().items()}]
    given = halves if kind == "halves" else kind(frame())
    own = source(train=given)
    assert own.fingerprint == source().fingerprint and own.schema.cardinalities == [30]
    (batch,) = es.open_data(own).batches("train", batch_size=300)
    assert batch.sparse["user"].values().tolist() == frame()["user"].tolist()
    np.testing.assert_array_equal(batch.label.numpy(), frame()["clicked"])


def test_raw_values_get_ids_by_the_training_rows_alone() -> None:
    train = {"city": ["b", "a", "b", None, "c"], "tags": [["x"], [], ["y", "x"], None, ["z"]]}
    train["p"] = [1.0, 3.0, None, 2.0, 2.0]
    later = {"city": ["a", "new"], "tags": [["x", "new"], ["z"]], "p": [2.0, None]}
    body = {"train": {**train, "label": [0, 1, 0, 1, 0]}, "validation": {**later, "label": [0, 1]}}
    own = es.ArraySource(["city", "tags"], {**body, "test": body["validation"]}, dense=["p"], raw=True)
    assert own.vocabulary["city"].to_list() == ["b", "a", "c"] and own.schema.cardinalities == [4, 4]
    assert own.schema.fields[1] == Field("tags", 4, "mean")
    (batch,) = es.open_data(own).batches("train")
    assert batch.sparse["city"].values().tolist() == [1, 2, 1, 0, 3]
    assert batch.sparse["tags"].lengths().tolist() == [1, 0, 2, 0, 1]
    assert batch.dense[:, 0].tolist() == pytest.approx([-(2**0.5), 2**0.5, 0, 0, 0])
    (batch,) = es.open_data(own).batches("test")
    assert batch.sparse["city"].values().tolist() == [2, 0]
    assert batch.sparse["tags"].values().tolist() == [1, 0, 3] and batch.dense[:, 0].tolist() == [0, 0]
    assert own.encode({"city": ["c"], "tags": [["y"]], "p": [3.0]})["city"].to_list() == [3]
    common = es.ArraySource(["city", "tags"], {**body, "test": body["train"]}, raw=True, min_count=2)
    assert common.schema.cardinalities == [2, 2]


def test_categories_lists_of_one_length_and_columns_of_gaps_are_raw_values_too() -> None:
    rows = pl.DataFrame(
        {
            "kind": pl.Series(["b", "a", "b"], dtype=pl.Categorical),
            "gap": pl.Series([None, None, None], dtype=pl.String),
            "pair": pl.Series(np.array([[7, 8], [8, 8], [9, 7]])),
            "label": [0, 1, 0],
        }
    )
    own = es.ArraySource(["kind", "gap", "pair"], {"train": rows, "validation": rows, "test": rows}, raw=True)
    (batch,) = es.open_data(own).batches("train")
    ids = {n: batch.sparse[n].values().tolist() for n in own.schema.names}
    assert ids == {"kind": [1, 2, 1], "gap": [0, 0, 0], "pair": [2, 1, 1, 1, 3, 2]}


def raw_source(values: list[Any], vocabulary: es.ArraySource | None = None, **more: Any) -> es.ArraySource:
    rows = {"user": values, "x": [float(i) for i in range(len(values))], "label": [i % 2 for i in range(len(values))]}
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    return es.ArraySource(["user"], splits, dense=["x"], raw=True, vocabulary=vocabulary, **more)


def known(source: es.ArraySource) -> Data:
    return Data(Path(), schema_of(source))


def test_a_later_source_keeps_the_ids_and_scales_of_an_earlier_one() -> None:
    monday = raw_source(["ann"] * 3 + ["bob"] * 2 + ["cid"])
    tuesday = raw_source(["eve", "cid", "dan", "dan"], monday)
    assert tuesday.vocabulary["user"].to_list() == ["ann", "bob", "cid", "dan", "eve"]
    assert tuesday.encode({"user": ["cid"], "x": [0.0]}).row(0) == monday.encode({"user": ["cid"], "x": [0.0]}).row(0)
    wednesday = raw_source(["dan", "fay", "fay"], tuesday, min_count=2)
    assert wednesday.vocabulary["user"].to_list() == ["ann", "bob", "cid", "dan", "eve", "fay"]
    for earlier in (monday, tuesday):
        check_values(known(earlier), known(wednesday))
    assert id_map(known(monday), known(wednesday), "user").rows.tolist() == [0, 1, 2, 3, -1, -1, -1]
    numbers = raw_source([3, 3, 5])
    assert raw_source([7, 5], numbers).vocabulary["user"].to_list() == [3, 5, 7]
    with pytest.raises(es.UserError, match="field 'user' holds String, the earlier source has Int64"):
        raw_source(["a"], numbers)
    with pytest.raises(es.UserError, match="has fields user and dense columns x, this one user and none"):
        es.ArraySource(["user"], splits(), label="clicked", raw=True, vocabulary=monday)
    with pytest.raises(es.UserError, match="vocabulary belongs to raw=True"):
        es.ArraySource(["user"], splits(), label="clicked", vocabulary=source())


def test_ids_of_two_vocabularies_are_not_taken_for_the_same() -> None:
    """The same three names in another order by their counts: id 1 is ann on Monday and cid on Tuesday."""
    monday, tuesday = (raw_source(names) for names in (["ann", "ann", "bob", "cid"], ["cid", "cid", "bob", "ann"]))
    with pytest.raises(es.UserError, match="one id is one value .* vocabulary=EARLIER"):
        check_values(known(monday), known(tuesday))
    with pytest.raises(es.UserError, match="vocabulary=EARLIER"):
        check_values(known(source()), known(tuesday))
    same = raw_source(["bob", "cid", "ann", "ann"])  # other rows, the same ids and scale
    check_values(known(monday), known(same))
    assert id_map(known(monday), known(same), "user").same


def test_another_row_is_another_fingerprint() -> None:
    narrow = {**frame(), "user": frame()["user"].astype(np.uint8)}
    assert source(train=narrow).fingerprint == source().fingerprint
    changed = frame()
    changed["user"] = changed["user"].copy()
    changed["user"][5] += 1
    assert len({source().fingerprint, source(train=changed).fingerprint, source(test=frame(100, 3)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": {"user": [1], "x": [0.5]}}, "split 'test': column 'clicked' is missing"),
        ({"test": 7}, "split 'test': int is no table"),
        ({"train": {**frame(2), "user": ["a", "b"]}}, "must hold ids, whole numbers, got String. Give raw=True"),
        ({"train": {**frame(2), "x": ["a", "b"]}}, "does not hold numbers"),
    ],
)
def test_tables_that_are_no_source(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        source(**changes)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ({"user": [0, 40]}, "field 'user' has 1 ids outside 0..39, the first is 40"),
        ({"user": [0.0, 1.0]}, "field 'user' must hold whole numbers without gaps, got float64"),
        ({"user": [1]}, r"column 'user' has the shape \[1\], 2 rows were asked for"),
        ({"label": [0, 2]}, "1 labels are neither 0 nor 1, the first is 2"),
        ({"price": [0.5, float("nan")]}, "column 'price' has missing values"),
        ({"tags": [[1], None]}, "column 'tags' must hold 2 lists, got 1"),
        ({"tags": [1, 2]}, "column 'tags' does not hold a list a row"),
        ({"tags weights": [[0.5], [1.0]]}, "'tags weights' has not one finite weight for each id"),
    ],
)
def test_rows_that_a_source_must_not_give(column: dict[str, Any], says: str) -> None:
    fields = (Field("user", 40), Field("tags", 5, "sum", weighted=True))
    good = {"user": [1, 2], "price": [0.5, 1], "label": [0, 1], "tags": [[1, 2], []], "tags weights": [[0.5, 2], []]}
    schema = Schema("clicks", fields, ("price",))
    rows = rows_of(schema, pa.table(good), 2, "here")
    assert rows.bags[0].ids.tolist() == [1, 2] and rows.bags[0].offsets.tolist() == [0, 2, 2]
    with pytest.raises(UserError, match=f"here: .*{says}"):
        rows_of(schema, good | column, 2, "here")
    del good["price"]
    with pytest.raises(UserError, match="here: column 'price' is missing"):
        rows_of(schema, pl.DataFrame(good), 2, "here")


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DataFrame is no data source: it lacks fingerprint, read"):
        es.open_data(pl.DataFrame(frame()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fingerprint must be a text"):
        es.open_data(Clicks(""))
    with pytest.raises(UserError, match="cannot be called 'given'"):
        es.register_source("given")
    with pytest.raises(UserError, match="iHAS writes the rows of each group"):
        es.search(run_dir=tmp_path / "run", data=Clicks(), method="ihas", settings=settings("ihas"))


SCRIPT = """
import embsearch_dist as es
from tests.unit.test_sources import Clicks
es.register_source("clicks")(Clicks)
"""


def test_scripts_find_a_source_by_its_name_and_export_what_was_trained_on_it(
    tmp_path: Path, run_script: Callable[..., object]
) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    own = settings("random") | {"data.source": "clicks", "data.module": tmp_path / "mine.py"}
    found = es.search(run_dir=tmp_path / "run", method="random", settings=own)
    assert isinstance(found, es.Allocation) and found.schema.data == schema_of(Clicks()).data
    es.retrain(tmp_path / "run", "ues-4", settings={"train.epochs": 1})
    run_script("export.py", "--run", tmp_path / "run/retrain/ues-4", "--out", tmp_path / "exported")
    rows = Clicks().read("test", 0, 50)
    probabilities = es.load_model(tmp_path / "exported").predict({k: rows[k] for k in ("user", "item", "price")})
    assert probabilities.shape == (50,) and 0 < probabilities.min() < probabilities.max() < 1


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    es.register_source("clicks")(Clicks)
    for body, says in (
        ({"data.source": "click"}, "'click' is not registered .did you mean 'clicks'"),
        ({"data.source": "new", "data.module": "nowhere.py"}, "nowhere.py cannot be read"),
        ({"data.source": "new", "data.module": "no_such_module"}, "no_such_module cannot be imported"),
        ({"data.source": "clicks", "data.skip_unreadable": 1}, "is for files, not for data.source"),
    ):
        with pytest.raises(UserError, match=says):
            es.search(run_dir=tmp_path / "run", method="random", settings=body | {"run.device": "cpu"})
