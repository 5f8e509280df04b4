"""The verdict on a search: which uniform width judges it, how sure the seeds are, and what is missing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.files import write_json
from embsearch_dist.report import write_report
from embsearch_dist.report.style import LIGHT
from embsearch_dist.report.uniform import UniformSizes
from embsearch_dist.report.verdict import Model, compare_models, draw, judge, missing_width
from tests.factories import small_schema

SCHEMA = small_schema(60, 30, 10)


def model(name: str, parameters: float, *aucs: float, uniform: bool = False) -> Model:
    return Model(name, parameters, dict(enumerate(aucs)), "uniform" if uniform else "found", uniform)


FOUND = model("adass", 790, 0.7521, 0.7535, 0.7522)
MODELS = [
    FOUND,
    model("UES-4", 400, 0.7600, 0.7600, 0.7600, uniform=True),  # smaller, so it does not judge
    model("UES-8", 800, 0.7500, 0.7510, 0.7505, uniform=True),
    model("UES-16", 1600, 0.7490, 0.7500, 0.7495, uniform=True),
]


def test_the_best_uniform_width_that_is_not_smaller_judges() -> None:
    verdict = judge(FOUND, MODELS, 3200)
    assert verdict is not None and verdict.against.name == "UES-8"
    # Paired differences 0.0021, 0.0025, 0.0017: their deviation is 0.0004.
    assert verdict.gain == pytest.approx(0.0021)
    assert verdict.error == pytest.approx(0.0004 / math.sqrt(3))
    assert verdict.sentence() == (
        "at 25% of UES-32: +0.0021 AUC over UES-8, the best uniform width that is not smaller (25%), 3 seeds, "
        "s.e. 0.0002: better"
    )


def test_a_width_with_fewer_seeds_does_not_judge_and_none_large_enough_gives_no_verdict() -> None:
    luck = model("UES-12", 1200, 0.9, uniform=True)
    verdict = judge(FOUND, [*MODELS, luck], 3200)
    assert verdict is not None and verdict.against.name == "UES-8"
    assert judge(model("big", 5000, 0.8), MODELS, 3200) is None


@pytest.mark.parametrize(
    ("aucs", "word"),
    [
        ((0.7500,), "one seed: a hint"),
        ((0.7500, 0.7512, 0.7502), "not worse"),
        ((0.7470, 0.7500, 0.7506), "lower, by less than two standard errors"),
        ((0.7480, 0.7491, 0.7484), "worse"),
    ],
)
def test_words_follow_the_standard_error(aucs: tuple[float, ...], word: str) -> None:
    verdict = judge(model("adass", 790, *aucs), MODELS, 3200)
    assert verdict is not None and verdict.sentence().endswith(word)


def test_seeds_are_paired_and_strangers_are_not_compared() -> None:
    other = Model("b", 800, {1: 0.7, 7: 0.1}, "uniform", True)
    verdict = compare_models(Model("a", 800, {0: 0.2, 1: 0.8}, "found", False), other, 3200)
    assert verdict is not None and (verdict.seeds, verdict.gain) == (1, pytest.approx(0.1))
    assert compare_models(Model("a", 800, {0: 0.2}, "found", False), other, 3200) is None


def test_the_missing_width_is_the_narrowest_that_is_not_smaller() -> None:
    sizes = UniformSizes(100)
    assert missing_width(FOUND, MODELS, sizes) is None
    assert missing_width(model("adass", 800, 0.7), MODELS, sizes) is None
    assert missing_width(model("adass", 801, 0.7), MODELS, sizes) == 9


def test_a_column_beside_the_width_counts_in_uniform_widths_too() -> None:
    sizes = UniformSizes(2000, 1)
    assert [sizes.not_smaller(p) for p in (1, 4000, 17_000, 18_000, 18_001)] == [1, 1, 8, 8, 9]
    found = model("utilities", 17_000, 0.7)
    assert missing_width(found, [found], sizes) == 8
    assert missing_width(found, [found, model("UES-8", 18_000, 0.7, uniform=True)], sizes) is None
    small = model("utilities", 1000, 0.7)
    assert missing_width(small, [small, model("UES-1", 4000, 0.7, uniform=True)], sizes) is None


@pytest.mark.parametrize("told_by", ["allocation", "config"])
def test_a_report_counts_the_values_own_weights_of_uniform_widths(tmp_path: Path, told_by: str) -> None:
    """870 parameters of 9, 8 and 9 columns: 26% of the 3300 of UES-32, and less than the 900 of UES-8."""
    SCHEMA.save(tmp_path)
    widths = {"f0": 8, "f1": 7, "f2": 8}
    found = Allocation(SCHEMA, widths, {"method": "utilities", "name": "utilities"}, extra=1)
    if told_by == "allocation":
        found.save(tmp_path / "allocation.json")
        html = write_report([tmp_path]).read_text()
        assert "dropped 0, with 26% of UES-32" in html
        assert "<td>60</td><td>540</td>" in html  # of f0
    else:
        (tmp_path / "config.yaml").write_text("method: utilities\nmodel:\n  backbone: deepfm\n  first_order: value\n")

    def evaluated(name: str, size: int, auc: float) -> None:
        body = {"name": name, "seed": 0, "split": "test", "auc": auc, "logloss": 0.5, "widths": widths}
        write_json(tmp_path / "retrain" / name / "evaluation.json", body | {"embedding_parameters": size})

    evaluated("utilities", found.total("parameters"), 0.76)
    html = write_report([tmp_path]).read_text()
    assert "No verdict: UES-8, the narrowest uniform width" in html
    assert "with 26% of UES-32" in html
    evaluated("ues-8", 900, 0.75)
    assert "At 26% of UES-32: +0.0100 AUC over UES-8" in write_report([tmp_path]).read_text()
    evaluated("ues-32", 3300, 0.74)
    html = write_report([tmp_path]).read_text()
    assert "At 26% of UES-32: +0.0100 AUC over UES-8" in html and "No verdict" not in html
    assert "Not yet the whole verdict" not in html


def test_a_report_opens_with_the_verdict_or_says_how_to_get_one(tmp_path: Path) -> None:
    def evaluated(name: str, allocation: Allocation, auc: float) -> None:
        body = {"name": name, "seed": 0, "split": "test", "auc": auc, "logloss": 0.5, "widths": allocation.widths}
        sizes = {"embedding_parameters": allocation.total("parameters")}
        write_json(tmp_path / "retrain" / name / "evaluation.json", body | sizes)

    SCHEMA.save(tmp_path)
    found = Allocation(SCHEMA, {"f0": 8, "f1": 9, "f2": 0}, {"method": "utilities", "name": "utilities"})  # 750
    found.save(tmp_path / "allocation.json")
    evaluated("utilities", found, 0.76)
    command = f"python launch/retrain.py --run {tmp_path} --allocation bracket"
    html = write_report([tmp_path]).read_text()
    assert '<p class="headline">No verdict: UES-8, the narrowest' in html and command in html
    evaluated("ues-16", Allocation.uniform(SCHEMA, 16), 0.751)
    html = write_report([tmp_path]).read_text()
    assert '<p class="headline">At 23% of UES-32: +0.0090 AUC over UES-16' in html and command in html
    evaluated("ues-8", Allocation.uniform(SCHEMA, 8), 0.755)
    write_json(tmp_path / "final.json", {"name": "utilities", "reason": "the found widths are better"})
    html = write_report([tmp_path]).read_text()
    assert (
        "At 23% of UES-32: +0.0050 AUC over UES-8, the best uniform width that is not smaller (25%), one seed: a hint "
        "(test split)." in html
    )
    assert command not in html
    assert "the found widths are better." in html
    assert (tmp_path / "report" / "verdict.png").exists()
    wider = Allocation(SCHEMA, {"f0": 16, "f1": 9, "f2": 0}, {"method": "utilities", "name": "utilities", "widened": 2})
    evaluated("utilities-x2", wider, 0.77)
    assert "+0.0050 AUC over UES-8" in write_report([tmp_path]).read_text(), "trained, and not chosen"
    write_json(tmp_path / "final.json", {"name": "utilities-x2", "fallback": False, "reason": "it is better"})
    share = f"{wider.total('parameters') / Allocation.uniform(SCHEMA, 32).total('parameters'):.0%}"
    assert f'<p class="headline">At {share} of UES-32: +0.0190 AUC over UES-16' in write_report([tmp_path]).read_text()


def test_what_was_fine_tuned_asks_for_uniform_widths_that_were(tmp_path: Path) -> None:
    widths = {"f0": 8, "f1": 8, "f2": 6}
    SCHEMA.save(tmp_path)
    Allocation(SCHEMA, widths, {"method": "auto"}).save(tmp_path / "allocation.json")

    def evaluated(name: str, widths: dict[str, int], auc: float, begun: bool) -> None:
        size = Allocation(SCHEMA, widths).total("parameters")
        body = {"name": name, "split": "test", "auc": auc, "logloss": 0.5, "embedding_parameters": size, "seed": 0}
        start = {"start": {"from": "runs/my/widest"}} if begun else {}
        write_json(tmp_path / "retrain" / name / "evaluation.json", body | {"widths": widths} | start)

    evaluated("auto", widths, 0.76, True)
    evaluated("ues-8", dict.fromkeys(SCHEMA.names, 8), 0.74, False)
    page = write_report([tmp_path]).read_text()
    assert "+0.0200 AUC over UES-8, " in page
    assert "auto began with a wider model, the uniform widths with fresh weights. This trains uniform widths in" in page
    evaluated("ues-8-finetuned", dict.fromkeys(SCHEMA.names, 8), 0.755, True)
    page = write_report([tmp_path]).read_text()
    assert "+0.0050 AUC over UES-8 fine-tuned, " in page and "began with a wider model" not in page
    assert page.index("UES-8<") < page.index("UES-8 fine-tuned<")


def test_a_search_under_served_bytes_is_judged_by_them(tmp_path: Path) -> None:
    def evaluated(name: str, allocation: Allocation, auc: float) -> None:
        body = {"name": name, "seed": 0, "split": "test", "auc": 0.5, "logloss": 0.5, "widths": allocation.widths}
        told = {"precision": "int8", "bytes": allocation.total("served_int8"), "ues32_bytes": 4800, "auc": auc}
        sizes = {"embedding_parameters": allocation.total("parameters"), "served": told | {"logloss": 0.6}}
        write_json(tmp_path / "retrain" / name / "evaluation.json", body | sizes)

    SCHEMA.save(tmp_path)
    found = Allocation(SCHEMA, {"f0": 12, "f1": 12, "f2": 0}, {"method": "utilities", "name": "utilities"})
    found.save(tmp_path / "allocation.json")
    evaluated("utilities", found, 0.76)  # 90 rows of 16 bytes
    html = write_report([tmp_path]).read_text()
    assert '<p class="headline">No verdict on utilities served at int8: ' in html
    assert f"python launch/retrain.py --run {tmp_path} --allocation bracket" in html
    evaluated("ues-12", Allocation.uniform(SCHEMA, 12), 0.757)
    html = write_report([tmp_path]).read_text()
    assert (
        '<p class="headline">Served at int8, utilities at 30% of UES-32: +0.0030 AUC over UES-12, the best uniform '
        "width that is not smaller (33%), one seed: a hint (test split)." in html
    )
    assert "As served at int8" in html and "<td>1,440</td>" in html
    assert (tmp_path / "report" / "served.png").exists()


def test_the_picture_says_of_how_many_seeds_its_means_are() -> None:
    one = model("adass", 790, 0.75)
    shown = {"3 seeds": MODELS, "1 to 3 seeds": [one, *MODELS[1:]]}
    for words, models in shown.items():
        assert draw(LIGHT, models, "test").axes[0].get_ylabel() == f"test AUC, mean of {words}"
    assert draw(LIGHT, [one], "test").axes[0].get_ylabel() == "test AUC, one seed"
