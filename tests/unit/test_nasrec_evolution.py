"""Aging evolution over architectures with a toy fitness: what is proposed, who lives, what is left, and what a file of
a search brings back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embsearch_dist.config.read import load_config
from embsearch_dist.errors import UserError
from embsearch_dist.methods.nasrec import evolution as module
from embsearch_dist.methods.nasrec.config import NASRecConfig
from embsearch_dist.methods.nasrec.evolution import TRIES, Candidate, Evolution, Limits
from embsearch_dist.methods.nasrec.scoring import Score
from embsearch_dist.networks.architecture import Architecture
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.sampling import mutations_at
from embsearch_dist.networks.space import Space, check

SPACE = Space(blocks=3, dense_widths=(8, 16), sparse_widths=(4, 6), tokens=2, width=8)
ONE_BLOCK = Space(1, ("fc",), ("efc",), (8,), (4,), 1, 2, 8)  # four networks: two mergers, on or off
Scores = Callable[[Architecture, str], Score]


def toy(architecture: Architecture, name: str) -> Score:
    """Few mergers and narrow blocks are good; a little that only the key tells keeps all apart."""
    mergers = sum(b.fm + b.dense_to_sparse for b in architecture.blocks)
    widths = sum(b.dense_width for b in architecture.blocks)
    noise = int(name[:6], 16) / 16**6
    return Score(0.4 + 0.01 * mergers + 0.001 * widths + 0.005 * noise, 1000 * widths, 10 * widths, 0.1 * mergers)


def config(**changes: Any) -> module.EvolutionConfig:
    sizes = {"population": 8, "generations": 12, "parents": 4, "children": 3, "keep": 5}
    return module.EvolutionConfig(**(sizes | changes))


def start(space: Space = SPACE, seed: int = 0, **changes: Any) -> Evolution:
    return Evolution(space, config(**changes), seed)


def step(evolution: Evolution, scores: Scores = toy) -> list[tuple[Architecture, str]]:
    proposed = evolution.propose()
    evolution.record(proposed, [scores(a, n) for a, n in proposed])
    return proposed


def run(evolution: Evolution, scores: Scores = toy) -> Evolution:
    while not evolution.over:
        step(evolution, scores)
    return evolution


def by_keys(evolution: Evolution) -> list[str]:
    return [c.key for c in evolution.seen]


@pytest.fixture
def parents(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Architecture, int]]:
    """What every mutation started from, and how many changes it made."""
    seen: list[tuple[Architecture, int]] = []
    mutate = module.mutate

    def spy(architecture: Architecture, space: Space, count: int, *more: Any) -> Architecture:
        seen.append((architecture, count))
        return mutate(architecture, space, count, *more)

    monkeypatch.setattr(module, "mutate", spy)
    return seen


def test_proposals_are_a_function_of_seed_generation_and_past() -> None:
    one, two = start(seed=7), start(seed=7)
    while not one.over:
        np.random.seed(one.generation)  # noqa: NPY002 (the global generator must not matter)
        assert one.propose() == one.propose()
        assert step(one) == step(two)
    assert one.to_json() == two.to_json()
    assert by_keys(run(start(seed=8))) != by_keys(one)
    assert start(seed=8).propose() != start(seed=7).propose()


def test_every_generation_draws_anew() -> None:
    evolution = start(strategy="random", generations=6)
    run(evolution)
    generations = [[c.key for c in evolution.seen if c.generation == g] for g in range(7)]
    assert [len(g) for g in generations] == [8] + [3] * 6
    other = start(strategy="random", generations=6)
    other.generation = 1
    assert [n for _, n in other.propose()] != generations[0][:3]


@pytest.mark.parametrize("strategy", ["evolution", "random"])
def test_no_network_is_scored_twice_and_all_belong_to_the_space(strategy: str) -> None:
    small = Space(2, ("fc", "sum"), ("efc",), (8,), (4, 6), 2, 2, 8)  # some thousand encodings, many of them equal
    evolution = run(start(small, strategy=strategy, generations=15))
    names = by_keys(evolution)
    assert len(set(names)) == len(names) == 8 + 15 * 3
    for c in evolution.seen:
        check(small, c.architecture, searched=True, where="test")
        assert c.key == key(c.architecture)
    assert [c.generation for c in evolution.seen] == [0] * 8 + [g for g in range(1, 16) for _ in range(3)]


def test_the_oldest_leave_however_good_they_are() -> None:
    age = iter(range(1000))
    evolution = start()

    def worse_and_worse(architecture: Architecture, name: str) -> Score:
        return Score(0.4 + 0.001 * next(age), 1, 1)

    step(evolution, worse_and_worse)
    assert evolution.population == list(range(8))
    for generation in range(1, 13):
        step(evolution, worse_and_worse)
        born = 8 + 3 * generation
        assert len(evolution.seen) == born
        assert evolution.population == list(range(born - 8, born))
    assert evolution.over and evolution.generation == 13
    assert evolution.best(1)[0] is evolution.seen[0]  # remembered all the same


@pytest.mark.parametrize("drawn", [1, 4, 7, 8])
def test_the_parent_is_the_best_of_those_drawn(drawn: int, parents: list[tuple[Architecture, int]]) -> None:
    evolution = start(parents=drawn, generations=40)
    step(evolution)
    ranks = []
    while not evolution.over:
        alive = sorted((evolution.seen[i] for i in evolution.population), key=lambda c: c.fitness)
        parents.clear()
        step(evolution)
        assert len({id(a) for a, _ in parents}) == 1  # one parent for all children
        assert {n for _, n in parents} == {mutations_at(evolution.generation - 2, 40)}
        ranks.append([c.architecture for c in alive].index(parents[0][0]))
    # The best of k different ones of eight is among the first 8 - k + 1.
    assert max(ranks) <= 8 - drawn
    assert len(set(ranks)) == (1 if drawn == 8 else 2 if drawn == 7 else len(set(ranks)))
    assert min(ranks) == 0
    if drawn == 1:
        assert max(ranks) == 7
    expected = (8 + 1) / (drawn + 1) - 1  # of the least of k ranks without replacement
    assert np.mean(ranks) == pytest.approx(expected, abs=1.2)


def test_random_search_looks_at_no_score(parents: list[tuple[Architecture, int]]) -> None:
    def other(architecture: Architecture, name: str) -> Score:
        return Score(1 - toy(architecture, name).logloss, 1, 1)

    one, two = run(start(strategy="random")), run(start(strategy="random"), other)
    assert by_keys(one) == by_keys(two)
    assert not parents
    evolved = run(start())
    assert parents and len(evolved.seen) == len(one.seen)
    assert by_keys(evolved)[:8] == by_keys(one)[:8]
    assert by_keys(run(start(), other))[8:] != by_keys(evolved)[8:]


def test_evolution_beats_random_search() -> None:
    found = {s: [run(start(seed=n, strategy=s, generations=25)) for n in range(5)] for s in ("evolution", "random")}
    means = {s: np.mean([np.mean([c.fitness for c in e.best(5)]) for e in searches]) for s, searches in found.items()}
    assert means["evolution"] < means["random"] - 0.002


def test_children_that_were_seen_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    evolution = start()
    step(evolution)
    seen = [c.architecture for c in evolution.seen]
    news = [a for a, _ in start(seed=99).propose() if key(a) not in by_keys(evolution)][:3]
    queue = [*seen, news[0], news[0], seen[3], news[1], news[0], news[1], news[2]]
    monkeypatch.setattr(module, "mutate", lambda *_: queue.pop(0))
    assert [a for a, _ in evolution.propose()] == news
    assert not queue


def test_a_generation_without_news_is_empty_and_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    evolution = start()
    step(evolution)
    before, calls = evolution.to_json(), []

    def same(parent: Architecture, *_: Any) -> Architecture:
        calls.append(parent)
        return parent

    monkeypatch.setattr(module, "mutate", same)
    monkeypatch.setattr(module, "draw", lambda *_: evolution.seen[0].architecture)
    assert step(evolution) == []
    assert len(calls) <= 3 * TRIES
    after = evolution.to_json()
    assert after["generation"] == before["generation"] + 1
    assert (after["seen"], after["population"]) == (before["seen"], before["population"])


def test_a_parent_whose_children_were_all_seen_gives_way_to_random_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    evolution = start()
    step(evolution)
    monkeypatch.setattr(module, "mutate", lambda parent, *_: parent)
    found = [name for _, name in step(evolution)]
    assert len(set(found)) == 3 and evolution.population == list(range(3, 11))


@pytest.mark.parametrize("strategy", ["evolution", "random"])
@pytest.mark.timeout(60)
def test_a_space_that_runs_out_of_networks_ends_the_search(strategy: str) -> None:
    evolution = run(start(ONE_BLOCK, strategy=strategy, population=3, parents=2, children=2, generations=30))
    assert evolution.over
    assert len(set(by_keys(evolution))) == len(evolution.seen) == 4
    assert evolution.population == [1, 2, 3]
    few = run(start(ONE_BLOCK, strategy=strategy, population=20, parents=20, children=20, generations=2))
    assert len(few.seen) == 4 and few.over
    assert len(few.best(15)) == 4


def test_best_are_of_distinct_logloss() -> None:
    evolution = start(cost="flops", cost_weight=0.1, cost_target=100.0)
    proposed = evolution.propose()
    losses, costs = [0.5, 0.4, 0.4, 0.45, 0.5, 0.41, 0.4, 0.6], [100, 300, 100, 100, 50, 100, 200, 1]
    evolution.record(proposed, [Score(x, y, 1) for x, y in zip(losses, costs)])
    found = evolution.best(10)
    assert [(c.score.logloss, c.score.flops) for c in found] == [
        (0.4, 100),
        (0.41, 100),
        (0.45, 100),
        (0.5, 50),
        (0.6, 1),
    ]
    assert [c.fitness for c in found] == sorted(c.fitness for c in found)
    assert evolution.best(2) == found[:2]


@pytest.mark.parametrize("cost", ["flops", "parameters", "latency"])
def test_the_front_is_what_nothing_dominates(cost: str) -> None:
    generator = np.random.default_rng(3)
    evolution = start(population=60)
    proposed = evolution.propose()
    rows = generator.integers(1, 16, len(proposed)).tolist()
    more = generator.integers(0, 6, (len(proposed), 3)).tolist()  # what is dearer is better, more or less
    scores = [Score((20 - n) / 40, n + a, n + b, (n + c) / 4) for n, (a, b, c) in zip(rows, more)]
    evolution.record(proposed, scores)
    points = {(getattr(c.score, cost), c.score.logloss) for c in evolution.seen}
    expected = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    found = [(getattr(c.score, cost), c.score.logloss) for c in evolution.pareto(cost)]
    assert found == sorted(expected)
    assert len(found) > 2


@pytest.mark.parametrize("cost", ["flops", "parameters", "latency"])
def test_the_cost_joins_the_fitness(cost: str) -> None:
    score = Score(0.45, 3000, 200, 1.5)
    evolution = start(cost=cost, cost_weight=0.2, cost_target=1000.0)
    assert evolution.fitness(score) == pytest.approx(0.45 + 0.2 * (getattr(score, cost) / 1000 - 1))
    at_target = Score(0.45, 1000, 1000, 1000.0)
    assert evolution.fitness(at_target) == 0.45
    assert start(cost=cost, cost_weight=0.0).fitness(score) == 0.45
    assert start().fitness(score) == 0.45


def test_a_dear_cost_is_searched_for() -> None:
    cheap = run(start(cost="flops", cost_weight=5.0, cost_target=24000.0, generations=30))
    best = cheap.best(1)[0]
    assert best.score.flops == min(c.score.flops for c in cheap.seen)
    for c in cheap.seen:
        assert c.fitness == c.score.logloss + 5.0 * (c.score.flops / 24000 - 1)
    free = run(start(cost="flops", cost_weight=0.0, generations=30))
    assert [c.fitness for c in free.seen] == [c.score.logloss for c in free.seen]


def widths_of(architecture: Architecture) -> float:
    return float(sum(b.dense_width for b in architecture.blocks))


@pytest.mark.parametrize("strategy", ["evolution", "random"])
def test_no_candidate_is_outside_of_the_limits_of_the_cost(strategy: str) -> None:
    free = [widths_of(c.architecture) for c in run(start(strategy=strategy)).seen]
    assert min(free) < 32 and max(free) > 32
    limited = start(strategy=strategy, cost="flops", cost_at_least=32, cost_at_most=32)
    limited.limits = Limits(limited.config, widths_of)
    found = [widths_of(c.architecture) for c in run(limited).seen]
    assert len(found) == len(free) and set(found) == {32}


def test_a_search_that_has_seen_all_within_its_limits_does_not_look_long_for_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited = start(ONE_BLOCK, cost="flops", cost_at_most=8)
    asked: list[int] = []

    def cost(architecture: Architecture) -> float:
        asked[-1] += 1
        return widths_of(architecture)

    limited.limits = Limits(limited.config, cost)
    monkeypatch.setattr(module, "LIMITED_TRIES", 1000)
    while not limited.over:
        asked.append(0)
        step(limited)
    assert len(limited.seen) == 4  # the whole space
    assert asked[0] > 1000 and max(asked[1:]) <= 2 * TRIES


def test_limits_that_no_network_keeps_are_told_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embsearch_dist.methods.nasrec.evolution.LIMITED_TRIES", 500)
    narrow = start(cost="flops", cost_at_most=1.0)
    narrow.limits = Limits(narrow.config, widths_of)
    with pytest.raises(UserError, match=r"cost_at_most 1: of 500 .* they have \d+ to \d+\. Set other limits"):
        narrow.propose()


@pytest.mark.parametrize("generation", [0, 1, 6, 13])
def test_a_search_that_was_written_and_read_goes_on_as_if_nothing_was(generation: int) -> None:
    options: dict[str, Any] = {"cost": "latency", "cost_weight": 0.01, "cost_target": 0.3}
    unbroken, broken = start(seed=4, **options), start(seed=4, **options)
    for _ in range(generation):
        step(unbroken)
        step(broken)
    text = json.dumps(broken.to_json())
    again = start(seed=4, **options)
    again.load_json(json.loads(text), "evolution.json")
    assert again.seen == broken.seen
    assert json.dumps(again.to_json()) == text
    assert json.dumps(run(again).to_json()) == json.dumps(run(unbroken).to_json())
    assert all(isinstance(c, Candidate) and isinstance(c.score.flops, int) for c in again.seen)


def _damage(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    evolution = start()
    step(evolution)
    step(evolution)
    body = json.loads(json.dumps(evolution.to_json()))
    change(body)
    return body


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.pop("generation"),
        lambda b: b.pop("population"),
        lambda b: b.pop("seen"),
        lambda b: b.update(generation="soon"),
        lambda b: b.update(population=["first"]),
        lambda b: b.update(population=None),
        lambda b: b.update(seen=3),
        lambda b: b["seen"].insert(0, "candidate"),
        lambda b: b["seen"][2].pop("logloss"),
        lambda b: b["seen"][2].pop("blocks"),
        lambda b: b["seen"][2].pop("key"),
        lambda b: b["seen"][2]["blocks"][1].pop("fm"),
        lambda b: b["seen"][2]["blocks"][1].update(dense="convolution"),
        lambda b: b["seen"][2]["blocks"][0].update(sparse_sources=[2]),
    ],
)
def test_a_broken_file_is_named(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(UserError, match=r"runs/x/evolution\.json"):
        start().load_json(_damage(change), "runs/x/evolution.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(population=[*range(7), 99]),
        lambda b: b.update(population=[*range(7), -1]),
        lambda b: b["seen"][2].update(fitness="low"),
        lambda b: b["seen"][2].update(logloss=None),
        lambda b: b["seen"].__delitem__(slice(4, None)),
        lambda b: b["seen"][2]["blocks"].pop(),
        lambda b: b["seen"][2]["blocks"][0].update(dense_width=5),
    ],
    ids=["place", "negative", "fitness", "logloss", "cut", "blocks", "width"],
)
def test_a_file_that_would_break_the_search_later_is_named(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(UserError, match=r"runs/x/evolution\.json"):
        start().load_json(_damage(change), "runs/x/evolution.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.evolution.strategy=evolve", "search.evolution.strategy: 'evolve' is none of evolution, random"),
        ("search.evolution.children=0", "search.evolution.children: must be at least 1"),
        ("search.evolution.children=200", "search.evolution.children: must not exceed the population"),
        ("search.evolution.parents=200", "search.evolution.parents: must not exceed the population"),
        ("search.evolution.generations=-1", "search.evolution.generations: must be >= 0"),
        ("search.evolution.cost_weight=0.1", "search.evolution.cost: search.evolution.cost_weight needs a cost"),
        ("search.evolution.cost_at_most=1e6", "search.evolution.cost: must be one of flops.*where it has limits"),
        ("search.evolution.cost_at_most=-1", "search.evolution.cost_at_most: must be >= 0"),
        ("search.scoring.tune_lr=0", "search.scoring.tune_lr: must be above 0"),
        ("search.sampling.scheme=single", "search.sampling.scheme: 'single' is none of"),
        ("search.sampling.warmup=1.5", r"search.sampling.warmup: must be in \[0, 1\]"),
        ("search.space.name=ful", "search.space.name: 'ful' is none of full, small"),
        ("search.space.dense_operators=[fc,mlp]", "search.space.*'mlp' is none of"),
        ("search.space.width=12", "search.space.*attention has 8 heads"),
    ],
)
def test_a_setting_out_of_range_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"config key {message}"):
        load_config({"nasrec": NASRecConfig}, None, [override], method="nasrec")
