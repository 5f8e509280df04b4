"""Cells of list columns and their weights: every form gives the same lists, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import open_source
from embsearch_dist.data.formats.columns import Bag, Rows
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError


def cell_rows(**columns: list) -> Rows:
    return Rows(pl.DataFrame(columns, strict=False), lambda i: f"clicks.csv, line {i + 2}")


def test_cells_of_every_form_become_the_same_lists() -> None:
    wanted = [["a", "b"], [], ["b"], []]
    text = cell_rows(v=["a|b", None, "|b|", ""]).bag("v", Bag())
    lists = cell_rows(v=[["a", "b"], None, ["", "b", None], []]).bag("v", Bag())
    assert text.to_list() == lists.to_list() == wanted
    numbers = cell_rows(v=[[1, 2], [], None, [3, None]]).bag("v", Bag())
    assert numbers.to_list() == [["1", "2"], [], [], ["3"]]
    assert cell_rows(v=[None, None]).bag("v", Bag()).to_list() == [[], []]


def test_lists_of_one_length_with_gaps_are_read_from_any_part_of_a_file(tmp_path: Path) -> None:
    """A column of categories makes pyarrow cut the row groups out of one array of lists."""
    lists = [["a", "b"], None, ["c", None], ["d", "a"], None, ["b", "b"]]
    user = pa.array(["u", "v"] * 3).dictionary_encode()
    table = pa.table({"y": [0, 1] * 3, "user": user, "v": pa.array(lists, pa.list_(pa.string(), 2))})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    (tmp_path / "s.yaml").write_text("files: c.parquet\nlabel: y\nfields: {user: categorical, v: {kind: list}}\n")
    chunks = open_source("table", tmp_path / "s.yaml").chunks()
    found = [row for chunk in chunks for row in chunk.frame["v"].to_list()]
    assert found == [["a", "b"], [], ["c"], ["d", "a"], [], ["b", "b"]]


def test_weights_of_every_form_belong_to_their_values() -> None:
    wanted = [[("a", 0.5), ("b:c", 2.0)], [], [("b", 0.0)]]
    inside = cell_rows(v=["a:0.5|b:c:2", None, "b:0|"]).bag("v", Bag(weight_separator=":"))
    beside = cell_rows(v=["a|b:c", "", "b|"], w=["0.5|2", None, "0|"]).bag("v", Bag(weights="w"))
    parquet = cell_rows(v=[["a", "b:c"], [], ["b", None]], w=[[0.5, 2], None, [0, None]]).bag("v", Bag(weights="w"))
    for found in (inside, beside, parquet):
        assert [[(e["value"], e["weight"]) for e in row] for row in found.to_list()] == wanted


@pytest.mark.parametrize(
    ("columns", "bag", "message"),
    [
        ({"v": ["a:1", "a:1|b"]}, Bag(weight_separator=":"), "line 3, column 'v': the weight .*: there is none. Write"),
        ({"v": ["a:1", "a:"]}, Bag(weight_separator=":"), "line 3, column 'v': the weight .*: there is none. Write"),
        ({"v": ["a:1", "c", "a:x"]}, Bag(weight_separator=":"), "line 3, .*there is none"),
        ({"v": ["a:1|b:x"]}, Bag(weight_separator=":"), "line 2, column 'v': .* number from 0 on: 'x'. Write"),
        ({"v": ["", "a:-1"]}, Bag(weight_separator=":"), "line 3, .*number from 0 on: '-1'"),
        ({"v": ["a:nan"]}, Bag(weight_separator=":"), "line 2, .*number from 0 on: 'nan'"),
        ({"v": ["a:1e39"]}, Bag(weight_separator=":"), "line 2, .*number from 0 on: '1e39'"),
        ({"v": ["a", "a|b"], "w": ["1", "2"]}, Bag(weights="w"), "line 3, column 'v': 2 values but 1 weights .*'w'"),
        ({"v": [["a"]], "w": [[float("inf")]]}, Bag(weights="w"), "line 2, .*number from 0 on: inf"),
        ({"v": [["a"]], "w": [[[1]]]}, Bag(weights="w"), "line 2, column 'v': type List.* is no number"),
        ({"v": ["a"], "w": [1.5]}, Bag(weights="w"), "line 2, column 'w': type Float64 is no list"),
        ({"v": [["a"]], "w": [[None]]}, Bag(weights="w"), "line 2, .*there is none"),
        ({"v": [1, 2]}, Bag(), "line 2, column 'v': type Int64 is no list. Make it one, or text"),
        ({"v": [[{"a": 1}]]}, Bag(), "line 2, column 'v': type Struct.* is no category. Make it text"),
    ],
)
def test_bad_cells_name_file_row_and_field(columns: dict[str, list], bag: Bag, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cell_rows(**columns).bag("v", bag)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("{kind: list, max_length: 0}", "field 'v': max_length must be a whole number from 1 to 10000, got '0'"),
        ("{kind: list, max_length: yes}", "max_length .* got 'yes'"),
        ("{kind: list, pooling: max}", "pooling must be sum or mean, got 'max'"),
        ("{kind: list, separator: '::'}", "separator must be one ASCII character, got '::'"),
        ("{kind: list, weight_separator: ''}", "weight_separator must be one ASCII character, got ''"),
        ("{kind: list, weight_separator: '|'}", "separator and weight_separator are both '|'"),
        ("{kind: list, weights: y}", "weights must be the column that holds them, got 'y'"),
        ("{kind: list, weights: z}", "field 'v': weights: c.csv has no column 'z'"),
        ("{kind: list, weights: w, weight_separator: ':'}", "in column 'w' or behind weight_separator"),
        ("{kind: list, weights: w, pooling: mean}", "weights need `pooling: sum`, not mean"),
        ("{kind: categorical, pooling: mean}", "pooling is for lists. Write `kind: list`"),
        ("{max_length: 3}", "max_length is for lists"),
        ("{kind: list, poolin: sum}", "unknown key 'poolin'. Did you mean 'pooling'"),
    ],
)
def test_a_bad_declaration_names_the_source_file_and_the_field(tmp_path: Path, field: str, message: str) -> None:
    (tmp_path / "c.csv").write_text("y,v,w\n0,a,1\n")
    (tmp_path / "s.yaml").write_text(f"files: c.csv\nlabel: y\nfields: {{v: {field}}}\n")
    with pytest.raises(UserError, match=f"s.yaml: .*{message}"):
        prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True)
