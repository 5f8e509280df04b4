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


def search(rank: int, world_size: int, data: str, directory: str) -> dict[str, Any]:
    found = {}
    for name in sorted(METHODS):
        case = Case(name, data)
        run = case.search(Path(directory) / name, rank_context(rank, world_size))
        file = run.dir / case.method.result
        found[name] = json.loads(file.read_text()) if case.method.result else {}
    return found


def test_two_ranks_agree_with_each_other_and_with_one(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    data = str(prepared(tmp_path_factory))
    alone = run_ranks(search, 1, tmp_path, data, str(tmp_path / "one"))[0]
    both = run_ranks(search, 2, tmp_path, data, str(tmp_path / "two"))
    assert both[0] == both[1]
    for name, one in alone.items():
        assert both[0][name].get("widths") == one.get("widths"), name
        assert both[0][name].get("blocks") == one.get("blocks"), name
