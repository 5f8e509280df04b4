"""Report: the right numbers in words and tables, every section, and nothing that needs a network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.report import write_report
from embsearch_dist.report.history import heatmaps
from embsearch_dist.report.plots import MAX_FIELDS, Curve, allocation, front, thinned
from embsearch_dist.report.runs import load_runs
from embsearch_dist.report.style import LIGHT
from embsearch_dist.report.summary import Spread, compare, headline, spearman
from embsearch_dist.schema import Field, Schema

REPOSITORY = Path(__file__).parents[2]
LONG = "a_very_long_field_name_" * 6
FIELDS = (Field("user", 1000), Field("item<b>", 500), Field(LONG, 10), Field("noise", 4))
SCHEMA = Schema("toy", FIELDS, rows={"train": 8000, "test": 1000})
WIDTHS = {"user": 16, "item<b>": 8, LONG: 2, "noise": 0}
VOID = {"meta", "img", "source", "br", "link"}


class Structure(HTMLParser):
    """Checks that tags nest, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.images += tag == "img"
        for key, value in attrs:
            if key in ("src", "srcset", "href"):
                self.references.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def training(stage: str, steps: int = 60) -> list[dict]:
    lines: list[dict] = []
    for step in range(steps):
        speed = {"samples_per_s": 1000.0, "memory_mb": 50.0}
        lines.append(
            {"time": 1e9 + step, "stage": stage, "step": step, "loss": 0.4 + 0.3 * math.exp(-step / 9), **speed}
        )
    lines.append({"time": 1e9, "stage": stage, "step": 30, "split": "validation", "auc": 0.7, "logloss": None})
    lines.append({"time": 1e9, "stage": stage, "step": 59, "split": "validation", "auc": 0.72, "logloss": 0.5})
    return lines


def evaluate(run: Path, name: str, widths: dict[str, int], seed: int, auc: float) -> None:
    allocation = Allocation(SCHEMA, widths)
    sub = run / "retrain" / f"{name}-seed{seed}"
    body = {
        "split": "test", "rows": 1000, "auc": auc, "logloss": 0.5, "dense_parameters": 10, "flops_per_sample": 20,
        "embedding_parameters": allocation.total("parameters"), "embedding_bytes": allocation.total("bytes"),
        "samples_per_s": None, "seed": seed, "name": name, "widths": widths,
    }  # fmt: skip
    write_json(sub / "evaluation.json", body)
    write_lines(sub / "metrics.jsonl", training("retrain"))


def uniform(width: int) -> dict[str, int]:
    return dict.fromkeys(SCHEMA.names, width)


def full_run(path: Path, seed: int = 0) -> Path:
    SCHEMA.save(path)
    (path / "config.yaml").write_text("method: adass # <script>\n")
    provenance = {"method": "adass", "seed": seed, "commands": ["python launch/search.py --seed 0"]}
    Allocation(SCHEMA, WIDTHS, provenance).save(path / "allocation.json")
    names = ("reward_mean", "reward_best", "entropy", "expected_width", "expected_parameters", "penalty")
    search = [{"time": 1e9 + s, "stage": "search", "step": s, **dict.fromkeys(names, 1 / (1 + s))} for s in range(50)]
    write_lines(path / "metrics.jsonl", training("supernet") + search)
    even = {"columns": ["2", "8", "16"], "rows": SCHEMA.names, "values": [[0.2, 0.3, 0.5]] * 4}
    keep = {"columns": SCHEMA.names, "rows": ["keep"], "values": [[0.2, None, 0.5, 0.9]]}
    maps = [{"stage": "supernet", "step": s, "name": "P_E", **even} for s in range(6)]
    maps += [{"stage": "supernet", "step": s, "name": "P_F", **keep} for s in range(6)]
    maps += [{"stage": "search", "step": 0, "name": "policy", **even}]
    write_lines(path / "heatmaps.jsonl", maps)
    points = [
        {"name": n, "widths": WIDTHS, "parameters": p, "bytes": 4 * p, "auc": a, "budget": None, "chosen": True}
        for n, p, a in (("effect-first", 20_020, 0.75), ("small", 9_000, 0.74))
    ]
    scored = [[9_000 + 10 * k, 0.7 + k / 10_000] for k in range(200)]
    write_json(path / "search" / "pareto.json", {"resource": "parameters", "points": points, "scored": scored})
    write_json(path / "truth.json", {"rank": {"user": 16, "item<b>": 8, LONG: 2, "noise": 0}, "bayes_auc": 0.8123})
    counts = [[0, 0, 1, 3], [0, 0, 4, 0], [0, 4, 0, 0], [4, 0, 0, 0]]
    stability = {"candidates": ["0", "2", "8", "16"], "fields": SCHEMA.names, "counts": counts, "runs": 4}
    write_json(path / "stability.json", stability)
    for seed, (ours, theirs) in enumerate([(0.7531, 0.7500), (0.7543, 0.7510), (0.7519, 0.7490)]):
        evaluate(path, "adass", WIDTHS, seed, ours)
        evaluate(path, "ues-32", uniform(32), seed, theirs)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return write_report([full]).read_text()


