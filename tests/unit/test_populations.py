"""Hidden populations: each looks at its own fields with its own ranks, and the truth beside the data is true."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from scipy.stats import spearmanr

from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.data.planted.populations import (
    DEFAULT,
    Clicks,
    Pair,
    Plan,
    load_populations,
    make_populations,
    telling_accuracy,
)
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.data.prepare.vocabulary import load_values
from embsearch_dist.data.store.manifest import verify
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.schema import SPLITS, Schema
from launch import prepare
from launch.prepare_arguments import check, parser
from tests.raw_clicks import digest

SEED, ROWS = 5, 60_000
THREE = Plan(
    shares=(0.5, 0.3, 0.2),
    intercepts=(0.0, -1.0, 0.5),
    tells=(10, 11),
    clarity=0.8,
    pairs=(Pair((2, 0, 3), (20, 15), 1.0), Pair((0, 4, 0), (12, 10), 2.0)),
    idle=(5,),
    main_effects=("p0_a",),
    main_variance=0.1,
    zipf=0.4,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Schema]:
    out = tmp_path_factory.mktemp("populations") / "out"
    return out, make_populations(out, ROWS, seed=SEED, quiet=True)


def stored(out: Path, schema: Schema, split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Field -> the value number of every row (-1: a value that training lacks), and the labels."""
    ids, _, label = read_rows(out, schema, split)
    values = {}
    for i, name in enumerate(schema.names):
        values[name] = np.array([-1, *map(int, load_values(out, name)["value"])])[ids[i].numpy()]
    return values, label.numpy()


