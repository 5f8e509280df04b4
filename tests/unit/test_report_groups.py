"""Report of searches by instances: histograms of gates, groups, their widths, routed results, planted populations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.report import write_report
from embsearch_dist.report.groups import peaks
from embsearch_dist.report.plots import group_widths
from embsearch_dist.report.runs import load_runs
from embsearch_dist.report.style import LIGHT
from embsearch_dist.report.summary import compare, percent
from embsearch_dist.schema import Field, Schema

BINS = 50
NAMES = ["tell0", "p0_a", "p1_a", "p2_a", "a_field_of_a_very_long_name_that_is_cut", "p0_b", "p1_b", "idle<0>"]
SCHEMA = Schema("toy", tuple(Field(n, 20 * 3**k) for k, n in enumerate(NAMES)), rows={"train": 8000, "test": 1000})
RANKS = {"0": [0, 8, 2, 0, 4, 8, 2, 0], "1": [0, 0, 0, 8, 4, 0, 0, 0]}
# Group 0 follows population 1 and group 1 population 0.
WIDTHS = ([0, 1, 0, 12, 6, 0, 1, 0], [1, 12, 4, 0, 6, 11, 3, 0])
ROWS = ({"train": 6000, "validation": 600, "test": 700}, {"train": 2000, "validation": 200, "test": 300})
ALLOCATIONS = tuple(Allocation(SCHEMA, dict(zip(NAMES, w, strict=True))) for w in WIDTHS)
GROUPED = GroupedAllocation(SCHEMA, ALLOCATIONS, ROWS, {"method": "ihas", "name": "ihas", "seed": 0})
ROUTER = 16 * sum(SCHEMA.cardinalities)


def bumps(*parts: tuple[float, float, float]) -> np.ndarray:
    """Histogram of bumps (centre, spread, weight), normalised."""
    x = (np.arange(BINS) + 0.5) / BINS
    every = np.sum([w * np.exp(-(((x - c) / s) ** 2) / 2) for c, s, w in parts], axis=0)
    return np.asarray(every / every.sum())


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def gate_lines(count: int = 20) -> list[dict[str, Any]]:
    edges = [f"{k / BINS:.2f}" for k in range(BINS)]
    lines = []
    for t in range(count):
        gap = 0.45 * t / max(1, count - 1)
        shares = bumps((0.7 - 1.5 * gap, 0.06, 2.0), (0.7 + 0.55 * gap, 0.05, 1.0))
        body = {"stage": "gates", "step": 100 * (t + 1), "name": "probabilities", "rows": ["share"], "columns": edges}
        lines.append({**body, "values": [shares.tolist()]})
    return lines


def kept_line(groups: int = 2) -> dict[str, Any]:
    columns = [f"group {k}" for k in range(groups)]
    values = [[(w[k] + 0.5) / 16 for w in WIDTHS[:groups]] for k in range(len(NAMES))]
    return {"stage": "groups", "step": 0, "name": "kept", "rows": NAMES, "columns": columns, "values": values}


def training(stage: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(60):
        lines.append({"time": 1e9 + step, "stage": stage, "step": step, "loss": 0.4 + 0.3 * math.exp(-step / 9)})
    for step, auc in ((30, 0.7), (59, 0.72)):
        line = {"time": 1e9, "stage": stage, "step": step, "split": "validation", "auc": auc, "logloss": 0.5}
        lines.append(line)
    return lines


def cluster_lines(passes: int) -> list[dict[str, Any]]:
    lines = [{"time": 1e9, "stage": "groups", "step": k, "distance": 12.5 - k} for k in range(passes)]
    return lines + [{"time": 1e9, "stage": "groups", "step": k, "rows_train": ROWS[k]["train"]} for k in range(2)]


def routed_body(kind: str, seed: int, auc: float) -> dict[str, Any]:
    tables = ROUTER if kind == "centres" else 120
    parts = []
    for rows, own, part_auc in zip(ROWS, ALLOCATIONS, (0.7311, None), strict=True):
        figures = {"rows": rows["test"], "auc": part_auc, "logloss": 0.51}
        parts.append({**figures, "widths": own.widths, "embedding_parameters": own.total("parameters")})
    return {
        "name": "ihas", "seed": seed, "split": "test", "rows": 1000, "auc": auc, "logloss": 0.4321,
        "embedding_parameters": GROUPED.total("parameters") + tables, "dense_parameters": 100, "groups": parts,
        "router": {"kind": kind, "embedding_parameters": tables, "agreement": 0.9876, "share_of_time": 0.25},
    }  # fmt: skip


def searched(path: Path, passes: int = 2) -> Path:
    """A run directory as iHAS leaves it."""
    SCHEMA.save(path)
    (path / "config.yaml").write_text("method: ihas\n")
    GROUPED.save(path / "groups.json")
    write_lines(path / "heatmaps.jsonl", [*gate_lines(), kept_line()])
    opened = [{"time": 1e9, "stage": "gates", "step": 100 * k, "open": 0.5} for k in range(20)]
    write_lines(path / "metrics.jsonl", [*training("gates"), *opened, *cluster_lines(passes)])
    return path


def plant(path: Path) -> None:
    ranks = {z: dict(zip(NAMES, r, strict=True)) for z, r in RANKS.items()}
    truth = {
        "rank": {n: max(r[n] for r in ranks.values()) for n in NAMES},
        "ranks": ranks,
        "populations": {"0": {"share": 0.3, "bayes_auc": 0.8}, "1": {"share": 0.7, "bayes_auc": 0.8}},
        "bayes_auc": 0.8765,
        "from_fields": {"bayes_auc": 0.8432},
    }
    write_json(path / "truth.json", truth)


def evaluated(path: Path) -> None:
    for seed, auc in ((0, 0.7421), (1, 0.7441)):
        sub = path / "retrain" / ("ihas" + f"-seed{seed}" * (seed > 0))
        write_json(sub / "evaluation.json", routed_body("centres", seed, auc))
        write_json(sub / "evaluation-fields.json", routed_body("fields", seed, auc - 0.01))
        write_json(sub / "evaluation-validation.json", routed_body("centres", seed, 0.9) | {"split": "validation"})
        for k in range(2):
            write_lines(sub / f"group-{k}" / "metrics.jsonl", training("retrain"))
        uniform = Allocation.uniform(SCHEMA, 32)
        body = {"name": "ues-32", "seed": seed, "split": "test", "auc": 0.74, "logloss": 0.5, "widths": uniform.widths}
        body["embedding_parameters"] = uniform.total("parameters")
        sub = path / "retrain" / f"ues-32-seed{seed}"
        write_json(sub / "evaluation.json", body)
        write_lines(sub / "metrics.jsonl", training("retrain"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = searched(tmp_path_factory.mktemp("runs") / "toy_ihas", passes=6)
    plant(path)
    evaluated(path)
    return path


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return write_report([full]).read_text()


@pytest.fixture(scope="module")
def unevaluated(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report([searched(tmp_path_factory.mktemp("runs") / "plain")]).read_text()


def test_peaks() -> None:
    (one,) = peaks(bumps((0.6, 0.1, 1)))
    assert one.top == pytest.approx(0.6, abs=0.02) and one.end == 1.0 and one.share == pytest.approx(1.0)
    low, high = peaks(bumps((0.1, 0.03, 3), (0.9, 0.03, 1)))
    assert (low.top, high.top) == (pytest.approx(0.1, abs=0.02), pytest.approx(0.9, abs=0.02))
    assert low.share == pytest.approx(0.75, abs=0.01) and low.end == pytest.approx(0.5, abs=0.1)
    assert len(peaks(bumps((0.1, 0.03, 1), (0.5, 0.03, 1), (0.9, 0.03, 1)))) == 3
    # Peaks in the outermost bins: what polarised gates look like.
    assert len(peaks([0.6, *[0.0] * 48, 0.4])) == 2


def test_peaks_are_not_noise() -> None:
    rng = np.random.default_rng(0)
    assert len(peaks(rng.poisson(100, BINS))) == 1
    # A shoulder: the dip before it is not half as deep as the peaks beside it.
    assert len(peaks(bumps((0.3, 0.08, 1), (0.53, 0.08, 1)))) == 1
    # Next to nothing on one side.
    assert len(peaks([0.995, *[0.0] * 48, 0.005])) == 1


def test_a_run_in_groups_lacks_nothing(html: str) -> None:
    assert "Not in this run directory" not in html and "is not in this run directory" not in html
    for title in ("Results", "Groups", "Gates", "Planted truth", "Learning curves"):
        assert f"<h2>{title}</h2>" in html
    for title in ("Widths found", "Search", "Probabilities over time"):
        assert f"<h2>{title}</h2>" not in html


def test_gates_in_words(html: str, full: Path) -> None:
    assert "The last histogram (step 2,000) has two peaks: 65% of the gates around 0.03 and 35%" in html
    assert "The first (step 100) has one peak." in html
    assert (full / "report" / "gates.png").exists()


def test_sizes_and_widths(html: str) -> None:
    cells = "<td>group 0</td><td>6,000</td><td>600</td><td>700</td><td>75%</td><td>4 of 8</td>"
    assert f"{cells}<td>{ALLOCATIONS[0].total('parameters'):,}</td>" in html
    assert '<td class="text">p2_a</td><td>12</td><td>0</td>' in html
    assert '<td class="text">idle&lt;0&gt;</td><td>0</td><td>0</td>' in html
    assert 'id="plot-group-kept"' in html and 'id="plot-group-widths"' in html and 'id="plot-group-distance"' in html


def test_few_passes_of_k_means_are_a_sentence(unevaluated: str) -> None:
    assert "12.5 (pass 1), 11.5 (pass 2)." in unevaluated and "plot-group-distance" not in unevaluated


def test_routed_results(html: str) -> None:
    own = [a.total("parameters") for a in ALLOCATIONS]
    assert f"<td>seed 1, group 0</td><td>700</td><td>70%</td><td>0.7311</td><td>0.5100</td><td>{own[0]:,}</td>" in html
    assert f"<td>seed 0, group 1</td><td>300</td><td>30%</td><td>-</td><td>0.5100</td><td>{own[1]:,}</td>" in html
    whole = f"<td>1,000</td><td>100%</td><td>0.7421</td><td>0.4321</td><td>{sum(own) + ROUTER:,}</td>"
    assert f"<td>seed 0, all groups and router</td>{whole}" in html
    line = f"Router: seed 0, centres; {ROUTER:,} embedding parameters of its own; agreement 98.8%; 25% of the time"
    assert line in html


def test_the_other_router_is_a_result_of_its_own(full: Path, html: str) -> None:
    comparison = compare(load_runs([full]))
    assert comparison is not None and comparison.found == ("ihas",)
    assert comparison.by_name["ihas"].auc.mean == pytest.approx(0.7431)
    assert comparison.by_name["ihas (router: fields)"].auc.mean == pytest.approx(0.7331)
    assert "<h3>ihas (router: fields): a model for each group</h3>" in html
    assert "The found widths (ihas)" in html


def test_curves_of_each_group(full: Path) -> None:
    (run,) = load_runs([full])
    named = [(r.name, r.seed) for r in run.retrains if r.name.startswith("ihas")]
    assert named == [("ihas group 0", 0), ("ihas group 1", 0), ("ihas group 0", 1), ("ihas group 1", 1)]


def test_groups_stand_with_their_populations(html: str) -> None:
    lines = [line for line in html.splitlines() if line.startswith("<tr><td>group") and "population" in line]
    assert len(lines) == 2
    assert lines[0].endswith('<td class="text">population 1</td></tr>')
    assert lines[1].endswith('<td class="text">population 0</td></tr>')
    # What the fields cannot tell is not within reach.
    assert "any model can reach on this data is 0.8432" in html and "0.8765" not in html


def test_data_of_one_population(tmp_path: Path) -> None:
    GROUPED.save(tmp_path / "groups.json")
    write_json(tmp_path / "truth.json", {"rank": dict(zip(NAMES, RANKS["0"], strict=True)), "bayes_auc": 0.81})
    text = write_report([tmp_path]).read_text()
    assert "<h2>Planted truth</h2>" in text and '<td class="text">all rows</td>' in text and "0.8100" in text


def test_before_any_evaluation(unevaluated: str) -> None:
    share = GROUPED.total("parameters") / Allocation.uniform(SCHEMA, 32).total("parameters")
    sizes = (
        f"2 groups (75% and 25% of the training rows) and chose widths for each, together {percent(share)} of UES-32"
    )
    assert sizes in unevaluated


def test_the_values_own_weights_count_in_groups_and_in_uniform_widths(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    grouped = GROUPED.counted(1)
    grouped.save(tmp_path / "groups.json")
    share = grouped.total("parameters") / Allocation.uniform(SCHEMA, 32).counted(1).total("parameters")
    plain = GROUPED.total("parameters") / Allocation.uniform(SCHEMA, 32).total("parameters")
    assert percent(share) != percent(plain)
    text = write_report([tmp_path]).read_text()
    assert f"together {percent(share)} of UES-32" in text
    assert f"<td>{grouped.allocations[0].total('parameters'):,}</td>" in text


@pytest.mark.parametrize("name", ["groups.json", "heatmaps.jsonl", "metrics.jsonl"])
def test_a_single_file_is_enough(full: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((full / name).read_bytes())
    text = write_report([tmp_path]).read_text()
    assert ("<h2>Groups</h2>" in text) == (name == "groups.json")
    assert ("allocation.json" in text) == (name != "groups.json")


def test_one_group_has_an_ordinary_allocation(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    ALLOCATIONS[0].save(tmp_path / "allocation.json")
    write_lines(tmp_path / "heatmaps.jsonl", [kept_line(groups=1)])
    text = write_report([tmp_path]).read_text()
    assert "<h2>Widths found</h2>" in text and "<h2>Kept per field</h2>" in text and "<h2>Groups</h2>" not in text


def test_several_seeds(tmp_path: Path) -> None:
    runs = [tmp_path / f"seed{k}" for k in range(2)]
    for run in runs:
        GROUPED.save(run / "groups.json")
        write_lines(run / "metrics.jsonl", cluster_lines(2))
    text = write_report(runs, tmp_path / "out").read_text()
    assert "<td>seed1 group 1</td><td>2,000</td>" in text and "Shown for seed0." in text
    assert "seed0: 12.5 (pass 1), 11.5 (pass 2); seed1: 12.5" in text


def test_many_groups(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    rows = tuple({"train": 100 + k} for k in range(20))
    GroupedAllocation(SCHEMA, ALLOCATIONS * 10, rows).save(tmp_path / "groups.json")
    values = [[0.5] * 20] * len(NAMES)
    line = kept_line() | {"columns": [f"group {k}" for k in range(20)], "values": values}
    write_lines(tmp_path / "heatmaps.jsonl", [line])
    plant(tmp_path)
    text = write_report([tmp_path]).read_text()
    # Twenty colours cannot be told apart, so there is no picture of dots.
    assert "plot-group-widths" not in text and "plot-group-kept" in text and "<td>group 19</td>" in text


def test_a_controller_chooses_no_widths(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    (tmp_path / "config.yaml").write_text("method: adafs\n")
    write_lines(tmp_path / "metrics.jsonl", training("controller"))
    weights = {"stage": "controller", "name": "field weights", "rows": ["weight"], "columns": NAMES}
    write_lines(tmp_path / "heatmaps.jsonl", [{**weights, "step": s, "values": [[0.125] * 8]} for s in range(4)])
    text = write_report([tmp_path]).read_text()
    assert "How much each field weighs" in text and "controller gives each field" in text
    assert "allocation.json" not in text and "pareto.json" not in text and "No search curves" not in text


def test_errors_name_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "groups.json", {"groups": [{"rows": {}}]})
    with pytest.raises(UserError, match=r"groups\.json: not a grouped allocation"):
        write_report([tmp_path])
    write_json(tmp_path / "groups.json", {"groups": []})
    write_json(tmp_path / "evaluation.json", {"auc": 0.7, "groups": {"0": {}}})
    with pytest.raises(UserError, match=r'evaluation\.json: keys "groups" and "router"'):
        write_report([tmp_path])


def test_shares_of_parameters_count_the_columns_beside_the_width() -> None:
    size = [{f.name: f.cardinality * 5 * (f.name != "p0_a") for f in SCHEMA.fields} for _ in range(2)]
    drawn = group_widths(LIGHT, [a.widths for a in ALLOCATIONS], SCHEMA, NAMES, size)
    shares = [bar.get_width() for bar in drawn.axes[2].patches]
    assert sum(shares) == pytest.approx(100) and shares[1] == 0
    assert shares[0] == pytest.approx(100 * size[0]["tell0"] / sum(sum(own.values()) for own in size))


def test_widths_that_run_against_all_ranks_follow_no_population(tmp_path: Path) -> None:
    against = Allocation(SCHEMA, dict(zip(NAMES, [8, 0, 2, 0, 0, 0, 2, 8], strict=True)))
    GroupedAllocation(SCHEMA, (ALLOCATIONS[0], against), ROWS).save(tmp_path / "groups.json")
    plant(tmp_path)
    text = write_report([tmp_path]).read_text()
    row = text[text.index("<td>group 1</td><td>-") :]
    assert row[: row.index("</tr>")].endswith('<td class="text">none</td>')
