"""Made-up clicks that inner products cannot tell: what is planted, that no pair shows a triple, and the files."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from embsearch_dist.data.planted.criteo_crosses import HINGES, TRIPLES, hinge_moments, hinge_part, triple_part
from embsearch_dist.data.planted.criteo_like import (
    BASE_RATE,
    CATEGORIES,
    PAIRS,
    RANKS,
    REFERENCE_ROWS,
    CriteoLike,
    Drawn,
    model,
)
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.methods.gated.config import MOST
from tools.make.criteo import main, make

N = 40_000
NAMES = [c.name for c in CATEGORIES]


@functools.cache
def bits() -> dict[str, np.ndarray]:
    """Independent random latent vectors of every field."""
    generator = np.random.default_rng(0)
    return {n: generator.integers(0, 2**64, N, dtype=np.uint64) for n in NAMES}


@functools.cache
def spread(clicks: str) -> Drawn:
    rows = np.arange(N, dtype=np.uint64) * np.uint64(REFERENCE_ROWS) // np.uint64(N)
    return model(0, clicks).draw(rows)


def test_a_triple_is_a_product_of_three_signs_a_direction() -> None:
    t = TRIPLES[0]
    signs = [
        1 - 2.0 * (bits()[n][:, None] >> np.arange(16, 16 + t.rank, dtype=np.uint64) & np.uint64(1)) for n in t.fields
    ]
    expected = (signs[0] * signs[1] * signs[2]).sum(1) * (t.variance / t.rank) ** 0.5
    np.testing.assert_allclose(triple_part(t, bits(), {}), expected)


def test_no_two_fields_of_a_triple_tell_anything_of_it() -> None:
    """All their products of signs are uncorrelated with it, and so is every direction of one field."""
    for t in TRIPLES:
        part = triple_part(t, bits(), {})
        assert part.var() == pytest.approx(t.variance, rel=0.05)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            x, y = (bits()[t.fields[k]] >> np.uint64(16) & np.uint64(15) for k in (a, b))
            both = (x * np.uint64(16) + y).astype(int)
            means = np.bincount(both, part, 256) / np.bincount(both, minlength=256)
            assert means.var() < 2 * t.variance / (N / 256)  # the noise of so few rows a cell


def test_a_hinge_is_not_a_sum_of_effects_of_single_fields_or_pairs() -> None:
    """Regressed on all signs it leaves half of its variance, with all their products it still leaves some."""
    h = HINGES[0]
    part = hinge_part(h, bits(), {})
    assert part.mean() == pytest.approx(0, abs=0.02) and part.var() == pytest.approx(h.variance, rel=0.05)
    left = []
    for order in (1, 2):
        columns = [np.ones(N)]
        for k in range(h.directions):
            s = [1 - 2.0 * (bits()[n] >> np.uint64(24 + k) & np.uint64(1)) for n in h.fields]
            columns += s
            columns += [a * b for i, a in enumerate(s) for b in s[:i]] if order == 2 else []
        x = np.stack(columns, 1)
        left.append((part - x @ np.linalg.lstsq(x, part, rcond=None)[0]).var() / h.variance)
    assert 0.4 < left[0] < 0.6 and 0.05 < left[1] < left[0] / 2


def test_moments_of_a_hinge() -> None:
    sums = [sum(1 - 2 * (x >> k & 1) for k in range(5)) for x in range(32)]
    values = np.maximum(np.array(sums) - 1, 0)
    assert hinge_moments(5) == pytest.approx((values.mean(), values.var()))


def test_blank_cells_add_nothing() -> None:
    missing = {TRIPLES[1].fields[2]: np.ones(N, bool)}
    assert not triple_part(TRIPLES[1], bits(), missing).any()
    h = HINGES[0]
    all_missing = {n: np.ones(N, bool) for n in h.fields}
    assert np.ptp(hinge_part(h, bits(), all_missing)) == 0
    assert np.ptp(hinge_part(h, bits(), {n: all_missing[n] for n in h.fields[:3]})) > 0


def test_parts_read_bits_that_nothing_else_reads() -> None:
    for parts in (TRIPLES, HINGES):
        fields = [n for p in parts for n in p.fields]
        assert len(fields) == len(set(fields)) and all(RANKS[n] for n in fields)
    assert max(p.rank for p in PAIRS) <= 16
    assert max([t.rank for t in TRIPLES] + [h.directions for h in HINGES]) <= MOST


def test_only_the_labels_differ_from_the_default() -> None:
    plain, crossed = spread("pairs"), spread("crosses")
    assert all(np.array_equal(plain.values[n], crossed.values[n]) for n in NAMES)
    assert not np.array_equal(plain.label, crossed.label)
    assert crossed.label.mean() == pytest.approx(BASE_RATE, abs=0.01)
    lines = [model(0, c).text(0, 50)[0].decode().splitlines() for c in ("pairs", "crosses")]
    assert [line[1:] for line in lines[0]] == [line[1:] for line in lines[1]]
    assert model(0, "crosses").bayes_auc(sample=N) > model(0).bayes_auc(sample=N) > 0.8


def test_truth_says_what_is_planted_and_the_default_is_silent(tmp_path: Path) -> None:
    make(tmp_path / "a", 2000, quiet=True)
    assert (
        main(["--out", str(tmp_path / "b"), "--rows", "2000", "--quiet", "--clicks", "crosses", "--workers", "2"]) == 0
    )
    plain, crossed = (read_json(tmp_path / n / "truth.json") for n in "ab")
    assert set(crossed) - set(plain) == {"clicks", "triples", "hinges"} and crossed["clicks"] == "crosses"
    assert crossed["triples"][0] == {"fields": ["C14", "C17", "C23"], "rank": 4, "variance": 0.5}
    assert plain["rank"] == RANKS and crossed["rank"]["C14"] == RANKS["C14"] + 4 + 4 and crossed["rank"]["C3"] == 0
    assert [p["variance"] for p in crossed["pairs"]] == [p["variance"] / 2 for p in plain["pairs"]]
    assert crossed["bayes_auc"] == model(0, "crosses").bayes_auc(0, 2000) != plain["bayes_auc"]


def test_an_unknown_kind_of_clicks_is_named() -> None:
    with pytest.raises(UserError, match="--clicks 'cross' is none of pairs, crosses"):
        CriteoLike(0, "cross")
