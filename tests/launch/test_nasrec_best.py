"""``retrain.py --best``: from the networks that a search has kept to a report on the one that validation chose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from embsearch_dist.schema import Schema
from tests.factories import small_config
from tests.unit.test_nasrec_choosing import SPACE, searched


def test_the_best_are_compared_and_the_winner_is_an_ordinary_result(
    data: Path, tmp_path: Path, run_script: Callable
) -> None:
    run = searched(tmp_path / "run")
    architecture = (run / "architectures" / "rank-1.json").read_text()
    (run / "architecture.json").write_text(architecture)
    small_config(data, run, f"search.space.width={SPACE.width}", "train.steps=3", method="nasrec").save(run)
    Schema.load(data).save(run)
    done = run_script("retrain.py", "--run", run, "--best", 2, "--refit")
    own = run / "retrain" / "network-best"
    assert f"-> {own}" in done.stdout and "has the least validation logloss" in done.stdout
    choice = json.loads((own / "choice.json").read_text())
    assert [c["name"] for c in choice["candidates"]] == ["network-best-rank-1", "network-best-rank-2"]
    result = json.loads((own / "evaluation.json").read_text())
    assert (result["name"], result["split"], result["backbone"]) == ("network-best", "test", "nasrec")
    assert json.loads(run_script("evaluate.py", "--run", own).stdout)["auc"] == result["auc"]
    page = run_script("report.py", run)
    assert "network-best" in Path(page.stdout.strip()).read_text() and "Traceback" not in page.stderr
    refused = run_script("retrain.py", "--run", run, "--best", 5, check=False)
    assert refused.returncode == 2 and "holds 3 of the architectures" in refused.stderr
