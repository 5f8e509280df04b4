"""Every method of the table finds on two ranks what it finds on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.methods import METHODS
from tests.factories import prepared, rank_context
from tests.method_contract import Case
from tests.ranks import run_ranks


def search(rank: int, world_size: int, name: str, data: str, directory: str) -> dict[str, Any]:
    case = Case(name, data, short=True)
    run = case.search(Path(directory), rank_context(rank, world_size))
    return json.loads((run.dir / case.method.result).read_text()) if case.method.result else {}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_two_ranks_agree_with_each_other_and_with_one(
    name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data = str(prepared(tmp_path_factory))
    alone = run_ranks(search, 1, tmp_path, name, data, str(tmp_path / "one"), timeout=300)[0]
    both = run_ranks(search, 2, tmp_path, name, data, str(tmp_path / "two"), timeout=300)
    assert both[0] == both[1]
    for key in ("widths", "blocks"):
        assert both[0].get(key) == alone.get(key)
    assert [g["widths"] for g in both[0].get("groups", [])] == [g["widths"] for g in alone.get("groups", [])]
