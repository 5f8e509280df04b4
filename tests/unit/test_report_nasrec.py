"""Report of a search for networks: the network found, the search's course, logloss over FLOPs, no word of widths."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import key
from embsearch_dist.networks.cost import network_cost
from embsearch_dist.networks.space import Space
from embsearch_dist.report import networks as architectures
from embsearch_dist.report import write_report
from embsearch_dist.report.network_plots import ceiling, populations, usage_of
from embsearch_dist.report.networks import best, headline
from embsearch_dist.report.runs import load_run, load_runs
from embsearch_dist.report.summary import compare
from embsearch_dist.schema import Field, Schema

SCHEMA = Schema("toy", tuple(Field(f"f{k}", 10 * (k + 1)) for k in range(5)), dense=("x",), rows={"train": 800})
SPACE = Space(blocks=2, dense_widths=(16, 32), sparse_widths=(8, 16))
LOGLOSSES = [0.5, 0.49, 0.52, 0.505, 0.47, 0.48, 0.46, 0.475, 0.465, 0.6]  # four at random, then three times two
EVOLUTION = {"strategy": "evolution", "population": 4, "generations": 3, "children": 2, "keep": 3, "cost": "none"}


def network(dense: str, width: int = 16, sparse: str = "efc", chained: bool = True) -> Architecture:
    """Two blocks; the second reads the first, or, not ``chained``, leaves it unread."""
    first = Block((dense,), width, (sparse,), 8, (0,), (0,), (0,), (0,), True, False)
    source = (1 if chained else 0,)
    second = Block((dense,), 32, (sparse,), 16, source, source, source, source, False, True)
    return Architecture((first, second))


NETWORKS = [
    network("fc"), network("fc", 32), network("sum", chained=False), network("sum"), network("gating"),
    network("gating", 32), network("dot_product"), network("dot_product", 32), network("dot_product", 32, "attention"),
    network("dot_product", 16, "attention"),
]  # fmt: skip
BEST = [6, 8, 4]


def scored(place: int, weight: float = 0.0) -> dict[str, Any]:
    cost = network_cost(NETWORKS[place], SPACE, 1, 5).total
    generation = 0 if place < 4 else (place - 4) // 2 + 1
    body = {"logloss": LOGLOSSES[place], "flops": cost.flops, "parameters": cost.parameters, "latency": 0.0}
    body |= {"generation": generation, "fitness": LOGLOSSES[place] + weight * cost.flops}
    return {**body, "key": key(NETWORKS[place]), "blocks": NETWORKS[place].to_json()["blocks"]}


def search(path: Path, count: int = 10, weight: float = 0.0, **settings: Any) -> Path:
    """A run directory as the search leaves it; with fewer than ten networks it is under way."""
    SCHEMA.save(path)
    (path / "config.yaml").write_text("method: nasrec\n")
    evolution = {**EVOLUTION, "cost_weight": weight, **settings}
    seen = [scored(k, weight) for k in range(count)]
    body: dict[str, Any] = {"signature": {"evolution": evolution, "scoring": {}, "space": SPACE.to_json(), "seed": 0}}
    body |= {"generation": 1 + (count - 4) // 2, "population": list(range(count - 4, count)), "seen": seen}
    write_json(path / "evolution.json", body)
    lines = [{"time": 1e9, "stage": "supernet", "step": k, "loss": 0.6 - 0.001 * k} for k in range(60)]
    for k in range(count // 2 - 1):
        values = {"best": 0.5 - 0.01 * k, "population_mean": 0.51, "population_best": 0.5, "flops_mean": 1000.0}
        lines.append({"time": 1e9 + k, "stage": "evolution", "step": k, **values})
    write_lines(path / "metrics.jsonl", lines)
    if count == 10:
        for rank, place in enumerate(BEST, 1):
            save(path / "architectures" / f"rank-{rank}.json", place, rank)
        save(path / "architecture.json", BEST[0], 1)
    return path


def save(path: Path, place: int, rank: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {k: v for k, v in scored(place).items() if k in ("logloss", "fitness", "flops", "parameters", "latency")}
    provenance = {"method": "nasrec", "name": "nasrec", "seed": 0, "rank": rank, **numbers}
    NETWORKS[place].save(path, space=SPACE.to_json(), provenance=provenance)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def trained(path: Path, name: str, logloss: float, place: int | None, seed: int = 0, width: int = 16) -> Path:
    """A retraining with the network of that place, or with DeepFM, behind it."""
    sub = path / "retrain" / (name + f"-seed{seed}" * (seed > 0))
    allocation = Allocation.uniform(SCHEMA, width)
    cost = network_cost(NETWORKS[place or 0], SPACE, 1, 5).total
    body = {
        "name": name, "seed": seed, "split": "test", "auc": 1.2 - logloss, "logloss": logloss, "dense_parameters": 10,
        "embedding_parameters": allocation.total("parameters"), "widths": allocation.widths,
        "flops_per_sample": 1000.0 if place is None else float(cost.flops),
        "backbone": "deepfm" if place is None else "nasrec",
    }  # fmt: skip
    write_json(sub / "evaluation.json", body)
    allocation.save(sub / "allocation.json")
    SCHEMA.save(sub)
    if place is not None:
        save(sub / "architecture.json", place, 1)
    return sub


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = search(tmp_path_factory.mktemp("runs") / "toy")
    write_json(path / "truth.json", {"rank": {f"f{k}": k for k in range(5)}, "bayes_auc": 0.9, "bayes_logloss": 0.3219})
    trained(path, "nasrec", 0.45, 6)
    trained(path, "nasrec", 0.44, 6, seed=1)
    trained(path, "second", 0.43, 8)
    trained(path, "by_hand", 0.5, 0)
    for seed in range(2):
        trained(path, "ues-16", 0.46, None, seed, width=16)
        trained(path, "ues-32", 0.455, None, seed, width=32)
    return path


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return write_report([full]).read_text()


def test_sections_are_those_of_a_search_for_networks(html: str, full: Path) -> None:
    for title in ("Results", "Network found", "Logloss against FLOPs", "Learning curves", "Search"):
        assert f"<h2>{title}</h2>" in html
    # No widths were searched, and no field was compared with its planted rank.
    for title in ("Widths found", "Size against quality", "Planted truth", "Stability", "Probabilities over time"):
        assert f"<h2>{title}</h2>" not in html
    assert "Not in this run directory" not in html and "is not in this run directory" not in html
    for name in ("network", "network-cost", "evolution", "usage"):
        assert f'id="plot-{name}"' in html and (full / "report" / f"{name}.png").exists()
    assert "The found widths" not in html and "the one model that holds every candidate width" not in html
    assert "any model can reach on this data is 0.3219" in html


def test_an_auc_that_is_undefined_is_left_out_of_the_headline(tmp_path: Path) -> None:
    path = search(tmp_path / "toy")
    for name, logloss, place in (("nasrec", 0.45, 6), ("ues-16", 0.46, None)):
        file = trained(path, name, logloss, place) / "evaluation.json"
        write_json(file, json.loads(file.read_text()) | {"auc": None, "auc_undefined": "rows of one class"})
    runs = load_runs([path])
    first, against, *_ = headline(runs, compare(runs))
    assert first.startswith("The found network (nasrec) reaches a logloss of 0.4500 and no AUC (rows of one class) on")
    assert against.startswith("Against UES-16 (deepfm, 0.4600) its logloss is 0.0100 lower, with ")


def test_headline_compares_networks_behind_tables_of_one_width(full: Path) -> None:
    runs = load_runs([full])
    first, against, better = headline(runs, compare(runs))
    assert first == (
        "The found network (nasrec) reaches a logloss of 0.4450 and an AUC of 0.7550 on the test split "
        "(mean of 2 runs)."
    )
    share = network_cost(NETWORKS[6], SPACE, 1, 5).total.flops / 1000
    assert against.startswith(
        "Against UES-16 (deepfm, 0.4600 and 0.7400) its logloss is 0.0150 lower and its AUC 0.0150 "
    )
    assert against.endswith(f"with {share:.0%} of the FLOPs and as many embedding parameters.")
    assert better == "Of the networks trained from scratch, second (found, rank 2) has the lowest logloss, 0.4300."


def test_results_name_what_stands_behind_the_tables(html: str) -> None:
    for name, behind in (("nasrec", "found, rank 1"), ("second", "found, rank 2"), ("by_hand", "another architecture")):
        assert f'<td>{name}</td><td class="text">{behind}</td>' in html
    assert '<td>UES-16</td><td class="text">deepfm</td>' in html
    assert '<th scope="col">Model</th>' in html and '<th scope="col">Widths</th>' not in html


def test_table_of_the_best_has_what_became_of_them(html: str) -> None:
    lines = [line for line in html.splitlines() if line.startswith("<tr") and "<td>2</td>" in line and "0.4" in line]
    for place, rank, generation, name, logloss, auc in (
        (6, 1, 2, "nasrec", "0.4450", "0.7550"), (8, 2, 3, "second", "0.4300", "0.7700"), (4, 3, 1, "-", "-", "-"),
    ):  # fmt: skip
        cost = network_cost(NETWORKS[place], SPACE, 1, 5).total
        cells = f"<td>{rank}</td><td>{LOGLOSSES[place]:.5f}</td><td>{cost.flops:,}</td><td>{cost.parameters:,}</td>"
        cells += f'<td>{generation}</td><td>2</td><td class="text">{name}</td><td>{logloss}</td><td>{auc}</td>'
        assert any(cells in line for line in lines), cells
    assert "The 3 best lie within 0.01000 of each other." in html


def test_search_in_words(html: str) -> None:
    assert "The search scored 10 networks. The best has a logloss of 0.46000 (generation 2); the best of the 4" in html
    assert "drawn at random had 0.49000, 0.03000 more. The mean of the living fell from 0.50375 to 0.50000." in html
    assert "dots lie above the frame" not in html


def test_populations_age(full: Path) -> None:
    evolution = load_run(full).evolution
    assert evolution is not None and evolution.over
    points = populations(evolution)
    assert [p.scored for p in points] == [4, 6, 8, 10]
    # Of ten the last four live: the best random one is gone after the second generation.
    assert [p.mean for p in points] == pytest.approx([0.50375, 0.49375, 0.47125, 0.5])
    assert [p.best for p in points] == [0.49, 0.47, 0.46, 0.46]
    flops = [scored(k)["flops"] for k in range(10)]
    assert [p.flops for p in points] == pytest.approx([sum(flops[a : a + 4]) / 4 for a in (0, 2, 4, 6)])


def test_usage_counts_what_enters_the_prediction(full: Path) -> None:
    evolution = load_run(full).evolution
    assert evolution is not None
    shares = usage_of(evolution.scored[:4], SPACE)  # two of fc, two of sum, of which one leaves its first block unread
    assert shares["Dense operator"] == pytest.approx({"FC": 4 / 7, "Dot product": 0, "Gating": 0, "Sum": 3 / 7})
    assert shares["Blocks in use"] == {"1": 0.25, "2": 0.75}
    assert shares["Dense width (columns)"] == pytest.approx({"16": 2 / 7, "32": 5 / 7})
    assert shares["Sparse width (tokens)"] == pytest.approx({"8": 3 / 7, "16": 4 / 7})
    fm, tokens = shares["Mergers"].values()
    assert fm == pytest.approx(4 / 7) and tokens == pytest.approx(3 / 7)
    last = usage_of(evolution.scored[-4:], SPACE)
    assert last["Sparse operator"] == {"EFC": 0.5, "Attention": 0.5} and last["Dense operator"]["Dot product"] == 1


def test_the_worst_of_many_may_lie_outside_the_frame() -> None:
    assert ceiling([0.5, 0.9]) == 0.9
    assert ceiling([k / 100 for k in range(99)] + [7.0] * 2) == 0.98
    points = populations_of([0.5] * 98 + [9.0] * 2 + [0.5])
    assert ceiling([0.5] * 101, points) == pytest.approx(points[0].mean)  # never a line


def populations_of(fitness: list[float]) -> list[Any]:
    from embsearch_dist.report.runs import Evolution, Network

    networks = [Network(NETWORKS[0], "", {"generation": 0, "fitness": f, "flops": 1}) for f in fitness]
    return populations(Evolution(networks, len(networks), 1, {}))


def test_search_under_way(tmp_path: Path) -> None:
    text = write_report([search(tmp_path / "run", 6)]).read_text()
    assert "The search has so far found a network of 2 blocks with" in text and "the best of 6 that were" in text
    assert "The search scored 6 networks so far (2 of 4 generations)." in text
    assert "<h2>Best network so far</h2>" in text and "<td>1</td><td>0.47000</td>" in text
    assert "No retrained model has been evaluated, so the second panel is missing." in text
    assert "allocation.json" not in text and "heatmaps.jsonl" not in text and "pareto.json" not in text


def test_before_anything_was_scored(tmp_path: Path) -> None:
    search(tmp_path)
    for name in ("evolution.json", "architecture.json"):
        (tmp_path / name).unlink()
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "supernet", "step": k, "loss": 0.6} for k in range(5)])
    text = write_report([tmp_path]).read_text()
    assert "No network has been scored yet (recorded so far: supernet): there is no result." in text
    assert "Training of the supernet, the one model that holds the weights of every network." in text
    assert "allocation.json" not in text


@pytest.mark.parametrize("name", ["architecture.json", "evolution.json", "metrics.jsonl"])
def test_a_single_file_is_enough(full: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((full / name).read_bytes())
    text = write_report([tmp_path]).read_text()
    assert ('id="plot-evolution"' in text) == (name != "architecture.json")
    assert ("Not drawn: schema.json" in text) == (name != "metrics.jsonl")
    assert ("with each, is missing" in text) == (name == "metrics.jsonl")


def test_random_search_has_no_descent(tmp_path: Path) -> None:
    found = architectures.search([load_run(search(tmp_path, strategy="random"))], tmp_path / "out")
    assert found is not None and 'id="plot-usage"' not in found.body and "parents" not in found.body
    assert "All were drawn at random; the lines are mean and best of the last 4, the diamond" in found.body


def test_a_first_population_of_a_prefilter_is_not_called_random(full: Path, tmp_path: Path) -> None:
    body = json.loads((full / "evolution.json").read_text())
    body["signature"]["prefilter"] = {"proxies": ["snip"], "sample": 8, "keep": 0.5, "rows": 128}
    (tmp_path / "evolution.json").write_text(json.dumps({k: v for k, v in body.items() if k != "sha256"}))
    found = architectures.search([load_run(tmp_path)], tmp_path / "out")
    assert found is not None
    assert "The first 4 (shaded) were kept by the prefilter or drawn at random and live." in found.body
    assert "the best of the 4 kept by the prefilter or drawn at random had 0.49000" in found.body


def test_cost_in_the_score(tmp_path: Path) -> None:
    text = write_report([search(tmp_path, weight=1e-5, cost="flops")]).read_text()
    assert '<th scope="col">Score</th>' in text and "The best has a score of" in text
    assert "What a network costs (flops) is added to its score" in text and "by logloss and cost" in text


def test_several_runs(full: Path, tmp_path: Path) -> None:
    shutil.copytree(full, tmp_path / "other", ignore=shutil.ignore_patterns("report"))
    text = write_report([full, tmp_path / "other"], tmp_path / "out").read_text()
    assert 'id="plot-network-2"' in text and "<td>other 1</td>" in text and "Shown for toy." in text
    assert "mean of 4 runs" in text


def test_what_was_trained_is_shown_by_itself(full: Path, tmp_path: Path) -> None:
    sub = full / "retrain" / "nasrec"
    text = write_report([sub], tmp_path).read_text()
    assert 'id="plot-network"' in text and "The found network (nasrec)" in text
    assert "Widths found" not in text and "allocation.json" not in text and "dots" not in text


def test_searched_widths_behind_a_network_stay_searched_widths(tmp_path: Path) -> None:
    sub = trained(search(tmp_path), "adass", 0.42, 6)
    widths = {f"f{k}": 4 * k for k in range(5)}
    Allocation(SCHEMA, widths).save(sub / "allocation.json")
    write_json(sub / "evaluation.json", json.loads((sub / "evaluation.json").read_text()) | {"widths": widths})
    trained(tmp_path, "nasrec", 0.44, 6)
    assert load_run(sub).widths == widths and load_run(tmp_path / "retrain" / "nasrec").widths is None
    runs = load_runs([tmp_path])
    first, none, better = headline(runs, compare(runs))
    assert first.startswith("The found network (nasrec) reaches a logloss of 0.4400")
    assert none == "No other model was trained to compare it with."
    assert better.startswith(
        "Of the networks trained from scratch, adass (found, rank 1) has the lowest logloss, 0.4200"
    )
    found = architectures.found(runs, tmp_path / "out")
    assert found is not None and '<td class="text">nasrec</td><td>0.4400</td>' in found.body
    assert "adass" not in found.body  # other tables than those it was searched with


def test_rank_correlation_needs_five(full: Path, tmp_path: Path) -> None:
    search(tmp_path, keep=10)
    for rank, place in enumerate([6, 8, 4, 7, 5], 1):
        save(tmp_path / "architectures" / f"rank-{rank}.json", place, rank)
        trained(tmp_path, f"n{rank}", 0.4 - 0.01 * rank, place)
    run = load_run(tmp_path)
    found = architectures.found([run], tmp_path / "out")
    assert found is not None
    # The search's order is the reverse of the trained networks'.
    assert "logloss of the 5 trained ones is -1.00 (1: the same order)" in found.body


def test_best_leaves_out_networks_of_one_logloss(tmp_path: Path) -> None:
    run = load_run(search(tmp_path, 6))
    assert run.evolution is not None and not run.networks and not math.isnan(best(run)[0].number("flops"))
    run.evolution.scored[0].numbers |= {"logloss": 0.47, "fitness": 0.47}
    assert [n.number("logloss") for n in best(run)] == [0.47, 0.48, 0.49]


def test_errors_name_the_file(tmp_path: Path) -> None:
    search(tmp_path)
    body = json.loads((tmp_path / "evolution.json").read_text())
    write_json(tmp_path / "evolution.json", {**body, "seen": [{"key": "x"}]})
    with pytest.raises(UserError, match=r"evolution\.json: not the state of a search"):
        load_run(tmp_path)
    write_json(tmp_path / "evolution.json", body)
    write_json(tmp_path / "architecture.json", {"format": 1, "kind": "architecture", "blocks": []})
    with pytest.raises(UserError, match=r'architecture\.json: "blocks" must be a list'):
        load_run(tmp_path)