def auc_and_loss(score: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    place = np.empty(len(label))
    place[np.argsort(score)] = np.arange(1, len(label) + 1)
    n = label.sum()
    auc = (place[label == 1].sum() - n * (n + 1) / 2) / (n * (len(label) - n))
    return auc, float(np.mean(np.log1p(np.exp(-score)) * label + np.log1p(np.exp(score)) * (1 - label)))


@pytest.mark.parametrize("plan", [DEFAULT, THREE])
def test_tables_have_the_rank_of_their_population_and_share_no_direction(plan: Plan) -> None:
    clicks = Clicks(plan, seed=1)
    fields = {f.name: f for f in clicks.fields}
    for p, (pair, tables) in enumerate(zip(plan.pairs, clicks.tables, strict=True)):
        a, b = fields[f"p{p}_a"].frequency, fields[f"p{p}_b"].frequency
        scaled = [np.sqrt(a)[:, None] * t * np.sqrt(b) for t in tables]
        for rank, table, by_rows in zip(pair.ranks, tables, scaled, strict=True):
            assert np.allclose(a @ table, 0) and np.allclose(table @ b, 0), "an interaction carries no main effect"
            strength = np.linalg.svd(by_rows, compute_uv=False)
            assert np.allclose(strength[:rank], (pair.variance / max(rank, 1)) ** 0.5)
            assert np.allclose(strength[rank:], 0)
        assert np.linalg.matrix_rank(np.hstack(scaled)) == sum(pair.ranks) == np.linalg.matrix_rank(np.vstack(scaled))
    for name, effects in clicks.main.items():
        for rank, effect in zip(fields[name].ranks, effects, strict=True):
            assert np.isclose(fields[name].frequency @ effect**2, plan.main_variance * (rank > 0))
            assert np.isclose(fields[name].frequency @ effect, 0)


def test_default_plan_tells_populations_and_ranks_apart_and_hides_ranks_from_cardinalities() -> None:
    ranks = np.array([pair.ranks for pair in DEFAULT.pairs])
    assert ((ranks[:, 0] > 0) & (ranks[:, 1] == 0)).any() and ((ranks[:, 0] == 0) & (ranks[:, 1] > 0)).any()
    assert (ranks > 0).all(axis=1).any(), "a pair that both look at"
    clicks = Clicks(DEFAULT, 0)
    values = [len(f.frequency) for f in clicks.fields]
    for z in range(2):
        assert abs(spearmanr([f.ranks[z] for f in clicks.fields], values).statistic) < 0.2


def test_populations_lie_beside_the_rows_they_are_of(made: tuple[Path, Schema]) -> None:
    """The tell-tale values of every stored row show its population as often as the clarity says; others do not."""
    out, schema = made
    clicks = Clicks(DEFAULT, SEED)
    everyone = []
    for split in SPLITS:
        population = load_populations(out, split)
        values, _ = stored(out, schema, split)
        assert population.dtype == np.uint8 and len(population) == schema.rows[split]
        for field in clicks.fields:
            if field.owner is None:
                continue
            known = values[field.name] >= 0
            shown = field.owner[values[field.name]]
            assert abs((shown == population)[known].mean() - DEFAULT.clarity) < 0.01
            # One row off, and it is what chance gives: 0.6 * 0.6 + 0.4 * 0.4 of a clear field.
            assert (shown[1:] == population[:-1])[known[1:]].mean() < 0.56
        everyone.append(population)
    # Every row of the input is there once, in its order within the split.
    drawn = np.concatenate([population for _, population, _ in clicks.chunks(ROWS)])
    assert np.array_equal(np.bincount(np.concatenate(everyone)), np.bincount(drawn))


def test_truth_agrees_with_the_data(made: tuple[Path, Schema]) -> None:
    out, schema = made
    truth = read_json(out / "truth.json")
    assert truth["seed"] == SEED and truth["rows"] == ROWS
    plan = {f"p{p}_{side}": pair.ranks for p, pair in enumerate(DEFAULT.pairs) for side in "ab"}
    for name in schema.names:
        ranks = plan.get(name, (0, 0))
        assert [truth["ranks"][z][name] for z in ("0", "1")] == list(ranks)
        assert truth["rank"][name] == max(ranks)
        assert truth["uniform_rank"][name] == (1 if name.startswith("tell") else sum(ranks))
    assert list(truth["rank"]) == list(truth["uniform_rank"]) == schema.names
    assert list(truth["ranks"]["1"]) == schema.names
    # Score the stored rows by the true tables: AUC and logloss are the stated Bayes ones, over all and in each.
    clicks = Clicks(DEFAULT, SEED)
    values, label = stored(out, schema, "train")
    population = load_populations(out, "train")
    logits = clicks.logits(values)
    own = logits[population, np.arange(len(label))]
    rows = len(label)

    def agree(score: np.ndarray, label: np.ndarray, stated: dict) -> None:
        auc, loss = auc_and_loss(score, label)
        # 48,000 rows: the standard error of either is about 0.0015, and more of fewer rows.
        slack = (48_000 / len(label)) ** 0.5
        assert abs(auc - stated["bayes_auc"]) < 0.006 * slack
        assert abs(loss - stated["bayes_logloss"]) < 0.008 * slack

    agree(own, label, truth)
    for z in (0, 1):
        stated = truth["populations"][str(z)]
        mine = population == z
        assert abs(mine.mean() - stated["share"]) < 0.005 and abs(stated["share"] - DEFAULT.shares[z]) < 0.01
        agree(own[mine], label[mine], stated)
        wrong = auc_and_loss(logits[1 - z][mine], label[mine])[0]
        assert wrong < stated["bayes_auc"] - 0.1, "the other population's model does not fit"
    # Without the population: a mixture, by the posterior from the tell-tale fields alone.
    chance = np.tile(np.array(DEFAULT.shares)[:, None], rows)
    for field in clicks.fields:
        if field.owner is not None:
            for z in (0, 1):
                own_value = field.owner[values[field.name]] == z
                chance[z] *= np.where(own_value, DEFAULT.clarity, 1 - DEFAULT.clarity)
    chance /= chance.sum(axis=0)
    p = (chance / (1 + np.exp(-logits))).sum(axis=0)
    agree(np.log(p / (1 - p)), label, truth["from_fields"])
    assert truth["from_fields"]["bayes_logloss"] > truth["bayes_logloss"]
    assert abs((chance.argmax(axis=0) == population).mean() - truth["telling_accuracy"]) < 0.002


def test_a_pair_speaks_only_in_its_populations(made: tuple[Path, Schema]) -> None:
    """Correlation of the click with each pair's table: there for ranks above 0, nothing for rank 0."""
    out, schema = made
    clicks = Clicks(DEFAULT, SEED)
    values, label = stored(out, schema, "train")
    population = load_populations(out, "train")
    for p, (pair, tables) in enumerate(zip(DEFAULT.pairs, clicks.tables, strict=True)):
        for z, other in ((0, 1), (1, 0)):
            mine = population == z
            a, b = values[f"p{p}_a"][mine], values[f"p{p}_b"][mine]
            # 19,000 rows or more: the standard error is 0.007.
            if pair.ranks[z]:
                assert np.corrcoef(tables[z][a, b], label[mine])[0, 1] > 0.1
            if pair.ranks[other]:
                assert abs(np.corrcoef(tables[other][a, b], label[mine])[0, 1]) < 0.03


def test_idle_fields_tell_neither_click_nor_population(made: tuple[Path, Schema]) -> None:
    out, schema = made
    values, label = stored(out, schema, "train")
    population = load_populations(out, "train")

    def explained(name: str, y: np.ndarray) -> float:
        """Chi-square of y by value, over its degrees of freedom: about 1 when independent."""
        n, s = np.bincount(values[name]), np.bincount(values[name], weights=y)
        n, s = n[n > 0], s[n > 0]
        return float(((s - n * y.mean()) ** 2 / (n * y.mean() * (1 - y.mean()))).sum() / (len(n) - 1))

    for i in range(len(DEFAULT.idle)):
        assert explained(f"idle{i}", label) < 1.6 and explained(f"idle{i}", population) < 1.6
    assert all(explained(name, label) > 2 for name in DEFAULT.main_effects)
    for i in range(len(DEFAULT.tells)):
        # Given the population the tell-tale values say nothing more of the click.
        for z in (0, 1):
            inside = population == z
            n = np.bincount(values[f"tell{i}"][inside])
            s = np.bincount(values[f"tell{i}"][inside], weights=label[inside])
            n, s, p = n[n > 0], s[n > 0], label[inside].mean()
            assert ((s - n * p) ** 2 / (n * p * (1 - p))).sum() / (len(n) - 1) < 1.7


@pytest.mark.parametrize("plan", [DEFAULT, THREE])
def test_telling_accuracy_is_that_of_all_outcomes(plan: Plan) -> None:
    k, t = len(plan.shares), len(plan.tells)
    right = 0.0
    for shown in itertools.product(range(k), repeat=t):
        chance = [
            share * np.prod([plan.clarity if s == z else (1 - plan.clarity) / (k - 1) for s in shown])
            for z, share in enumerate(plan.shares)
        ]
        right += max(chance)
    assert np.isclose(telling_accuracy(plan), right)
    assert telling_accuracy(dataclasses.replace(plan, clarity=1.0)) == pytest.approx(1)
    assert telling_accuracy(dataclasses.replace(plan, clarity=1 / k)) == pytest.approx(max(plan.shares))
    assert telling_accuracy(DEFAULT) > 0.99


def test_three_populations(tmp_path: Path) -> None:
    schema = make_populations(tmp_path / "out", 20_000, seed=1, plan=THREE, quiet=True)
    truth = read_json(tmp_path / "out" / "truth.json")
    assert truth["rank"]["p0_b"] == 3 and truth["uniform_rank"]["p0_b"] == 5 and truth["uniform_rank"]["tell0"] == 2
    assert truth["ranks"]["1"] == {n: 4 * n.startswith("p1") for n in schema.names}
    clicks = Clicks(THREE, 1)
    values, label = stored(tmp_path / "out", schema, "train")
    population = load_populations(tmp_path / "out", "train")
    shown = clicks.fields[0].owner[values["tell0"]]  # type: ignore[index]
    for z in range(3):
        # Of another population's values, each of the two as often.
        share = np.bincount(shown[population == z], minlength=3) / (population == z).sum()
        expected = np.where(np.arange(3) == z, 0.8, 0.1)
        assert np.allclose(share, expected, atol=0.02)
    auc, _ = auc_and_loss(clicks.logits(values)[population, np.arange(len(label))], label)
    assert abs(auc - truth["bayes_auc"]) < 0.015


def test_same_seed_same_bytes_other_seed_other_truth_and_verify_passes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_populations(tmp_path / name, 3_000, seed=seed, quiet=True)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b and set(a) == set(c)
    assert all(a[n] != c[n] for n in ("truth.json", "populations/train.npy", "train/part-00000.parquet"))
    # The vocabularies of all fields and a shard a split.
    assert verify(tmp_path / "a")[0] == len(Clicks(DEFAULT, 0).fields) + 3


def test_rows_do_not_depend_on_how_many_follow() -> None:
    few, many = (next(Clicks(THREE, 0).chunks(rows)) for rows in (100_000, 150_000))
    assert few[0].equals(many[0]) and np.array_equal(few[1], many[1]) and np.array_equal(few[2], many[2])
    assert [len(population) for _, population, _ in Clicks(THREE, 0).chunks(250_000)] == [100_000, 100_000, 50_000]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": (1.0,)}, r"shares \(1.0,\) are not those of 2 to 256 populations"),
        ({"shares": (0.5, 0.3, 0.1)}, "shares .* are not those"),
        ({"intercepts": (0.0,)}, "1 intercepts for 3 populations"),
        ({"clarity": 0.2}, "clarity 0.2 is not from 1/3"),
        ({"tells": (10, 2)}, "a tell-tale field of 2 values cannot tell 3 populations"),
        ({"pairs": (Pair((1, 1), (9, 9), 1.0),)}, "pair 0: 2 ranks for 3 populations"),
        ({"pairs": (Pair((4, 0, 4), (9, 8), 1.0),)}, r"pair 0: a field of 8 values cannot have ranks \(4, 0, 4\)"),
        ({"main_effects": ("idle0",)}, "main effect of 'idle0', which is no field of a pair"),
    ],
)
def test_impossible_plans_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_populations(tmp_path / "out", 1000, plan=dataclasses.replace(THREE, **change))
    assert list(tmp_path.iterdir()) == []


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rows must be at least 100, got 5"):
        make_populations(tmp_path / "out", 5)
    rare = dataclasses.replace(THREE, shares=(0.5, 0.5 - 1e-7, 1e-7))
    with pytest.raises(UserError, match="none of 100 rows is of population 2. Give more --rows"):
        make_populations(tmp_path / "out", 100, plan=rare, quiet=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"train.npy: no populations can be read there .*--format populations"):
        load_populations(tmp_path, "train")


