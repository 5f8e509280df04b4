"""Raw values of tables in memory: gaps, and values whose type is not that of the training rows."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import polars as pl
import pytest

import embsearch_dist as es

DAY, HOUR = date(2024, 3, 5), datetime(2024, 3, 5, 7)


def ids(train: Any, later: Any) -> list:
    """The ids that the values ``later`` have where ``train`` are those of training."""
    splits = {"train": train, "validation": later, "test": later}
    tables = {name: {"user": values, "label": np.arange(len(values)) % 2} for name, values in splits.items()}
    return es.ArraySource(["user"], tables, raw=True).read("test", 0, len(later))["user"].to_list()


def test_nan_is_a_gap_in_tables_of_numpy_and_polars() -> None:
    nan = float("nan")
    assert ids(np.array([nan, nan, 5.0]), np.array([5.0, nan])) == [1, 0]
    assert ids(pl.Series([[nan, 5.0], [nan]]), pl.Series([[5.0], [nan, 5.0]])) == [[1], [0, 1]]
    assert ids([7, 7, 5], [5.0, nan, None]) == [2, 0, 0]


@pytest.mark.parametrize(
    ("train", "later", "wanted"),
    [
        ([1, 2, 3], [1.0, 1.7, 2.9, -1.0], [1, 0, 0, 0]),
        ([1, 2], [Decimal("1.00"), Decimal("2.50")], [1, 0]),
        ([5.0, 2.0**53], [5, 2**53, 2**53 + 1], [1, 2, 0]),
        ([1, 2], pl.Series([1, 2**40], dtype=pl.Int64), [1, 0]),
        (["1", "2.5", "x"], [1.0, 2.5, 7.0], [1, 2, 0]),
        (["1", "2"], [2, 3], [2, 0]),
        ([1, 2], ["2", "1.7", "x"], [2, 0, 0]),
        (pl.Series([[1, 2], [3]]), pl.Series([[2.0, 2.5], []]), [[2, 0], []]),
        ([str(DAY)], [DAY, None], [1, 0]),
        (pl.Series([HOUR], dtype=pl.Datetime("ms")), pl.Series([HOUR, HOUR.replace(microsecond=5)]), [1, 0]),
    ],
)
def test_a_value_is_another_one_only_where_both_are_equal(train: Any, later: Any, wanted: list) -> None:
    assert ids(train, later) == wanted


@pytest.mark.parametrize(
    ("train", "later", "says"),
    [
        ([1, 0], [True, False], "field 'user' holds Boolean, but Int64 in the rows .* Give both one type"),
        ([DAY], [HOUR], "holds Datetime.*, but Date in"),
        ([HOUR], [HOUR.replace(tzinfo=UTC)], "holds Datetime.*UTC.*, but Datetime"),
        ([1], [{"a": 1}], "holds Struct"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(train: list, later: list, says: str) -> None:
    with pytest.raises(es.UserError, match=says):
        ids(train, later)


def test_whole_numbers_may_come_before_others_in_a_list() -> None:
    assert ids([1, 2.5, None], [2.5, 1]) == [2, 1]


def rows(**columns: list) -> dict[str, list]:
    return {"user": [1, 2], "label": [0, 1], **columns}


def test_parts_of_a_split_may_have_more_columns_in_any_order() -> None:
    parts = [rows(), {"label": [True, False], "z": ["a", "b"], "user": [1.0, 3.0]}, rows(user=[None, None])]
    own = es.ArraySource(["user"], {"train": parts, "validation": rows(), "test": rows(user=[3, 7])}, raw=True)
    assert own.rows("train") == 6 and own.read("test", 0, 2)["user"].to_list() == [3, 0]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ([rows(), {"label": [1, 0]}], "split 'train': column 'user' is missing"),
        (
            [rows(), rows(user=["a", "b"])],
            "split 'train': column 'user' is Int64 in one .* and String in another. Give",
        ),
        ([rows(), rows(user=[True, False])], "split 'train': column 'user' is Int64 in one .* and Boolean in another"),
        ([rows(), rows(user=[[1], [2]])], r"split 'train': column 'user' is Int64 .* and List\(Int64\) in another"),
        (rows(user=[1, "x"]), "split 'train': columns must have one length, and each one type .*: give a pandas"),
        (rows(user=[1, 2, 3]), "split 'train': columns must have one length"),
    ],
)
def test_tables_that_do_not_go_together_are_told_in_one_line(train: Any, says: str) -> None:
    with pytest.raises(es.UserError, match=says):
        es.ArraySource(["user"], {"train": train, "validation": rows(), "test": rows()}, raw=True)
