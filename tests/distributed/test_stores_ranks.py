"""Several ranks and a store: one of each machine fetches, all wait for it, and all fail with it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.errors import UserError
from embsearch_dist.ranks.context import Context
from embsearch_dist.stores import waiting
from embsearch_dist.stores.places import bring_data
from embsearch_dist.stores.waiting import wait_for_all
from tests.factories import make_data, rank_context, small_config
from tests.faulty_store import faulty_store

URL = "s3://bucket/data"


def fetch(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What a rank has read of the store, and the data it was given."""
    with pytest.MonkeyPatch.context() as patch:
        store = faulty_store(Path(folder), patch)
        config = small_config(URL, "run")
        try:
            bring_data(config, rank_context(rank, world_size))
        except UserError as e:
            return {"error": str(e)}
        return {"read": sorted(store.read), "path": config.data.path, "saved": config.to_dict()["data"]["path"]}


def test_one_rank_of_a_machine_fetches_and_the_config_keeps_the_url(tmp_path: Path, gloo2) -> None:
    data = make_data(tmp_path / "made", rows=600)
    shutil.copytree(data, tmp_path / "bucket" / "data")
    first, second = gloo2(fetch, str(tmp_path))
    assert first["path"] == second["path"] and Path(first["path"]).is_relative_to(tmp_path / "cache")
    assert first["saved"] == second["saved"] == URL
    assert "bucket/data/train/part-00000.parquet" in first["read"] and second["read"] == ["bucket/data/manifest.json"]


def test_what_one_rank_cannot_fetch_is_told_on_all(tmp_path: Path, gloo2) -> None:
    first, second = gloo2(fetch, str(tmp_path))
    assert "no manifest.json there" in first["error"] and "no manifest.json there" in second["error"]
    assert second["error"].startswith("rank 0 failed while fetching the data")


class Counting(Context):
    """A context that counts how often the ranks have asked each other."""

    def every(self, value: Any) -> list[Any]:
        found = super().every(value)
        self.__dict__["asked"] = self.__dict__.get("asked", 0) + 1
        return found


def wait_long(rank: int, world_size: int) -> int:
    """Rank 1 works until all have asked each other several times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting, "MOMENT_S", 0.01)
        plain = rank_context(rank, world_size)
        context = Counting(plain.rank, plain.world_size, plain.device)
        more = threading.Event()

        def work() -> None:
            while rank == 1 and context.__dict__.get("asked", 0) < 5:
                more.wait(0.01)

        wait_for_all(context, "a long wait", work)
        return context.__dict__["asked"]


def test_no_collective_waits_for_the_whole_of_a_long_work(gloo2) -> None:
    """So that ``dist.timeout_s`` is no bound for it."""
    first, second = gloo2(wait_long)
    assert first == second and first >= 5
