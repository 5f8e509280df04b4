"""Parquet with ids that another engine has made: taken over as it is, checked, and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.ids import taking
from embsearch_dist.data.ids.source import IdSource, read_id_source
from embsearch_dist.data.ids.taking import summary, take_over
from embsearch_dist.data.store.manifest import verify
from embsearch_dist.data.store.shards import Rows, Shards
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Schema
from embsearch_dist.stores.inputs import fetch_inputs
from tests.faulty_store import faulty_store

ROWS = {"train": 300, "validation": 60, "test": 50}
INT, FLOAT = pa.int32(), pa.float32()
TYPES = {
    "label": FLOAT,
    "user": INT,
    "tags": pa.list_(INT),
    "tags weights": pa.list_(FLOAT),
    "price": FLOAT,
}
SOURCE = """
name: made
label: label
fields:
  user: 40
  tags: {cardinality: 9, pooling: sum, weights: tags weights}
dense: [price]
"""
LARGE = {"label": pa.int64(), "user": pa.int64(), "tags": pa.large_list(pa.int64()), "price": pa.float64()}


def columns(split: str) -> dict[str, list]:
    """Random rows of a split; some lists are empty."""
    n = ROWS[split]
    rng = np.random.default_rng(list(SPLITS).index(split))
    lengths = rng.integers(0, 4, n)
    return {
        "label": rng.integers(0, 2, n).tolist(),
        "user": rng.integers(0, 40, n).tolist(),
        "tags": [rng.integers(0, 9, k).tolist() for k in lengths],
        "tags weights": [rng.random(k, np.float32).tolist() for k in lengths],
        "price": rng.standard_normal(n).astype(np.float32).tolist(),
    }


def write(path: Path, body: dict[str, list], **types: pa.DataType) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, (TYPES | types).get(name, pa.string())) for name in body])
    pq.write_table(pa.table(body, schema=schema), path, row_group_size=128)


def make(folder: Path, source: str = SOURCE, **types: pa.DataType) -> Path:
    """Two files of training rows and one of each other split, as Spark names them; the source file beside."""
    for split in SPLITS:
        body, cut = columns(split), 200 if split == "train" else ROWS[split]
        parts = [{k: v[:cut] for k, v in body.items()}, {k: v[cut:] for k, v in body.items()}]
        for k, part in enumerate(p for p in parts if p["user"]):
            write(folder / split / f"part-{k:05d}-3f0c.c000.snappy.parquet", part, **types)
        (folder / split / "_SUCCESS").touch()
    (folder / "ids.yaml").write_text(source)
    return folder


def take(folder: Path, out: Path, **options: bool) -> Schema:
    return take_over(lambda: [folder], out, row_group_rows=100, quiet=True, **options)


def rows_of(out: Path, split: str) -> Rows:
    shards = Shards(out, Schema.load(out), split)
    return shards.read(shards.groups)


def check_rows(out: Path) -> None:
    """What training reads is what was written."""
    for split in SPLITS:
        want, found = columns(split), rows_of(out, split)
        assert found.label.tolist() == want["label"] and found.ids[0].tolist() == want["user"]
        assert np.array_equal(found.dense[:, 0], np.array(want["price"], np.float32))
        (bags,) = found.bags
        assert bags.lengths.tolist() == [len(t) for t in want["tags"]]
        assert bags.ids.tolist() == sum(want["tags"], []) and bags.weights is not None
        assert np.array_equal(bags.weights, np.array(sum(want["tags weights"], []), np.float32))


def test_files_that_training_can_read_are_used_in_their_place(tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    schema = take(folder, tmp_path / "out")
    check_rows(tmp_path / "out")
    ours = sorted((tmp_path / "out" / "train").iterdir())
    theirs = sorted((folder / "train").glob("*.parquet"))
    assert [p.name for p in ours] == ["part-00000.parquet", "part-00001.parquet"]
    assert [p.samefile(q) for p, q in zip(ours, theirs, strict=True)] == [True, True]
    assert verify(tmp_path / "out")[0] == 4
    assert [(f.name, f.cardinality, f.weighted) for f in schema.fields] == [("user", 40, False), ("tags", 9, True)]
    lengths = [len(t) for t in columns("train")["tags"]]
    assert schema.fields[1].mean_length == pytest.approx(sum(lengths) / len(lengths), abs=1e-4)
    assert schema.rows == ROWS and "4 of 4 files are used as they are" in summary(schema)


@pytest.mark.parametrize("how", ["types", "names", "groups"])
def test_other_files_are_written_anew_with_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    source, types = SOURCE, {}
    if how == "types":
        types = LARGE
    elif how == "groups":
        monkeypatch.setattr(taking, "LARGEST_GROUP", 40)
    else:
        source = SOURCE.replace("user: 40", "person: {cardinality: 40, column: user}")
    schema = take(make(tmp_path / "made", source, **types), tmp_path / "out")
    check_rows(tmp_path / "out")
    assert "0 of 4 files are used as they are" in summary(schema)
    assert pq.read_metadata(tmp_path / "out" / "train" / "part-00000.parquet").row_group(0).num_rows == 100


def test_a_column_may_tell_the_split(tmp_path: Path) -> None:
    body: dict[str, list] = {}
    for split in SPLITS:
        for name, values in (columns(split) | {"part": [f"p-{split}"] * ROWS[split]}).items():
            body.setdefault(name, []).extend(values)
    order = np.random.default_rng(0).permutation(sum(ROWS.values()))
    inside = [np.flatnonzero(np.isin(order, np.arange(a, a + n))) for a, n in ((0, 300), (300, 60), (360, 50))]
    write(tmp_path / "made" / "all.parquet", {k: [v[i] for i in order] for k, v in body.items()})
    split = "split: {column: part, train: p-train, validation: [other, p-validation], test: p-test}"
    (tmp_path / "ids.yaml").write_text(f"{SOURCE}files: made/*.parquet\n{split}\n")
    take(tmp_path, tmp_path / "out")
    for name, rows in zip(SPLITS, inside, strict=True):
        assert rows_of(tmp_path / "out", name).ids[0].tolist() == [body["user"][order[i]] for i in rows]


def change(name: str, row: int, value: object) -> Callable[[dict[str, list]], None]:
    def work(body: dict[str, list]) -> None:
        body[name][row] = value

    return work


WRONG = [
    (change("user", 130, 40), r"'user', row 131: id 40 is not in 0 to 39. Raise the cardinality .* \(here 40\)"),
    (change("user", 3, -1), r"'user', row 4: id -1 is not in 0 to 39. Ids count from 0"),
    (change("user", 9, None), r"'user', row 10: null. .*COALESCE"),
    (change("label", 7, 2), r"'label', row 8: 2 is neither 0 nor 1"),
    (change("price", 5, float("nan")), r"'price', row 6: nan is not finite"),
    (change("tags", 8, [1, 9]), r"'tags', row 9: id 9 is not in 0 to 8"),
    (change("tags", 8, None), r"'tags', row 9: null"),
    (change("tags", 8, [None]), r"'tags', row 9: null in a list"),
    (change("tags weights", 8, [1.0] * 9), r"'tags weights', row 9: 9 weights for \d ids"),
    (lambda body: body.pop("user"), r"column 'user' is missing; the file has label, tags"),
]


@pytest.mark.parametrize(("spoil", "says"), WRONG)
def test_what_is_wrong_in_a_row_is_named(tmp_path: Path, spoil: Callable, says: str) -> None:
    folder = make(tmp_path / "made")
    body = columns("test")
    if says.startswith("'user', row 131"):
        body = {k: v * 3 for k, v in body.items()}  # beyond the first row group
    spoil(body)
    (file,) = (folder / "test").glob("*.parquet")
    write(file, body)
    with pytest.raises(UserError, match=rf"test/{file.name}: .*{says}"):
        take(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_weights_must_be_finite_and_not_negative(tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    body = columns("test")
    row = next(k for k, w in enumerate(body["tags weights"]) if w)
    body["tags weights"][row][-1] = -0.5
    (file,) = (folder / "test").glob("*.parquet")
    write(file, body)
    with pytest.raises(UserError, match=rf"'tags weights', row {row + 1}: weight -0.5"):
        take(folder, tmp_path / "out")


def test_all_files_have_one_schema_and_ids_are_whole_numbers(tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    (file,) = (folder / "test").glob("*.parquet")
    write(file, columns("test"), user=pa.int64())
    with pytest.raises(UserError, match=r"test/.*: column 'user' is int64, but int32 in .*train/.*one schema"):
        take(folder, tmp_path / "out")
    write(file, columns("test"), user=pa.float64())
    with pytest.raises(UserError, match=r"column 'user' is double, ids must be whole numbers. Cast it"):
        take(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("user: 40", "user: many", "field 'user': cardinality must be a whole number .*got 'many'"),
        ("user: 40", "user: {cardinality: 40, pool: sum}", "unknown key of field 'user': 'pool'. .*pooling"),
        ("user: 40", 'user: "\u00b2"', "field 'user': cardinality must be a whole number"),
        ("user: 40", f"user: {'9' * 5000}", "field 'user': cardinality must be a whole number"),
        ("dense: [price]", "dense: {label: price}", "ids.yaml: dense: 'label' cannot be a name: the label has it"),
        (
            "user: 40",
            "label: {cardinality: 40, column: user}",
            "fields: 'label' cannot be a name: .*`new_name: {column",
        ),
        (
            "dense: [price]",
            "dense: {tags weights: price}",
            "'tags weights' cannot be a name: the weights of 'tags' have",
        ),
        ("user: 40", "tags weights: {cardinality: 40, column: user}", "fields: 'tags weights' cannot be a name"),
        (
            "dense: [price]",
            "dense: {user: price}",
            "dense: 'user' cannot be a name: a field has it.*`new_name: column`",
        ),
        ("label: label", "labl: label", "unknown key 'labl'. .*label"),
        ("pooling: sum", "pooling: mean", "weights need `pooling: sum`"),
        ("dense: [price]", "dense: [label]", "'label' is the label and a field"),
        ("label: label", "label: label\nsplits: {train: train}", "splits must name folders or files for train, valid"),
        (
            "label: label",
            "label: label\nsplits: {train: train, validation: [test, train/part-00001*], test: test}",
            r"part-00001-3f0c.c000.snappy.parquet is in train and in validation. Remove it from one",
        ),
        ("label: label", "label: label\nfiles: train", "files needs split"),
        ("label: label", "label: label\nsplits: {train: trane, validation: x, test: y}", "trane does not exist"),
    ],
)
def test_what_is_wrong_in_the_source_file_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    folder = make(tmp_path / "made", SOURCE.replace(old, new))
    with pytest.raises(UserError, match=says):
        take(folder, tmp_path / "out")


def test_the_shipped_source_file_is_one(repo_root: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / split).mkdir()
        pq.write_table(pa.table({"x": [1]}), tmp_path / split / "part.parquet")
    (tmp_path / "ids.yaml").write_text((repo_root / "configs" / "sources" / "ids.yaml").read_text())
    source = read_id_source(tmp_path)
    assert [(f.name, f.column, f.cardinality) for f in source.fields] == [
        ("user", "user", 1_000_000),
        ("item", "item_id", 50_000),
    ]
    assert source.label == "label" and source.dense == {"price": "price"}


def test_killed_work_goes_on_with_the_files_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, done = make(tmp_path / "made", **LARGE), []
    plain = taking._take

    def take_two(directory: Path, source: IdSource, schema: Schema, job: taking.Job, rows: int) -> dict:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.file)
        return plain(directory, source, schema, job, rows)

    monkeypatch.setattr(taking, "_take", take_two)
    monkeypatch.setattr("embsearch_dist.data.prepare.progress.threads", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        take(folder, tmp_path / "out")
    first = done.copy()
    done.clear()
    take(folder, tmp_path / "out")
    check_rows(tmp_path / "out")
    assert len(done) == 2 and not set(done) & set(first)


@pytest.mark.parametrize("word", ["s3://bucket/made", "s3://bucket/made/ids.yaml", "local"])
def test_the_files_may_lie_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    faulty_store(tmp_path, monkeypatch)
    make(tmp_path / "bucket" / "made")
    if word == "local":
        word = str(tmp_path / "own.yaml")
        splits = ", ".join(f"{split}: 's3://bucket/made/{split}/*.parquet'" for split in SPLITS)
        Path(word).write_text(f"{SOURCE}splits: {{{splits}}}\n")
    take_over(lambda: fetch_inputs("ids", [word]), tmp_path / "out", row_group_rows=100, quiet=True)
    check_rows(tmp_path / "out")


def test_a_model_of_given_ids_answers_rows_with_ids_and_refuses_values(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    import polars as pl
    import torch

    from embsearch_dist.serving.export import summary as told_of_export
    from embsearch_dist.serving.predict import Job, predict
    from tests.served import exported, run_of, single

    take(make(tmp_path / "made"), tmp_path / "out")
    run = run_of(tmp_path / "out")
    found = single(run, {"user": 4, "tags": 2})
    body = exported(run, found, tmp_path / "model")
    assert "rows to predict need the ids of the engine" in told_of_export(body, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "## Rows with ids" in card and "| user | user | id | 0 to 39 |" in card
    rows = pl.DataFrame({k: v for k, v in columns("test").items() if k != "label"})
    rows.write_parquet(tmp_path / "rows.parquet")
    predict(Job(tmp_path / "model", tmp_path / "rows.parquet", tmp_path / "scores.parquet"))
    stream = run.stream("test", 64, shuffle=False)
    want = torch.cat([found.predict(batch) for batch in stream.epoch(0)])
    assert torch.allclose(pl.read_parquet(tmp_path / "scores.parquet")["logit"].to_torch(), want.float(), atol=1e-6)
    for value in ("u7", "40"):
        rows.with_columns(user=pl.lit(value)).write_parquet(tmp_path / "odd.parquet")
        with pytest.raises(UserError, match=rf"field 'user': '{value}' is not in 0 to 39: .*Give rows with its ids"):
            predict(Job(tmp_path / "model", tmp_path / "odd.parquet", tmp_path / "none.parquet"))
