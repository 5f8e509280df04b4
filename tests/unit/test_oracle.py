"""The ceiling of a search that scores on the test rows: the data it is given, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist.data.store.manifest import identity
from embsearch_dist.files import read_json
from embsearch_dist.schema import Schema
from tests.factories import prepared
from tools.studies.oracle import exchange, without_data


def test_the_splits_change_places_and_the_copy_is_whole_data_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data = Path(prepared(tmp_path_factory))
    found = exchange(data, tmp_path / "exchanged")
    before, after = Schema.load(data), Schema.load(found)
    assert after.rows == {**before.rows, "validation": before.rows["test"], "test": before.rows["validation"]}
    shards = sorted((data / "test").glob("*.parquet"))
    assert [p.read_bytes() for p in shards] == [
        p.read_bytes() for p in sorted((found / "validation").glob("*.parquet"))
    ]
    assert identity(found, after) != identity(data, before)
    assert exchange(data, tmp_path / "exchanged") == found, "a second start takes what is there"


def test_an_allocation_forgets_the_data_it_was_found_on(tmp_path: Path) -> None:
    from embsearch_dist.allocation import Allocation
    from embsearch_dist.schema import Field

    schema = Schema("s", (Field("a", 3),), data="0" * 16)
    Allocation(schema, {"a": 4}).save(tmp_path / "a.json")
    body = read_json(without_data(tmp_path / "a.json", tmp_path / "b.json"))
    assert "data" not in body and "sha256" not in body and body["widths"] == {"a": 4}
