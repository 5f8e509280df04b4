"""K-means of the clustering stage on one rank, against scikit-learn and slow references in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as Reference
from sklearn.metrics import adjusted_rand_score

from embsearch_dist.errors import UserError
from embsearch_dist.methods.ihas.kmeans import KMeans, plus_plus
from tests.factories import one_rank

DISTINCT = torch.tensor([[0.0, 3.0], [5.0, 0.5], [-1.0, -4.0]])


def blobs(groups: int, rows: int, width: int, spread: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """``rows`` rows around well separated points, in random order, and the blob of each."""
    generator = np.random.default_rng(seed)
    group = generator.integers(0, groups, rows)
    points = 4 * generator.standard_normal((groups, width))
    values = points[group] + spread * generator.standard_normal((rows, width))
    return torch.from_numpy(values.astype(np.float32)), group


def made(rows: torch.Tensor, k: int, seed: int = 0, patience: int = 10) -> KMeans:
    kmeans = KMeans(k, rows.shape[1], one_rank(), seed, patience)
    kmeans.start(rows)
    return kmeans


def planted(centres: torch.Tensor, patience: int = 10) -> KMeans:
    """Live centres at given places, without counts."""
    k, width = centres.shape
    kmeans = KMeans(k, width, one_rank(), 0, patience)
    state = {"centres": centres.tolist(), "counts": [0.0] * k, "alive": [True] * k, "idle": [0] * k, "started": True}
    kmeans.load_state(state)
    return kmeans


def exact(rows: torch.Tensor, centres: torch.Tensor) -> np.ndarray:
    """Squared distances by differences, in float64."""
    x, c = rows.double().numpy(), centres.double().numpy()
    return np.stack([((x - point) ** 2).sum(1) for point in c], 1)


@pytest.mark.parametrize("seed", range(3))
def test_blobs_are_found_as_well_as_by_scikit_learn(seed: int) -> None:
    rows, truth = blobs(6, 3000, 40, spread=1.0, seed=seed)
    kmeans = made(rows[:256], 6, seed)
    for batch in rows.split(128):
        kmeans.update(batch)
    after_batches = kmeans.assign(rows)
    kmeans.lloyd(rows.split(500))
    loss = kmeans.lloyd(rows.split(500))
    reference = Reference(6, n_init=5, random_state=0).fit(rows.numpy())
    assert adjusted_rand_score(truth, after_batches) > 0.99
    assert adjusted_rand_score(reference.labels_, kmeans.assign(rows)) > 0.99
    assert loss * len(rows) == pytest.approx(reference.inertia_, rel=0.01)


def test_distances_are_exact_far_from_the_origin() -> None:
    rows, _ = blobs(3, 50, 352)
    rows = rows + 100.0  # squares of 3.5e6 cancel: in float32 errors of 0.5, and still of 0.002 with a shifted origin
    kmeans = planted(rows[:4])
    np.testing.assert_allclose(kmeans.distances(rows), exact(rows, kmeans.centres), rtol=1e-6, atol=1e-6)
    assert kmeans.distances(rows).min() >= 0
    assert kmeans.assign(rows).dtype == torch.int64


def test_equal_distances_go_to_the_first_live_centre() -> None:
    kmeans = planted(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    rows = torch.tensor([[0.0, 7.0], [2.0, 0.0], [-2.0, 0.0]])
    assert kmeans.assign(rows).tolist() == [0, 0, 1]
    kmeans.alive[:2] = False
    assert kmeans.assign(rows).tolist() == [2, 2, 3]
    assert kmeans.distances(rows)[:, :2].unique().tolist() == [math.inf]


def test_one_exact_pass_is_that_of_numpy() -> None:
    rows = torch.randn(700, 24, generator=torch.Generator().manual_seed(1))
    kmeans = made(rows[:100], 5)
    squares = exact(rows, kmeans.centres)
    group = squares.argmin(1)
    expected = np.stack([rows.double().numpy()[group == g].mean(0) for g in range(5)])
    loss = kmeans.lloyd(rows.split(97))
    assert loss == pytest.approx(squares.min(1).mean(), rel=1e-5)
    np.testing.assert_allclose(kmeans.centres, expected, rtol=1e-5, atol=1e-6)
    assert kmeans.counts.tolist() == np.bincount(group, minlength=5).tolist()


def test_a_step_is_that_of_sculley() -> None:
    """Algorithm 1 of the paper, row by row: centres of the batch are looked up first, then each row pulls its own
    at the rate 1 / rows of that centre so far."""
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    kmeans = made(rows[:50], 4)
    centres, counts = kmeans.centres.double().numpy().copy(), np.zeros(4)
    for batch in rows.split([50, 150, 1, 199]):
        squares = exact(batch, torch.from_numpy(centres))
        for x, g in zip(batch.double().numpy(), squares.argmin(1), strict=True):
            counts[g] += 1
            centres[g] += (x - centres[g]) / counts[g]
        assert kmeans.update(batch) == pytest.approx(squares.min(1).mean(), rel=1e-5)
        np.testing.assert_allclose(kmeans.centres, centres, rtol=1e-5, atol=1e-5)
        assert kmeans.counts.tolist() == counts.tolist()


def test_start_puts_a_centre_into_every_blob() -> None:
    rows, truth = blobs(8, 400, 16, spread=0.1)
    firsts = set()
    for seed in range(20):
        chosen = plus_plus(rows, 8, torch.Generator().manual_seed(seed))
        assert sorted(truth[chosen]) == list(range(8))  # of even draws, 1 in 400 does
        firsts.add(chosen[0])
    assert len(firsts) > 10
    assert torch.equal(made(rows, 8, seed=3).centres, made(rows, 8, seed=3).centres)
    assert torch.equal(made(rows, 8, seed=3).centres, rows[plus_plus(rows, 8, torch.Generator().manual_seed(3))])


def test_surplus_centres_wait_for_distinct_rows() -> None:
    rows = DISTINCT.repeat(20, 1)
    kmeans = made(rows, 5, patience=2)
    for _ in range(6):
        assert kmeans.update(rows) == pytest.approx(0, abs=1e-5)
        assert kmeans.lloyd([rows]) == pytest.approx(0, abs=1e-5)
    assert kmeans.alive.tolist() == [True] * 3 + [False] * 2
    assert kmeans.counts[3:].tolist() == [0, 0]
    group = kmeans.assign(rows)
    assert sorted(group[:3].tolist()) == [0, 1, 2] and torch.equal(group, group[:3].repeat(20))
    assert torch.isfinite(kmeans.centres).all()
    kmeans.update(torch.cat([rows, torch.tensor([[50.0, 50.0], [-90.0, 2.0]])]))
    assert kmeans.alive.all()
    assert kmeans.centres[3:].tolist() == [[-90.0, 2.0], [50.0, 50.0]]  # the farthest first


def test_a_lone_new_row_revives_one_centre_only() -> None:
    kmeans = made(DISTINCT, 5)
    kmeans.lloyd([DISTINCT.repeat(9, 1), torch.tensor([[40.0, 40.0]])])
    assert kmeans.alive.tolist() == [True] * 4 + [False]
    assert kmeans.centres[3].tolist() == [40.0, 40.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.3])
def test_constant_rows_make_one_group(value: float) -> None:
    rows = torch.full((300, 40), value)
    kmeans = made(rows, 3, patience=1)
    for _ in range(20):
        assert kmeans.update(rows) == 0
    assert kmeans.lloyd(rows.split(70)) == 0
    assert kmeans.alive.tolist() == [True, False, False]
    assert torch.equal(kmeans.centres[0], rows[0])
    assert kmeans.assign(rows).tolist() == [0] * 300
    assert kmeans.counts.tolist() == [300, 0, 0]


@pytest.mark.parametrize("patience", [3, 100])
def test_a_centre_without_rows_is_put_on_the_farthest_row(patience: int) -> None:
    rows, truth = blobs(2, 400, 8)
    kmeans = planted(torch.stack([rows.mean(0), torch.full((8,), 100.0)]), patience)
    for _ in range(2):
        bad = kmeans.update(rows)
        assert float(kmeans.centres[1, 0]) == 100
    kmeans.update(rows)
    farthest = exact(rows, kmeans.centres[:1]).argmax()
    assert torch.equal(kmeans.centres[1], rows[farthest]) == (patience == 3)
    assert kmeans.counts[1] == 0
    for _ in range(8):
        good = kmeans.update(rows)
    assert (adjusted_rand_score(truth, kmeans.assign(rows)) > 0.99) == (patience == 3)
    assert (good < 0.3 * bad) == (patience == 3)


def test_an_exact_pass_re_seeds_on_the_farthest_row_of_all_batches() -> None:
    rows, _ = blobs(3, 300, 8)
    rows[150] = 60.0
    far = torch.full((2, 8), -100.0)
    kmeans = planted(torch.cat([rows[:2], far]))
    kmeans.lloyd(rows.split(100))
    assert torch.equal(kmeans.centres[2], rows[150])
    assert torch.equal(kmeans.centres[3], far[0])  # one a pass
    kmeans.lloyd(rows.split(100))
    assert kmeans.counts[2] > 0 and not torch.equal(kmeans.centres[3], far[0])


def test_several_centres_are_re_seeded_apart() -> None:
    """Two rows far away together: the second centre goes elsewhere, for the first already covers both."""
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0], [100.0, 1.0], [0.0, 30.0]])
    kmeans = planted(torch.tensor([[0.5, 0.0], [-1e3, 0.0], [-1e3, 5.0]]), patience=1)
    kmeans.counts.copy_(torch.tensor([1e9, 70.0, 80.0]))  # so many hold the first where it is
    kmeans.update(rows)
    assert kmeans.centres[1:].tolist() == [[100.0, 1.0], [0.0, 30.0]]
    assert kmeans.counts[1:].tolist() == [0, 0]  # the next batch moves them freely


def test_a_continued_clustering_is_the_unbroken_one_bit_for_bit() -> None:
    rows, _ = blobs(4, 640, 24, spread=3.0)
    far = torch.full((1, 24), 100.0)
    unbroken, first = (planted(torch.cat([rows[:3] / 3, far]), patience=8) for _ in range(2))
    batches = rows.split(32)
    for batch in batches[:5]:
        unbroken.update(batch)
        first.update(batch)
    text = json.dumps(first.state(), allow_nan=False)
    second = KMeans(4, 24, one_rank(), seed=99, patience=8)
    second.load_state(json.loads(text))
    assert torch.equal(second.centres, first.centres) and torch.equal(second.idle, first.idle)
    losses = [(unbroken.update(b), second.update(b)) for b in batches[5:]]
    losses.append((unbroken.lloyd(batches), second.lloyd(batches)))
    assert all(a == b for a, b in losses)
    assert unbroken.counts[3] > 0  # it was re-seeded on the way, after so many updates as were counted before
    for a, b in zip(unbroken.state().values(), second.state().values(), strict=True):
        assert a == b


def test_order_numbers_groups_by_size() -> None:
    rows, _ = blobs(3, 60, 4)
    kmeans = made(torch.cat([rows[:1], rows[:1]]), 4)  # one live centre
    kmeans.load_state({**kmeans.state(), "alive": [False, True, True, True], "counts": [9.0, 5.0, 70.0, 5.0]})
    kmeans.centres.copy_(rows[:4])
    kmeans.idle.copy_(torch.arange(4))
    before = kmeans.assign(rows)
    old = kmeans.order()
    assert old == [2, 1, 3, 0]
    assert kmeans.counts.tolist() == [70, 5, 5, 9] and kmeans.alive.tolist() == [True, True, True, False]
    assert kmeans.idle.tolist() == old
    assert torch.equal(torch.tensor(old)[kmeans.assign(rows)], before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    rows, _ = blobs(2, 50, 4)
    kmeans = made(rows, 2)
    before = json.dumps(kmeans.state())
    rows[20, 1] = value
    for use in (kmeans.update, kmeans.start, lambda r: kmeans.lloyd([r[:30], r[30:]])):
        with pytest.raises(UserError, match="NaN or infinity"):
            use(rows)
        assert json.dumps(kmeans.state()) == before


def test_wrong_use_is_told() -> None:
    kmeans = KMeans(2, 3, one_rank(), 0)
    with pytest.raises(RuntimeError, match="start"):
        kmeans.update(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="no rank has rows"):
        kmeans.start(torch.zeros(0, 3))
    kmeans.start(torch.eye(3))
    with pytest.raises(ValueError, match=r"\[b, 3\], got \[5, 4\]"):
        kmeans.assign(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="no rows on any rank"):
        kmeans.lloyd([])
    with pytest.raises(ValueError, match="at least 1"):
        KMeans(0, 3, one_rank(), 0)


def test_a_state_of_another_clustering_is_refused() -> None:
    state = made(torch.eye(3), 2).state()
    for k, width in [(3, 3), (2, 4)]:
        with pytest.raises(UserError, match=rf"shape \[2, 3\], this run needs \[{k}, {width}\]"):
            KMeans(k, width, one_rank(), 0).load_state(state)
    for damaged in ({**state, "counts": [1.0]}, {**state, "centres": [[1.0, 2.0, 3.0], [4.0]]}, {"alive": [True] * 2}):
        with pytest.raises(UserError, match="cluster anew"):
            KMeans(2, 3, one_rank(), 0).load_state(damaged)
