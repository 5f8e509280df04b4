"""What a report says of calibration, of AUC by group and of a difference of one seed; and of runs from before these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.methods.retraining import leave_evaluation
from embsearch_dist.report import write_report
from embsearch_dist.train.figures import Other, Wanted, told
from embsearch_dist.train.measures import probabilities
from embsearch_dist.train.metrics import Predictions, figures
from tests.factories import one_rank, small_schema

SCHEMA = small_schema(60, 30, 10)
FOUND = Allocation(SCHEMA, {"f0": 8, "f1": 8, "f2": 0}, {"method": "adass"})
UNIFORM = Allocation.uniform(SCHEMA, 8)


def answers(seed: int) -> tuple[Predictions, Predictions]:
    """Of a good model, and of one that promises too much."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 1, 4000).astype(np.float32)
    labels = torch.from_numpy((rng.random(4000) < probabilities(logits)).astype(np.float32))
    users = torch.from_numpy(rng.integers(0, 50, 4000, dtype=np.int32))
    worse = (logits + rng.normal(0.6, 0.7, 4000)).astype(np.float32)
    return tuple(Predictions(torch.from_numpy(x), labels, users, None) for x in (logits, worse))  # type: ignore[return-value]


def leave(run: Path, name: str, allocation: Allocation, found: Predictions, wanted: Wanted, seed: int = 0) -> None:
    known = figures(found)
    body = {"name": name, "seed": seed, "split": "test", "rows": 4000, "auc": known["auc"], "logloss": known["logloss"]}
    body |= {"widths": allocation.widths, "embedding_parameters": allocation.total("parameters")}
    suffix = f"-seed{seed}" if seed else ""
    result = body | told(known, found, wanted, one_rank())
    leave_evaluation(one_rank(), run / "retrain" / f"{name}{suffix}", "test", result)


def opened(run: Path) -> Path:
    SCHEMA.save(run)
    FOUND.save(run / "allocation.json")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two models of one seed, the difference between them measured."""
    run = opened(tmp_path / "run")
    good, bad = answers(0)
    leave(run, "ues-8", UNIFORM, bad, Wanted("f0"))
    leave(run, "adass", FOUND, good, Wanted("f0", 40, 0, Other("ues-8", 0, bad)))
    return run


def test_the_report_shows_figures_curves_and_groups(run: Path) -> None:
    html = write_report([run]).read_text()
    assert (run / "report" / "reliability.png").stat().st_size > 5000
    good, bad = (figures(x) for x in answers(0))
    for own in (good, bad):
        for text in (f"{own['ne']:.4f}", f"{own['calibration']:.4f}", f"{own['ece']:.5f}", f"{own['group_auc']:.4f}"):
            assert f"<td>{text}</td>" in html
    assert "AUC by f0" in html and "<td>49</td>" in html  # id 0 is no group
    assert bad["calibration"] > 1.3 > 1.1 > good["calibration"]


def test_the_verdict_of_one_seed_tells_the_interval_while_it_holds(run: Path) -> None:
    html = write_report([run]).read_text()
    assert "one seed: a hint, by the luck of the rows alone between +0." in html and "(95%) (test split)" in html
    assert "--against" not in html
    leave(run, "adass", FOUND, answers(1)[0], Wanted("f0"))  # trained anew: the difference is another one's
    html = write_report([run]).read_text()
    assert "by the luck of the rows" not in html
    adass, uniform = (run / "retrain" / name for name in ("adass", "ues-8"))
    assert f"python launch/evaluate.py --run {adass} --against {uniform}" in html


def test_several_seeds_are_judged_by_their_spread(run: Path) -> None:
    for name, allocation, found in zip(("adass", "ues-8"), (FOUND, UNIFORM), answers(5), strict=True):
        leave(run, name, allocation, found, Wanted("f0"), seed=1)
    html = write_report([run]).read_text()
    assert "2 seeds, s.e." in html and "by the luck of the rows" not in html and "--against" not in html


def test_an_evaluation_from_before_shows_no_such_section(tmp_path: Path) -> None:
    run = opened(tmp_path / "old")
    body: dict[str, Any] = {"name": "adass", "seed": 0, "split": "test", "auc": 0.7, "logloss": 0.5}
    write_json(run / "retrain" / "adass" / "evaluation.json", body)
    assert "Calibration" not in write_report([run]).read_text()


def test_undefined_figures_are_dashes(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    found = answers(0)[0]
    silent = Predictions(found.logits, torch.zeros_like(found.labels), found.groups, None)
    known = figures(silent)
    body = {"name": "adass", "seed": 0, "split": "test", "auc": None, "auc_undefined": "one class", "logloss": 0.1}
    leave_evaluation(
        one_rank(), run / "retrain" / "adass", "test", body | told(known, silent, Wanted("f0"), one_rank())
    )
    html = write_report([run]).read_text()
    assert "AUC by f0" in html and "<td>-</td><td>0</td><td>0.0%</td>" in html


def test_broken_parts_are_named(run: Path) -> None:
    file = run / "retrain" / "adass" / "evaluation.json"
    before = file.read_text()
    write_json(file, {"name": "adass", "auc": 0.7, "reliability": {"rows": [1]}})
    with pytest.raises(UserError, match=r"evaluation.json: key 'reliability' needs"):
        write_report([run])
    file.write_text(before)
    write_json(run / "retrain" / "adass" / "difference-to-x.json", {"against": "x"})
    with pytest.raises(UserError, match=r"difference-to-x.json: not a difference"):
        write_report([run])
