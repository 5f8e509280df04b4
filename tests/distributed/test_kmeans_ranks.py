"""K-means on two ranks is that on one: the same rows, cut where one likes, give the same groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.methods.ihas.kmeans import KMeans
from tests.factories import one_rank, rank_context
from tests.ranks import run_ranks

K, WIDTH, BATCH = 5, 48, 100
CUTS = {"even": 0.5, "uneven": 0.83, "first empty": 0.0, "last empty": 1.0}


def rows_of(seed: int = 0) -> torch.Tensor:
    """Five blobs that touch, of differing sizes."""
    generator = torch.Generator().manual_seed(seed)
    group = (torch.rand(900, generator=generator).square() * K).long()
    points = 1.5 * torch.randn(K, WIDTH, generator=generator)
    return points[group] + torch.randn(900, WIDTH, generator=generator)


def part(rows: torch.Tensor, cut: float, rank: int, world_size: int) -> torch.Tensor:
    """This rank's contiguous rows of a global batch: ``cut`` is the share of the first of two ranks."""
    at = round(cut * len(rows))
    return rows if world_size == 1 else (rows[:at], rows[at:])[rank]


def cluster(rank: int, world_size: int, cut: float) -> dict[str, Any]:
    """Start, mini-batches with a centre that must be re-seeded, exact passes; what came of each."""
    context = one_rank() if world_size == 1 else rank_context(rank, world_size)
    rows = rows_of()
    kmeans = KMeans(K, WIDTH, context, seed=4, patience=3)
    kmeans.start(part(rows[:BATCH], cut, rank, world_size))
    start = kmeans.centres.tolist()
    state = kmeans.state()
    state["centres"][2] = [30.0] * WIDTH
    kmeans.load_state(state)
    losses, seeded = [], []
    for i, batch in enumerate(rows.split(BATCH)):
        losses.append(kmeans.update(part(batch, cut, rank, world_size)))
        if i == 2:
            seeded = kmeans.centres[2].tolist()
    updated = kmeans.centres.tolist()
    batches = [part(batch, cut, rank, world_size) for batch in rows.split(BATCH)]
    if cut == 0.0 and rank == 0 and world_size == 2:
        batches = []  # a rank may have no batches at all
    losses += [kmeans.lloyd(batches) for _ in range(3)]
    old = kmeans.order()
    groups = kmeans.assign(rows).tolist()
    return {
        "start": start,
        "seeded": seeded,
        "updated": updated,
        "losses": losses,
        "old": old,
        "groups": groups,
        "centres": kmeans.centres.tolist(),
        "counts": kmeans.counts.tolist(),
    }


def cluster_cuts(rank: int, world_size: int) -> dict[str, Any]:
    """All cuts in one set of processes, for starting those takes longer than clustering."""
    return {name: cluster(rank, world_size, cut) for name, cut in CUTS.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(cluster_cuts, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return cluster(0, 1, 0.5)


@pytest.mark.parametrize("name", CUTS)
def test_two_ranks_cluster_as_one(one: dict[str, Any], two: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name] for found in two)
    assert first == second
    assert first["start"] == one["start"]
    assert first["groups"] == one["groups"] and len(set(one["groups"])) == K
    assert first["old"] == one["old"] and first["counts"] == one["counts"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for key in ("updated", "centres"):
        torch.testing.assert_close(torch.tensor(first[key]), torch.tensor(one[key]), rtol=1e-4, atol=1e-5)


def test_a_centre_is_re_seeded_on_the_farthest_row_of_all_ranks(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    batch = rows_of()[2 * BATCH : 3 * BATCH].tolist()
    assert one["seeded"] in batch
    assert [found[name]["seeded"] for found in two for name in CUTS] == [one["seeded"]] * 2 * len(CUTS)


def surplus(rank: int, world_size: int) -> list[Any]:
    """One row on rank 0 and another on rank 1: two live centres; then a third row on rank 1 alone, which also draws
    the centre of rank 1's rows away from them."""
    kmeans = KMeans(4, 3, rank_context(rank, world_size), seed=0, patience=1)
    rows = torch.full((10, 3), 1.0 + rank)
    kmeans.start(rows)
    found: list[Any] = [kmeans.alive.tolist()]
    found.append([kmeans.update(rows) for _ in range(3)])
    found.append(kmeans.alive.tolist())
    kmeans.update(torch.cat([rows, torch.full((rank, 3), 50.0)]))
    return [*found, kmeans.alive.tolist(), kmeans.centres[2:].tolist()]


def test_distinct_rows_are_counted_over_all_ranks(gloo2: Callable[..., list[Any]]) -> None:
    two_live = [True, True, False, False]
    first, second = gloo2(surplus)
    assert first == second
    assert first[:3] == [two_live, [0, 0, 0], two_live]
    assert first[3:] == [[True] * 4, [[50.0] * 3, [2.0] * 3]]


def broken(rank: int, world_size: int) -> list[str]:
    """NaN on rank 1 alone; the ranks must still be in step after every refusal."""
    kmeans = KMeans(2, WIDTH, rank_context(rank, world_size), seed=0)
    good = rows_of()[rank * 50 : rank * 50 + 50]
    bad = good.clone()
    bad[3, 0] = torch.nan if rank == 1 else 0.0
    kmeans.start(good)
    told = []
    for use in (kmeans.start, kmeans.update, lambda rows: kmeans.lloyd([rows])):
        try:
            use(bad)
        except UserError as e:
            told.append(f"{e} {e.everywhere}")
    return [*told, str(kmeans.update(good))]


def test_nan_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(broken, 2, tmp_path, timeout=60)
    assert first == second
    assert len(first) == 4 and all("NaN or infinity" in text and text.endswith("True") for text in first[:3])
