"""iHAS's search on one rank and on two: gates, centres, assignment and group files agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embsearch_dist.data.store.manifest import verify
from embsearch_dist.files import read_json
from embsearch_dist.grouped import GROUPS, GroupedAllocation, group_dir
from embsearch_dist.methods.ihas.gates_stage import STAGE
from embsearch_dist.methods.ihas.method import IHAS
from embsearch_dist.methods.ihas.router_by_centres import load_router
from embsearch_dist.methods.stages import check_stages, run_stages
from tests.factories import open_run, prepared, rank_context, recorded, small_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

IHAS_OPTIONS = [
    "search.width=4",
    "search.training.batch_size=256",
    "search.training.eval_batch_size=200",
    "search.training.epochs=2",
    "search.training.patience=0",
    "search.training.log_every=1",
    "search.outer.pretrain_epochs=0.5",
    "search.outer.every=2",
    "search.outer.lr=0.02",
    "search.groups.batch_size=200",
    "search.groups.min_rows=50",
]


def search(rank: int, world_size: int, data: str, directory: str, *overrides: str) -> dict[str, Any]:
    """The whole search; figures of what it ended with."""
    config = small_config(data, directory, *IHAS_OPTIONS, *overrides, method="ihas")
    run = open_run(config, rank_context(rank, world_size))
    check_stages(IHAS(), run)
    if rank == 0:
        run.dir.mkdir(parents=True, exist_ok=True)
    run_stages(IHAS(), run)
    router = load_router(run)
    selector = router.task.model.bare_selector
    named = {n: p.double() for n, p in selector.named_parameters()}
    return {
        "gates": {n: [float(p.sum()), float(p.square().sum())] for n, p in named.items()},
        "centres": router.kmeans.centres.tolist(),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared(tmp_path_factory))


@pytest.fixture(scope="module", params=[pytest.param("table_wise", marks=pytest.mark.slow), "row_wise"])
def searched(tmp_path_factory: pytest.TempPathFactory, data: str, request: pytest.FixtureRequest) -> tuple[Path, Any]:
    """The run directory of a search on two ranks, to be read, and its figures by rank."""
    folder = tmp_path_factory.mktemp("searched")
    found = run_ranks(search, 2, folder, data, str(folder / "run"), f"dist.sharding={request.param}")
    return folder / "run", found


def test_two_ranks_search_as_one(tmp_path: Path, data: str, searched: tuple[Path, Any]) -> None:
    one = run_ranks(search, 1, tmp_path, data, str(tmp_path / "one"))[0]
    of_two, two = searched
    assert two[0] == two[1]
    runs = [tmp_path / "one", of_two]
    np.testing.assert_allclose(*(recorded(r, STAGE, "loss") for r in reversed(runs)), rtol=1e-4)
    for name, figures in one["gates"].items():
        np.testing.assert_allclose(two[0]["gates"][name], figures, rtol=1e-3)
    np.testing.assert_allclose(two[0]["centres"], one["centres"], rtol=1e-3, atol=1e-4)
    for split in ("train", "validation", "test"):
        a, b = (np.load(r / "groups" / "assignment" / f"{split}.npy") for r in runs)
        assert len(a) == len(b) and (a != b).mean() < 0.005
        assert set(a) == {0, 1}
    kept = [read_json(r / GROUPS)["groups"] for r in runs]
    assert [g["widths"] for g in kept[0]] == [g["widths"] for g in kept[1]]


def test_every_row_is_in_the_files_of_its_group(data: str, searched: tuple[Path, Any]) -> None:
    directory, _ = searched
    schema = open_run(small_config(data, directory, method="ihas"), rank_context(0, 1)).schema
    grouped = GroupedAllocation.load(directory / GROUPS, schema)
    for k, rows in enumerate(grouped.rows):
        verify(group_dir(directory, k))
        for split, n in rows.items():
            assigned = np.load(directory / "groups" / "assignment" / f"{split}.npy")
            assert n == int((assigned == k).sum())
    assert sum(grouped.share(k) for k in range(2)) == pytest.approx(1)
    assert grouped.rows[0]["train"] >= grouped.rows[1]["train"] > 0
