"""Normalised entropy, calibration, its curve and AUC by group, against torchrec.metrics and scikit-learn."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchrec.metrics.calibration import compute_calibration, get_calibration_states
from torchrec.metrics.gauc import get_auc_states
from torchrec.metrics.ne import compute_ne, get_ne_states

from embsearch_dist.errors import UserError
from embsearch_dist.schema import Field, Schema
from embsearch_dist.train import measures
from embsearch_dist.train.figures import Wanted, told
from embsearch_dist.train.measures import GroupAreas, areas_by_group, normalised_entropy, pack, probabilities
from embsearch_dist.train.metrics import Predictions, check_group, evaluate, figures
from tests.factories import one_rank, random_batch, small_schema

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_rows(seed: int, rows: int = 4000, decimals: int = 1, groups: int = 300) -> Rows:
    """Logits with ties, clicks that half follow them, and groups of which many have one class."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, rows).round(decimals).astype(np.float32)
    labels = (rng.random(rows) < 1 / (1 + np.exp(0.5 - logits / 2))).astype(np.float32)
    return logits, labels, ((rng.zipf(1.5, rows) - 1) % groups).astype(np.int32)


def found_of(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> Predictions:
    ids = None if groups is None else torch.from_numpy(groups)
    return Predictions(torch.from_numpy(logits), torch.from_numpy(labels), ids, None)


def without_ties(rows: int) -> np.ndarray:
    return (np.random.default_rng(1).permutation(rows) / 256 - 2).astype(np.float32)


def curve_of(logits: np.ndarray, labels: np.ndarray, bins: int = measures.CURVE_BINS) -> measures.Curve:
    return measures.reliability(np.sort(pack(logits, labels)), bins)


def areas_by_loop(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[int, float]:
    inside = {g: groups == g for g in np.unique(groups).tolist()}
    return {g: roc_auc_score(labels[x], logits[x]) for g, x in inside.items() if 0 < labels[x].mean() < 1}


@pytest.mark.parametrize("seed", range(3))
def test_entropy_and_calibration_equal_those_of_torchrec(seed: int) -> None:
    logits, labels, _ = random_rows(seed)
    told = figures(found_of(logits, labels))
    given = [torch.from_numpy(x).double()[None] for x in (labels, probabilities(logits), np.ones_like(labels))]
    states = get_ne_states(*given, eta=1e-12)
    sums = [states[k] for k in ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")]
    assert told["ne"] == pytest.approx(float(compute_ne(*sums, eta=1e-12)), rel=1e-6)
    states = get_calibration_states(*given)
    expected = compute_calibration(states["calibration_num"], states["calibration_denom"])
    assert told["calibration"] == pytest.approx(float(expected), rel=1e-12)


def test_the_click_rate_itself_has_entropy_one_and_is_calibrated() -> None:
    labels = np.array([1, 0, 0, 0, 1, 0, 0, 0], np.float32)
    told = figures(found_of(np.full(8, math.log(1 / 3), np.float32), labels))
    assert told["ne"] == pytest.approx(1, rel=1e-6)
    assert told["calibration"] == pytest.approx(1, rel=1e-6)
    assert told["ece"] == pytest.approx(0, abs=1e-7)


def test_without_ties_the_curve_has_bins_of_equally_many_rows() -> None:
    labels, logits = random_rows(3, rows=997)[1].astype(float), without_ties(997)
    curve = curve_of(logits, labels, 10)
    order = np.argsort(logits)
    parts = np.split(order, [997 * k // 10 for k in range(1, 10)])
    assert curve.rows.tolist() == [len(p) for p in parts]
    means = [(probabilities(logits[p]).mean(), labels[p].mean()) for p in parts]
    np.testing.assert_allclose(np.stack([curve.predicted, curve.clicked], 1), means, rtol=1e-12)
    error = sum(len(p) * abs(a - b) for p, (a, b) in zip(parts, means, strict=True)) / 997
    assert curve.error == pytest.approx(error, rel=1e-12)


def test_the_curve_does_not_part_ties_so_the_order_of_rows_does_not_matter() -> None:
    logits, labels, _ = random_rows(4, rows=600, decimals=0)
    mixed = np.random.default_rng(0).permutation(600)
    curve, again = curve_of(logits, labels), curve_of(logits[mixed], labels[mixed])
    assert curve.body() == again.body()
    assert 1 < len(curve.rows) <= len(np.unique(logits))
    assert curve.rows.sum() == 600
    constant = curve_of(np.zeros(9, np.float32), np.eye(1, 9, dtype=np.float32)[0])
    assert constant.body() == {"rows": [9], "predicted": [0.5], "clicked": [1 / 9]}


@pytest.mark.parametrize("piece", [1, 100, 1 << 22])
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_areas_by_group_equal_a_loop_over_scikit_learn(
    piece: int, decimals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "ROWS_AT_A_TIME", piece)
    logits, labels, groups = random_rows(decimals, decimals=decimals)
    groups[:3] = 2**31 - 1
    labels[:3] = 0, 1, 0
    found, loop = areas_by_group(logits, labels, groups, without=None), areas_by_loop(logits, labels, groups)
    assert found.groups.tolist() == list(loop)
    assert len(loop) < len(np.unique(groups))  # there are groups of one class
    np.testing.assert_allclose(found.areas, list(loop.values()), atol=1e-12)
    rows = [int((groups == g).sum()) for g in loop]
    assert found.rows.tolist() == rows
    assert found.share == sum(rows) / len(groups)
    assert found.mean == pytest.approx(np.average(list(loop.values()), weights=rows), abs=1e-12)


def test_without_ties_the_plain_mean_over_groups_is_torchrec_gauc() -> None:
    _, labels, groups = random_rows(5, rows=800, groups=60)
    logits = without_ties(800)
    order = np.argsort(groups, kind="stable")
    sizes = torch.from_numpy(np.unique(groups, return_counts=True)[1])
    given = [torch.from_numpy(x[order]).float()[None] for x in (labels, probabilities(logits))]
    states: Any = get_auc_states(*given, torch.ones(1, 800), sizes)
    found = areas_by_group(logits, labels, groups, without=None)
    assert int(states["num_samples"]) == len(found.areas)
    assert found.areas.mean() == pytest.approx(float(states["auc_sum"]) / len(found.areas), abs=1e-6)


def test_rows_of_id_zero_are_no_group() -> None:
    logits, labels, groups = random_rows(6)
    loop = areas_by_loop(logits, labels, groups)
    assert 0 in loop
    found = areas_by_group(logits, labels, groups)
    assert found.groups.tolist() == [g for g in loop if g]
    assert found.share == np.isin(groups, found.groups).mean() < 1


def test_what_is_undefined_is_none_in_a_result() -> None:
    logits, labels, groups = random_rows(7, rows=50)

    def body(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        found = found_of(logits, labels, groups)
        return told(figures(found), found, Wanted("user"), one_rank())

    silent = body(logits, np.zeros_like(labels))
    assert silent["ne"] is None and silent["calibration"] is None and silent["ece"] > 0
    assert silent["by_group"] == {"field": "user", "auc": None, "groups": 0, "rows": 0.0}
    assert body(logits, np.ones_like(labels))["ne"] is None
    broken = body(np.where(np.arange(50) == 7, np.nan, logits).astype(np.float32), labels)
    assert all(broken[key] is None for key in ("ne", "calibration", "ece", "reliability"))
    sane = body(logits, labels)
    assert sum(sane["reliability"]["rows"]) == 50 and sane["by_group"]["groups"] > 0
    assert "intervals" not in sane


def test_entropy_of_one_class_is_undefined() -> None:
    assert math.isnan(normalised_entropy(0.1, 0.0)) and math.isnan(normalised_entropy(0.1, 1.0))


def test_no_group_has_both_classes() -> None:
    found = areas_by_group(np.zeros(4, np.float32), np.array([0, 0, 1, 1]), np.array([1, 1, 2, 2]))
    assert math.isnan(found.mean) and found.share == 0
    empty = areas_by_group(np.zeros(0, np.float32), np.zeros(0), np.zeros(0, np.int32))
    assert isinstance(empty, GroupAreas) and math.isnan(empty.mean)


def test_an_evaluation_takes_the_groups_from_the_batches() -> None:
    schema = small_schema(5, 2**31 - 1)
    batches = [random_batch(schema, rows, rows) for rows in (70, 200, 30)]
    logits, labels = (torch.cat(x).numpy() for x in ([b.dense[:, 0] for b in batches], [b.label for b in batches]))
    groups = torch.cat([b.sparse["f0"].values() for b in batches]).numpy()
    told = evaluate(lambda b: b.dense[:, 0], iter(batches), one_rank(), "f0")
    expected = areas_by_group(logits, labels, groups)
    assert told["group_count"] == 4 == len(expected.rows)
    assert (told["group_auc"], told["group_share"]) == (expected.mean, expected.share)
    told = evaluate(lambda b: b.dense[:, 0], iter(batches), one_rank(), "f1")  # ids beyond what float32 can count
    assert told["group_count"] == 0


def schema_with(*fields: Field) -> Callable[[str], None]:
    schema = Schema("x", fields, ("price",))
    return lambda group: check_group(schema, group)


def test_only_a_field_of_one_id_a_row_can_group() -> None:
    check = schema_with(Field("user", 3), Field("tags", 4, "mean"))
    check("")
    check("user")
    with pytest.raises(UserError, match="train.group: 'usr' is none of user, tags.*user"):
        check("usr")
    with pytest.raises(UserError, match="'tags' is a list"):
        check("tags")
    with pytest.raises(UserError, match="'price' is a dense column"):
        check("price")


def test_figures_and_groups_take_few_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/metrics.md says of 45 million rows, on fewer: the sorted integers and what they were made of."""
    monkeypatch.setattr(measures, "ROWS_AT_A_TIME", 2000)
    rows = 100_000
    logits, labels, _ = random_rows(8, rows=rows)
    groups = (np.arange(rows) % 5000).astype(np.int32)
    for work in (lambda: curve_of(logits, labels), lambda: areas_by_group(logits, labels, groups)):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30 * rows
