"""The commands of a day: prepare with yesterday's vocabulary, train from yesterday's model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from embsearch_dist.train.retrain import STAGE
from tests.earlier import two_days
from tests.factories import recorded


def test_a_day_after_a_day(tmp_path: Path, config: Path, run_script: Callable) -> None:
    first, second = two_days(tmp_path)
    run, today = tmp_path / "run", tmp_path / "today"
    where = ["--config", config, "--run.dir", run, "--data.path", first, "--run.device", "cpu"]
    run_script("retrain.py", *where, "--allocation", "ues-4", "--train.steps", 4)
    yesterday = run / "retrain" / "ues-4"

    source = second.parent / "clicks.yaml"
    done = run_script("prepare.py", "--format", "table", "--input", source, "--out", today, "--vocabulary", first)
    assert "values got new ids (extend)" in done.stdout

    words = ["--from", yesterday, "--data.path", today, "--train.steps", 3]
    refused = run_script("retrain.py", *words, check=False)
    assert f"error: --from {yesterday} is where the new training would be kept. Give --name" in refused.stderr
    done = run_script("retrain.py", *words, "--name", "today")
    own = run / "retrain" / "today"
    assert (
        f"begins with {yesterday}, step 4: validation auc " in done.stdout + done.stderr and f"-> {own}" in done.stdout
    )
    told, result = (json.loads((own / name).read_text()) for name in ("start.json", "evaluation.json"))
    assert told["fields"]["left"]["new_values"] == 2 and told["fields"]["left"]["how"] == "same"
    assert result["start"]["from"] == str(yesterday) and set(result["widths"].values()) == {4}
    assert len(recorded(own, STAGE, "loss")) == 3

    # The next search's widths, in a run of their own; and the same command once more finds it done.
    wider = ["--config", config, "--run.dir", tmp_path / "other", "--data.path", today, "--run.device", "cpu"]
    for _ in range(2):
        run_script("retrain.py", *wider, "--allocation", "ues-8", "--from", own, "--train.steps", 2)
    other = tmp_path / "other" / "retrain" / "ues-8"
    assert json.loads((other / "start.json").read_text())["fields"]["big"]["how"] == "padded"
    for more in ([], ["--from", own, "--from-optimizer", "false"]):
        refused = run_script("retrain.py", *wider, "--allocation", "ues-8", "--train.steps", 2, *more, check=False)
        assert "holds another training: it began with" in refused.stderr
    measured = run_script("evaluate.py", "--run", other)
    assert json.loads(measured.stdout)["start"]["optimizer"] is True
    assert "step" in json.loads(measured.stdout)["start"]
