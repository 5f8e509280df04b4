"""Allocations: sizes counted by hand, the file, and allocations that do not fit the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation, cost, physical_width
from embsearch_dist.errors import UserError
from embsearch_dist.precision import SERVED
from embsearch_dist.schema import Field, Schema
from tests.factories import small_schema

SCHEMA = small_schema(100, 10, 5)


def allocation(*widths: int, schema: Schema = SCHEMA) -> Allocation:
    return Allocation(schema, dict(zip(schema.names, widths, strict=True)), {"method": "test", "seed": 3})


@pytest.mark.parametrize(("width", "physical"), [(0, 0), (1, 4), (2, 4), (4, 4), (5, 8), (32, 32), (33, 36)])
def test_the_physical_width_is_the_next_multiple_of_four(width: int, physical: int) -> None:
    assert physical_width(width) == physical


def test_sizes_agree_with_a_count_by_hand() -> None:
    a = allocation(2, 8, 0)
    assert a.total("widths") == 10
    assert a.total("parameters") == 100 * 2 + 10 * 8
    assert a.total("bytes") == 4 * (100 * 4 + 10 * 8)  # width 2 lives in four columns
    assert a.kept == ["f0", "f1"]


def test_reduction_is_measured_against_width_32() -> None:
    assert allocation(32, 32, 32).reduction() == 0
    assert allocation(16, 16, 16).reduction() == 0.5
    assert allocation(2, 8, 0).reduction() == pytest.approx(1 - 280 / (32 * 115))
    assert allocation(2, 8, 0).reduction(16) == pytest.approx(1 - 280 / (16 * 115))


def test_an_unknown_resource_is_refused() -> None:
    with pytest.raises(UserError, match="'flops' is none of widths, parameters, bytes"):
        cost("flops", 10, 4)


def test_a_saved_allocation_comes_back_equal(tmp_path: Path) -> None:
    a = allocation(2, 0, 16)
    a.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json", SCHEMA) == a


def test_the_file_shows_widths_in_schema_order_and_sizes(tmp_path: Path) -> None:
    Allocation(SCHEMA, {"f2": 4, "f0": 2, "f1": 8}).save(tmp_path / "a.json")
    body = json.loads((tmp_path / "a.json").read_text())
    assert list(body["widths"].items()) == [("f0", 2), ("f1", 8), ("f2", 4)]
    served = {"served_fp32": 16 * 100 + 32 * 10 + 16 * 5, **dict.fromkeys(SERVED[1:], 16 * 115)}
    share = round(1 - 300 / 3680, 4)
    assert body["sizes"] == {"widths": 14, "parameters": 300, "bytes": 4 * 500, **served, "P-R": share}


def test_uniform_gives_every_field_the_same_width() -> None:
    assert Allocation.uniform(SCHEMA, 8).widths == {"f0": 8, "f1": 8, "f2": 8}


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"f0": 2, "f1": 2}, "lacks a width for field 'f2'"),
        ({"f0": 2, "f1": 2, "f2": 2, "zz": 2}, "names field 'zz'"),
        ({"f0": 2, "f1": -1, "f2": 2}, "'f1'.*whole number >= 0, got -1"),
        ({"f0": 2, "f1": 2.5, "f2": 2}, "'f1'.*got 2.5"),
        ({"f0": 2, "f1": True, "f2": 2}, "'f1'.*got True"),
        ({"f0": 0, "f1": 0, "f2": 0}, "drops every field"),
    ],
)
def test_impossible_widths_are_refused_by_field(widths: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Allocation(SCHEMA, widths)


def test_an_allocation_of_other_fields_is_refused_and_names_one(tmp_path: Path) -> None:
    allocation(2, 4, 8).save(tmp_path / "a.json")
    other = Schema("other", (Field("f0", 100), Field("f1", 10), Field("shop", 5)), ("x0",))
    with pytest.raises(UserError, match="made for data set 'small'.*not for 'other'.*field 'f2' is in only one"):
        Allocation.load(tmp_path / "a.json", other)


def test_an_allocation_of_other_cardinalities_is_refused(tmp_path: Path) -> None:
    allocation(2, 4, 8).save(tmp_path / "a.json")
    with pytest.raises(UserError, match="the cardinalities differ"):
        Allocation.load(tmp_path / "a.json", small_schema(100, 11, 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", '"widths".*is missing'),
        ("{", "not valid JSON"),
        ('{"widths": [1, 2]}', '"widths".*is missing'),
    ],
)
def test_a_file_that_is_no_allocation_is_refused_by_path(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        Allocation.load(tmp_path / "a.json", SCHEMA)


def test_a_bad_width_in_a_file_is_refused_by_path_and_field(tmp_path: Path) -> None:
    allocation(2, 4, 8).save(tmp_path / "a.json")
    edit(tmp_path / "a.json", '"f1": 4', '"f1": "wide"')
    with pytest.raises(UserError, match="a.json: allocation, field 'f1'.*'wide'"):
        Allocation.load(tmp_path / "a.json", SCHEMA)


def edit(path: Path, old: str, new: str) -> None:
    """As a person does it who means it: without the checksum."""
    lines = path.read_text().replace(old, new).splitlines()
    assert lines[-2].startswith('  "sha256"')
    path.write_text("\n".join([*lines[:-3], lines[-3].rstrip(","), "}"]))


def test_a_changed_width_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    allocation(2, 4, 8).save(path)
    whole = path.read_text()
    path.write_text(whole.replace('"f1": 4', '"f1": 5'))  # one bit
    with pytest.raises(UserError, match='a.json was changed since it was written.*take its line "sha256" out'):
        Allocation.load(path, SCHEMA)
    path.write_text(whole)
    edit(path, '"f1": 4', '"f1": 5')
    assert Allocation.load(path, SCHEMA).widths["f1"] == 5


def test_a_weight_per_value_is_a_column_more_of_each_kept_table(tmp_path: Path) -> None:
    a = allocation(2, 8, 0).counted(1)
    assert a.total("widths") == 10  # what the search speaks of
    assert a.total("parameters") == 100 * 3 + 10 * 9
    assert a.total("bytes") == 4 * (100 * 4 + 10 * 12)  # 3 columns fit into 4, 9 need 12
    assert [a.columns(n) for n in SCHEMA.names] == [4, 12, 0]
    assert allocation(32, 32, 32).counted(1).reduction() == 0  # UES-32 has the column too
    a.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json", SCHEMA) == a != a.counted(0)


def test_precisions_of_fields_are_saved_counted_and_checked(tmp_path: Path) -> None:
    widths, own = {"f0": 24, "f1": 12, "f2": 0}, {"f0": "int4", "f1": "int8"}
    found = Allocation(SCHEMA, widths, precisions=own)
    found.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json", SCHEMA) == found
    assert found.total("served_mixed") == 16 * 100 + 16 * 10
    assert Allocation(SCHEMA, widths).total("served_mixed") == found.total("served_int8") == 32 * 100 + 16 * 10
    with pytest.raises(UserError, match="field 'f0': precision must be one of fp32, fp16, int8, int4, got 'int2'"):
        Allocation(SCHEMA, widths, precisions={"f0": "int2"})