def test_the_script_makes_and_verifies_them(
    tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "out"
    done = run_script("prepare.py", "--format", "populations", "--rows", 2000, "--seed", 3, "--out", out)
    assert "2,000 rows in" in done.stdout and "tell2" in done.stdout
    assert Schema.load(out).dataset == "populations" and read_json(out / "truth.json")["seed"] == 3
    assert len(load_populations(out, "test")) == Schema.load(out).rows["test"]
    assert "all as in manifest.json" in run_script("prepare.py", "--verify", out).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["populations", "--input", "x"], "--format populations makes its own data. Leave out --input"),
        (["populations", "--rows", "0"], "--rows must be at least 100, got 0"),
        (["populations", "--genres", "list"], "--genres is for MovieLens"),
        (["populations", "--split", "time"], "a chronological split is not possible"),
        (["criteo", "--input", "x", "--rows", "9"], "--rows is for --format synthetic and populations; criteo takes"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    args = parser(None).parse_args(["--format", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=message):
        check(args)
        if args.rows is None:
            args.rows = 100
        prepare.run(args, Team())
    assert list(tmp_path.iterdir()) == []


def test_help_teaches_them() -> None:
    shown = " ".join(parser(prepare.__doc__).format_help().split())
    assert "python launch/prepare.py --format populations --rows 400000 --out PREPARED" in shown
    assert "synthetic and populations only: rows to make (default: synthetic 200,000, populations 400,000)" in shown


def prepare_in_two(words: list[str]) -> list[Schema | UserError]:
    """What each of two processes gets; they are threads here, which meet in a store as processes do."""
    args: Namespace = parser(None).parse_args(words)
    check(args)
    store = dist.HashStore()

    def one(rank: int) -> Schema | UserError:
        try:
            return prepare.run(args, Team(rank, 2, store))
        except UserError as e:
            return e

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_of_several_processes_one_makes_them_and_all_end_alike(tmp_path: Path) -> None:
    words = ["--format", "populations", "--rows", "1000", "--quiet", "--out"]
    schemas = prepare_in_two([*words, str(tmp_path / "two")])
    assert schemas[0] == schemas[1] == make_populations(tmp_path / "one", 1000, quiet=True)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    errors = prepare_in_two([*words, str(tmp_path / "two")])
    assert [str(e) for e in errors] == [f"{tmp_path}/two exists. Give another --out, or --overwrite to replace it"] * 2
