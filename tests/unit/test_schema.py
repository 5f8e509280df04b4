"""The schema: what it accepts, how it travels through its file, and when two data sets count as equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json
from embsearch_dist.schema import Field, Schema


def schema(**changes: object) -> Schema:
    body = {"dataset": "shop", "fields": (Field("user", 10), Field("item", 7)), "dense": ("price",)} | changes
    return Schema(**body)  # type: ignore[arg-type]


def test_a_saved_schema_comes_back_equal(tmp_path: Path) -> None:
    original = schema(rows={"train": 8, "validation": 1, "test": 1}, provenance={"format": "table", "files": ["a.csv"]})
    original.save(tmp_path)
    assert Schema.load(tmp_path) == original
    assert [p.name for p in tmp_path.iterdir()] == ["schema.json"]  # no temporary file stays behind


def test_names_and_cardinalities_keep_the_given_order() -> None:
    assert schema().names == ["user", "item"]
    assert schema().cardinalities == [10, 7]


def test_the_fingerprint_covers_what_tables_depend_on_and_nothing_else() -> None:
    one = schema().fingerprint
    assert schema(dataset="other", rows={"train": 5}, provenance={"a": 1}).fingerprint == one
    assert schema(fields=(Field("user", 11), Field("item", 7))).fingerprint != one
    assert schema(fields=(Field("item", 7), Field("user", 10))).fingerprint != one
    assert schema(dense=()).fingerprint != one


def test_lists_come_back_from_the_file_and_change_the_fingerprint(tmp_path: Path) -> None:
    user, item = Field("user", 10), Field("item", 7)
    kinds = [item, Field("item", 7, "sum"), Field("item", 7, "mean"), Field("item", 7, "sum", weighted=True)]
    assert len({schema(fields=(user, kind)).fingerprint for kind in kinds}) == 4
    longer = Field("item", 7, "sum", mean_length=3.5)
    assert schema(fields=(user, longer)).fingerprint == schema(fields=(user, kinds[1])).fingerprint
    original = schema(fields=(user, Field("item", 7, "sum", True, 2.25)))
    original.save(tmp_path)
    assert Schema.load(tmp_path) == original


def test_a_schema_without_lists_is_written_and_hashed_as_before_there_were_any(tmp_path: Path) -> None:
    assert schema().fingerprint == "2b2884a7424a4cf2"
    schema().save(tmp_path)
    fields = json.loads((tmp_path / "schema.json").read_text())["fields"]
    assert fields == [{"name": "user", "cardinality": 10}, {"name": "item", "cardinality": 7}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("max",), "pooling 'max' is none of sum, mean"),
        (("mean", True), "weights need pooling sum, not 'mean'"),
        (("", True), "weights need pooling sum"),
    ],
)
def test_an_impossible_list_is_refused_by_name(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=f"'user': {message}"):
        Field("user", 10, *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": (Field("user", 3), Field("user", 4))}, "'user' is named twice"),
        ({"dense": ("user",)}, "'user' is named twice"),
        ({"fields": ()}, "no categorical field"),
    ],
)
def test_an_impossible_schema_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schema(**changes)


def test_a_field_without_values_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'user'.*at least 1, got 0"):
        Field("user", 0)


def test_a_directory_without_schema_is_refused_and_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schema.json is missing.*launch/prepare.py"):
        Schema.load(tmp_path / "nothing")


@pytest.mark.parametrize("missing", ["fields", "dense", "rows", "dataset"])
def test_a_schema_file_without_a_key_is_refused(tmp_path: Path, missing: str) -> None:
    schema().save(tmp_path)
    body = json.loads((tmp_path / "schema.json").read_text())
    del body[missing], body["sha256"]
    (tmp_path / "schema.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=f"schema.json.*{missing}"):
        Schema.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "line 1: not valid JSON"), ("[1]", "expected a JSON object, found list")]
)
def test_a_broken_json_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        read_json(tmp_path / "a.json")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"value": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"value": {1, 2}})
    assert read_json(tmp_path / "a.json") == {"value": 1}


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"value": [float("nan"), {"more": float("inf")}, 0.5]})
    assert read_json(tmp_path / "a.json") == {"value": [None, {"more": None}, 0.5]}
