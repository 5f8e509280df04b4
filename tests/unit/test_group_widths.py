"""The study of groups with widths under a budget: what it starts, and the table that it makes of what was left."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tools.studies.group_widths import CONFIGS, SMALL_GATES, budgeted, common, copying, measure, table


def leave(path: Path, body: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))


def groups(*sizes: int) -> dict[str, Any]:
    return {"groups": [{"sizes": {"parameters": size}} for size in sizes]}


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    """A study of two seeds whose results lie there already."""
    for seed in (0, 1):
        home = tmp_path / f"seed{seed}"
        leave(home / "ihas" / "groups.json", groups(600, 400))
        leave(home / "ihas_widths-1" / "groups.json", groups(500, 100))
        for run, model, auc in (("ihas", "ihas", 0.70), ("ihas_widths-1", "ihas_widths", 0.72)):
            retrained = home / run / "retrain" / model
            leave(retrained / "evaluation.json", {"auc": auc + 0.01 * seed, "logloss": 0.5})
            leave(retrained / "evaluation-fields.json", {"auc": auc - 0.02 + 0.02 * seed, "logloss": 0.6})
        body = {"auc": 0.69, "logloss": 0.5, "embedding_parameters": 980}
        leave(home / "utilities-1" / "retrain" / "utilities" / "evaluation.json", body)
        leave(home / "utilities-1" / "retrain" / "ues-3" / "evaluation.json", body | {"auc": 0.60})
    files = {name: CONFIGS / f"{name}.yaml" for name in ("ihas", "utilities")}
    return argparse.Namespace(
        out=tmp_path, data=None, small=True, shares=[1.0], uniform=True, widths=CONFIGS / "ihas_widths.yaml", **files
    )


def test_each_model_and_router_of_a_seed_has_a_line(args: argparse.Namespace) -> None:
    lines = measure(args, 0)
    assert [(x["model"], x["router"], x["parameters"], round(x["auc"], 6)) for x in lines] == [
        ("ihas", "centres", 1000, 0.70),
        ("ihas", "fields", 1000, 0.68),
        ("ihas_widths", "centres", 600, 0.72),
        ("ihas_widths", "fields", 600, 0.70),
        ("uniform", "", 980, 0.60),
        ("utilities", "", 980, 0.69),
    ]
    assert all(x["budget"] == 1000 for x in lines)


def test_differences_are_paired_by_seed(args: argparse.Namespace) -> None:
    lines = table([*measure(args, 0), *measure(args, 1)]).splitlines()
    assert lines[2] == "| 1 | ihas, router of centres | 1,000 | 0.70500 | +0.02000 (s.e. 0.00000) | 0.50000 |"
    assert lines[4].split("|")[5].strip() == ""  # not above itself
    assert "+0.03500 (s.e. 0.00500)" in lines[-1]  # 0.72 - 0.69 and 0.73 - 0.69
    assert "(one seed)" in table(measure(args, 0))


def test_models_that_a_choice_has_tried_and_not_kept_have_no_line(args: argparse.Namespace) -> None:
    """``auto`` widens what it found while that pays, and trains each step."""
    run = args.out / "seed0" / "utilities-1"
    for name, auc in (("utilities-x2", 0.73), ("utilities-x2-fresh", 0.74), ("utilities-x4", 0.5)):
        leave(run / "retrain" / name / "evaluation.json", {"auc": auc, "logloss": 0.5, "embedding_parameters": 990})

    def searched() -> list[float]:
        return [x["auc"] for x in measure(args, 0) if x["model"] == "utilities"]

    assert searched() == [0.69]
    leave(run / "final.json", {"name": "utilities-x2", "fallback": False, "model": "retrain/utilities-x2"})
    assert searched() == [0.73]
    leave(run / "final.json", {"name": "ues-3", "fallback": True, "model": "retrain/ues-3"})
    assert searched() == [0.69]
    assert "+0.03500 (s.e. 0.00500)" in table([*measure(args, 0), *measure(args, 1)]).splitlines()[-1]


def test_two_models_of_one_line_are_refused(args: argparse.Namespace) -> None:
    leave(
        args.out / "seed0" / "utilities-1" / "retrain" / "ues-4" / "evaluation.json",
        {"auc": 0.6, "logloss": 0.5, "embedding_parameters": 990},
    )
    with pytest.raises(SystemExit, match=r"utilities-1/retrain: two models are uniform of seed 0. Delete the outdated"):
        measure(args, 0)


def test_later_searches_obey_the_size_of_ihas_and_go_on_from_its_gates(args: argparse.Namespace) -> None:
    jobs = budgeted(args, 0)
    assert [j.name for j in jobs] == [
        "seed0-ihas_widths-1",
        "seed0-ihas_widths-1-models",
        "seed0-utilities-1",
        "seed0-utilities-1-models",
    ]
    assert "--search.budget=1000" in jobs[0].arguments and "--search.budget=1000" in jobs[2].arguments
    assert "--or-uniform" in jobs[3].arguments and "--or-uniform" not in jobs[1].arguments
    gates = f"--search.{SMALL_GATES[0]}"
    assert gates in jobs[0].arguments and gates not in jobs[2].arguments
    assert gates not in common(argparse.Namespace(**{**vars(args), "small": False}), args.ihas, args.out, 0)
    source, target = args.out / "seed0" / "ihas", args.out / "copy"
    (source / "gates").mkdir()
    copying(source, target)()
    assert (target / "gates").exists() and not (target / "groups.json").exists()