def test_page_is_self_contained_and_nests(html: str, full: Path) -> None:
    structure = Structure()
    structure.feed(html)
    assert structure.open == []
    assert all(r.startswith(("data:image/png;base64,", "#")) for r in structure.references)
    assert {r[1:] for r in structure.references if r.startswith("#")} <= set(structure.ids)
    assert len(structure.ids) == len(set(structure.ids))
    for word in ("http:", "https:", "<script", "@import", "url("):
        assert word not in html
    assert len(list((full / "report").glob("*.png"))) == structure.images == 11


def test_page_has_every_section(html: str) -> None:
    for title in (
        "Verdict", "Results", "Widths found", "Size against quality", "Planted truth", "Stability", "Learning curves",
        "Search", "Probabilities over time", "Where this comes from",
    ):  # fmt: skip
        assert f"<h2>{title}</h2>" in html
    assert "method: adass # &lt;script&gt;" in html and "item&lt;b&gt;" in html and LONG in html
    assert "python launch/search.py --seed 0" in html
    assert "Not in this run directory" not in html


def test_means_over_seeds(html: str) -> None:
    # Mean and sample standard deviation of 0.7531, 0.7543, 0.7519; pair differences 0.0031, 0.0033, 0.0029.
    assert '0.7531 <span class="sd">&plusmn; 0.0012</span>' in html
    assert '0.7500 <span class="sd">&plusmn; 0.0010</span>' in html
    assert '+0.0031 <span class="sd">&plusmn; 0.0002</span>' in html
    assert "3 (0, 1, 2)" in html
    # 16,000 + 4,000 + 20 of 32 * 1,514 parameters.
    assert "<td>20,020</td>" in html and "<td>48,448</td>" in html and "<td>59%</td>" in html
    assert (
        "The found widths (adass) keep 41% of UES-32&#x27;s embedding parameters and gain +0.0031 AUC on the test "
        "split (mean of 3 seeds, 95% interval +0.0026 to +0.0036)." in html
    )


def test_several_directories_merge_like_seeds(tmp_path: Path) -> None:
    for seed, auc in enumerate([0.75, 0.77]):
        run = tmp_path / f"seed{seed}"
        SCHEMA.save(run)
        Allocation(SCHEMA, WIDTHS if seed else uniform(8), {"method": "adass"}).save(run / "allocation.json")
        evaluate(run, "adass", WIDTHS, seed, auc)
        evaluate(run, "ues-32", uniform(32), seed, 0.75)
    runs = [tmp_path / "seed0", tmp_path / "seed1"]
    # The same directory given twice must not count as another seed.
    html = write_report([*runs, runs[0]], tmp_path / "out").read_text()
    assert '0.7600 <span class="sd">&plusmn; 0.0141</span>' in html
    assert "which the seeds cannot tell from no change" in html
    # Two allocations are enough to say how far searches agree.
    assert "<h2>Stability</h2>" in html and "2 searches with different seeds" in html


def test_worse_than_the_baseline_is_said(tmp_path: Path) -> None:
    evaluate(tmp_path, "adass", WIDTHS, 0, 0.7400)
    evaluate(tmp_path, "ues-32", uniform(32), 0, 0.7500)
    evaluate(tmp_path, "ues-8", uniform(8), 0, 0.7450)
    evaluate(tmp_path, "ues-16", uniform(16), 0, 0.7480)
    runs = load_runs([tmp_path])
    sentences = headline(runs, compare(runs))
    assert "keep 41% of UES-32's embedding parameters but lose 0.0100 AUC" in sentences[0]
    assert "one seed, so the spread is unknown" in sentences[0]
    assert "adass is 0.0072 below it" in sentences[1]
    assert sentences[2].startswith("UES-8 beats it on both counts: 60% of its embedding parameters")
    assert '<td class="worse">-0.0100</td>' in write_report([tmp_path]).read_text()


