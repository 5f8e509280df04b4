"""Synthetic clicks: the planted interactions are there, of the stated rank and strength, and nothing else is."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.data.planted.synthetic import DEFAULT, Clicks, Pair, Plan, make_synthetic
from embsearch_dist.data.prepare.vocabulary import load_values
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.schema import Schema


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Schema]:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    return out, make_synthetic(out, 60_000, seed=5, quiet=True)


def test_planted_tables_have_the_stated_rank_equal_strength_and_no_main_effect() -> None:
    clicks = Clicks(DEFAULT, seed=1)
    fields = {f.name: f for f in clicks.fields}
    for p, (pair, table) in enumerate(zip(DEFAULT.pairs, clicks.tables, strict=True)):
        a, b = fields[f"p{p}_a"].frequency, fields[f"p{p}_b"].frequency
        assert table.shape == pair.values
        assert np.allclose(a @ table, 0) and np.allclose(table @ b, 0), "an interaction carries no main effect"
        assert np.isclose(a @ table**2 @ b, pair.variance)
        # Singular values in the metric of the data: exactly `rank` of them, all equal.
        strength = np.linalg.svd(np.sqrt(a)[:, None] * table * np.sqrt(b), compute_uv=False)
        assert np.allclose(strength[: pair.rank], (pair.variance / pair.rank) ** 0.5)
        assert np.allclose(strength[pair.rank :], 0)


def test_cardinality_says_nothing_about_rank() -> None:
    clicks = Clicks(DEFAULT, seed=0)
    ranks = np.array([f.rank for f in clicks.fields])
    values = np.array([len(f.frequency) for f in clicks.fields])
    assert len(ranks) >= 14 and {0, 1, 2, 4, 8, 16} == set(ranks.tolist())
    order = lambda x: np.argsort(np.argsort(x))  # noqa: E731
    # Spearman: wide fields are not the ones with many values (rather fewer).
    assert np.corrcoef(order(ranks), order(values))[0, 1] < 0.2


def test_truth_agrees_with_the_data(made: tuple[Path, Schema]) -> None:
    out, schema = made
    truth = read_json(out / "truth.json")
    assert list(truth["rank"]) == schema.names and truth["seed"] == 5
    assert {f.name: f.cardinality for f in schema.fields}["p0_a"] == DEFAULT.pairs[0].values[0] + 1
    # Score the stored rows by the true tables: their AUC and logloss must be the stated Bayes ones.
    clicks = Clicks(DEFAULT, seed=5)
    ids, _, label = read_rows(out, schema, "train")
    logit = np.full(len(label), DEFAULT.intercept)
    value = {}
    for i, name in enumerate(schema.names):
        raw = np.array([-1, *map(int, load_values(out, name)["value"])])
        value[name] = raw[ids[i].numpy()]
    for p, table in enumerate(clicks.tables):
        logit += table[value[f"p{p}_a"], value[f"p{p}_b"]]
    for name, effect in clicks.main.items():
        logit += effect[value[name]]
    y = label.numpy()
    place = np.empty(len(y))
    place[np.argsort(logit)] = np.arange(1, len(y) + 1)
    n = y.sum()
    auc = (place[y == 1].sum() - n * (n + 1) / 2) / (n * (len(y) - n))
    loss = np.mean(np.log1p(np.exp(-logit)) * y + np.log1p(np.exp(logit)) * (1 - y))
    # 48,000 rows: the standard error is about 0.0015 for either.
    assert abs(auc - truth["bayes_auc"]) < 0.006
    assert abs(loss - truth["bayes_logloss"]) < 0.008


def test_idle_fields_do_not_touch_the_label(made: tuple[Path, Schema]) -> None:
    out, schema = made
    ids, _, label = read_rows(out, schema, "train")

    def explained(name: str) -> float:
        """Chi-square of label by value, over its degrees of freedom: about 1 when independent."""
        x, y = ids[schema.names.index(name)].numpy(), label.numpy()
        n, s = np.bincount(x), np.bincount(x, weights=y)
        n, s = n[n > 0], s[n > 0]
        p = y.mean()
        return float(((s - n * p) ** 2 / (n * p * (1 - p))).sum() / (len(n) - 1))

    for i in range(len(DEFAULT.idle)):
        assert explained(f"idle{i}") < 1.6
    assert all(explained(name) > 2 for name in DEFAULT.main_effects)


def test_same_seed_same_bytes_other_seed_other_truth(tmp_path: Path) -> None:
    def digest(name: str, **options: object) -> str:
        make_synthetic(tmp_path / name, 3_000, quiet=True, **options)  # type: ignore[arg-type]
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()

    assert digest("a") == digest("b") != digest("c", seed=1)


def test_rows_do_not_depend_on_how_many_follow() -> None:
    plan = dataclasses.replace(DEFAULT, idle=(40,))
    few = next(Clicks(plan, 0).chunks(500))[0]
    again = next(Clicks(plan, 0).chunks(500))[0]
    assert few.equals(again) and few.height == 500
    assert [f.height for f, _ in Clicks(plan, 0).chunks(250_000)] == [100_000, 100_000, 50_000]


def test_impossible_plans_and_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rows must be at least 100, got 5"):
        make_synthetic(tmp_path / "out", 5)
    plan = Plan((Pair(8, (8, 20), 1.0),), (), (), 0.0, 0.5, 0.0)
    with pytest.raises(UserError, match="a field of 8 values cannot have rank 8"):
        make_synthetic(tmp_path / "out", 1000, plan=plan)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_wide_embeddings_beat_narrow_ones(tmp_path: Path, one_thread: None) -> None:
    """One pair of rank 8: a product of width 8 learns it, one of width 2 cannot, and both beat chance."""
    plan = Plan((Pair(8, (40, 30), 2.0),), (20,), (), 0.0, 0.3, 0.0)
    schema = make_synthetic(tmp_path / "out", 60_000, plan=plan, quiet=True)
    ids, _, label = read_rows(tmp_path / "out", schema, "train")
    test_ids, _, test_label = read_rows(tmp_path / "out", schema, "test")
    a, b = schema.names.index("p0_a"), schema.names.index("p0_b")

    def auc(width: int) -> float:
        torch.manual_seed(0)
        tables = [torch.nn.Embedding(n, width) for n in (schema.cardinalities[a], schema.cardinalities[b])]
        parameters = [p for t in tables for p in t.parameters()]
        for p in parameters:
            torch.nn.init.normal_(p, std=0.3)
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for _ in range(4):
            for rows in torch.randperm(len(label)).split(1024):
                score = (tables[0](ids[a, rows]) * tables[1](ids[b, rows])).sum(1)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(score, label[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            score = (tables[0](test_ids[a]) * tables[1](test_ids[b])).sum(1)
        positive, negative = score[test_label == 1], score[test_label == 0]
        return float((positive[:, None] > negative).float().mean())

    bayes = read_json(tmp_path / "out" / "truth.json")["bayes_auc"]
    wide, narrow = auc(8), auc(2)
    assert 0.55 < narrow < wide - 0.05
    assert bayes - 0.04 < wide < bayes + 0.015