def test_without_ues32_the_widest_uniform_width_is_the_baseline(tmp_path: Path) -> None:
    evaluate(tmp_path, "adass", WIDTHS, 0, 0.76)
    evaluate(tmp_path, "ues-8", uniform(8), 0, 0.74)
    evaluate(tmp_path, "ues-16", uniform(16), 0, 0.75)
    html = write_report([tmp_path]).read_text()
    assert "AUC minus UES-16" in html and "UES-32 was not retrained" in html


@pytest.mark.parametrize("name", ["config.yaml", "allocation.json", "metrics.jsonl", "schema.json", "truth.json"])
def test_a_single_file_is_enough(full: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((full / name).read_bytes())
    html = write_report([tmp_path]).read_text()
    assert "Not in this run directory" in html and "retrain/&lt;name&gt;/evaluation.json is missing" in html


def test_unfinished_run_says_what_is_open(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    Allocation(SCHEMA, WIDTHS).save(tmp_path / "allocation.json")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "supernet", "step": 1, "loss": 0.5}\n{"stage": "sup')
    html = write_report([tmp_path]).read_text()
    assert "no retrained model has been evaluated, so whether they predict as well is open" in html
    assert "1 unreadable lines" in html


def test_errors_name_the_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        write_report([tmp_path / "absent"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty is not a run directory: it holds none of"):
        write_report([empty])
    assert list(empty.iterdir()) == []
    SCHEMA.save(tmp_path / "a")
    Schema("other", (Field("x", 3),)).save(tmp_path / "b")
    with pytest.raises(UserError, match="runs on different data"):
        write_report([tmp_path / "a", tmp_path / "b"])


def test_spearman_with_ties() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    # By hand: ranks 0.5 0.5 2 3 against 0 1 2 3.
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1], [1, 2]) is None


def test_spread_and_front() -> None:
    assert Spread.of([0.5]).interval is None
    low, high = Spread.of([1.0, 2.0, 3.0]).interval or (0, 0)
    assert (low, high) == (pytest.approx(2 - 4.303 / math.sqrt(3)), pytest.approx(2 + 4.303 / math.sqrt(3)))
    assert front([[3, 0.5], [1, 0.4], [2, 0.3], [3, 0.6]]) == [(1.0, 0.4), (3.0, 0.6)]


def test_long_curves_are_thinned_and_keep_their_shape() -> None:
    curve = thinned(Curve("a", 0, list(range(100_000)), [float(k) for k in range(100_000)]))
    assert len(curve.steps) == len(curve.values) == 800
    assert curve.steps[0] < 130 and curve.values[-1] > 99_870


def test_script(tmp_path: Path, run_script: Callable) -> None:
    shown = run_script("report.py", "--help", cwd=tmp_path)
    assert "python launch/report.py runs/movielens" in shown.stdout
    failed = run_script("report.py", tmp_path, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


@pytest.mark.parametrize(("row", "captured"), [([0.64, 0.18, 0.18], True), ([0.3, 0.4, 0.3], False)])
def test_a_width_that_takes_most_draws_of_all_fields_is_called_a_fault(
    tmp_path: Path, row: list[float], captured: bool
) -> None:
    other = row if captured else [0.1, 0.1, 0.8]  # one field alone may favour a width
    values = [row, row, row, other]
    line = {"stage": "supernet", "step": 1, "name": "P_E", "columns": ["0", "4", "8"], "rows": SCHEMA.names}
    write_lines(tmp_path / "heatmaps.jsonl", [line | {"values": values}])
    section = heatmaps(load_runs([tmp_path]), tmp_path)
    assert section is not None
    assert ("one width, 0, takes more than half of the draws in every field" in section.body) == captured


def test_shares_of_parameters_are_of_all_fields_though_some_are_not_drawn() -> None:
    names = [f"f{k}" for k in range(MAX_FIELDS + 40)]
    schema = Schema("wide", tuple(Field(n, 10) for n in names), rows={"train": 1})
    drawn = allocation(LIGHT, [dict.fromkeys(names, 4)], schema, names, dict.fromkeys(names, 40.0))
    shares = [bar.get_width() for bar in drawn.axes[2].patches]
    assert len(shares) == MAX_FIELDS and sum(shares) == pytest.approx(100 * MAX_FIELDS / len(names))


def test_searches_under_other_budgets_are_no_seeds_of_one_experiment(tmp_path: Path) -> None:
    runs = [tmp_path / f"seed{k}" for k in range(2)]
    for run, budget in zip(runs, ("10%", "50%"), strict=True):
        SCHEMA.save(run)
        Allocation(SCHEMA, WIDTHS, {"method": "adass", "name": "adass", "budget": budget}).save(run / "allocation.json")
    with pytest.raises(UserError, match="seed1 both hold 'adass', found under 10% and under 50%.*one by one"):
        write_report(runs)
    told = {"method": "adass", "name": "other", "budget": "50%", "precision": "int8"}
    Allocation(SCHEMA, WIDTHS, told).save(runs[1] / "allocation.json")
    assert len(load_runs(runs)) == 2


def test_a_point_on_the_line_of_the_uniform_widths_is_neither_above_nor_below_it(tmp_path: Path) -> None:
    for name, width, auc in (("ues-32", 32, 0.75), ("ues-8", 8, 0.75)):
        evaluate(tmp_path, name, uniform(width), 0, auc)
    for auc, said in ((0.75, "adass is on it."), (0.7501, "adass is 0.0001 above it.")):
        evaluate(tmp_path, "adass", WIDTHS, 0, auc)
        runs = load_runs([tmp_path])
        assert headline(runs, compare(runs))[1].endswith(said)


def test_a_seed_that_has_diverged_is_left_out_of_means_and_said_to_be(tmp_path: Path) -> None:
    for seed in range(3):
        evaluate(tmp_path, "adass", WIDTHS, seed, 0.75 + 0.001 * seed)
        evaluate(tmp_path, "ues-32", uniform(32), seed, 0.74)
    file = tmp_path / "retrain" / "adass-seed1" / "evaluation.json"
    told = {"auc": None, "auc_undefined": "a prediction of the test split is not a finite number", "logloss": None}
    write_json(file, json.loads(file.read_text()) | told)
    runs = load_runs([tmp_path])
    first = headline(runs, compare(runs))[0]
    assert "change AUC by +0.0110 " in first and "(mean of 2 seeds that both have, 95% interval " in first
    assert "; 1 of 3 runs of adass have no AUC" in first
    file = tmp_path / "retrain" / "ues-32-seed1" / "evaluation.json"
    write_json(file, json.loads(file.read_text()) | told)
    runs = load_runs([tmp_path])
    first = headline(runs, compare(runs))[0]
    assert "(mean of 2 seeds, 95% interval " in first and "1 of 3 runs of UES-32 have no AUC and are left out" in first


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([0], "gain +0.0100 AUC on the test split (of the one seed that both have, so the spread is unknown)"),
        ([0, 1], "(mean of 2 seeds that both have, 95% interval "),
        ([3], "(mean of 1 runs against 3, not paired by seed)"),
    ],
)
def test_seeds_that_only_one_side_has_do_not_move_the_difference(tmp_path: Path, seeds: list[int], said: str) -> None:
    """Seeds differ by more than widths do: against the mean of all three, 0.75 of seed 0 would be a loss."""
    for seed in range(3):
        evaluate(tmp_path, "ues-32", uniform(32), seed, 0.74 + 0.05 * seed)
    for seed in seeds:
        evaluate(tmp_path, "adass", WIDTHS, seed, 0.75 + 0.051 * seed)
    runs = load_runs([tmp_path])
    assert said in headline(runs, compare(runs))[0]


def test_a_uniform_width_of_a_luckier_seed_does_not_beat_what_was_found(tmp_path: Path) -> None:
    """0.80 is more than the mean 0.78 of two seeds, and less than was found with its own."""
    for seed in range(2):
        evaluate(tmp_path, "adass", WIDTHS, seed, 0.75 + 0.06 * seed)
    evaluate(tmp_path, "ues-2", uniform(2), 1, 0.80)
    runs = load_runs([tmp_path])
    assert "beats it" not in " ".join(headline(runs, compare(runs)))
    evaluate(tmp_path, "ues-2", uniform(2), 1, 0.82)
    runs = load_runs([tmp_path])
    assert "and an AUC 0.0100 above it over the seeds that both have." in " ".join(headline(runs, compare(runs)))


def test_a_heat_map_that_is_no_matrix_is_passed_over(tmp_path: Path) -> None:
    line = {"stage": "supernet", "name": "P_E", "step": 0, "rows": ["a", "b"], "columns": ["2", "4"]}
    write_lines(tmp_path / "heatmaps.jsonl", [line | {"values": [[0.5, 0.5], [1.0]]}, line | {"values": [[0.5, 0.5]]}])
    assert "heatmaps.jsonl holds no drawable heat map" in str(heatmaps(load_runs([tmp_path]), tmp_path))
