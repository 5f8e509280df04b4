"""KDD Cup 2012 track 2 as a user starts it: made-up files, prepared by one process and by two, and trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.schema import Schema
from tests.factories import options, recorded
from tests.kdd_files import IDS, NUMBERS
from tests.launch.processes import DIST_DDP, finish
from tests.raw_clicks import digest

ROOT = Path(__file__).resolve().parents[2]
ROWS, STEPS = 6000, 20
WORDS = ["--format", "kdd2012", "--min-count", 2, "--row-group-rows", 500]
TINY = ["run.device=cpu", "run.threads=1", "model.hidden=[8]", "train.batch_size=128", f"train.steps={STEPS}"]
TINY += ["train.log_every=1", "search.width=8"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``tools/make/kdd.py`` writes."""
    folder = tmp_path_factory.mktemp("kdd") / "raw"
    words = [sys.executable, str(ROOT / "tools" / "make" / "kdd.py"), "--out", str(folder), "--rows", str(ROWS)]
    done = subprocess.run([*words, "--users", "900"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"{ROWS:,} rows" in done.stdout, done.stderr
    return folder


def test_prepare_and_train_with_the_shipped_config(raw: Path, tmp_path: Path, run_script: Callable) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    told = run_script("prepare.py", *WORDS, "--input", raw, "--out", data).stdout
    assert f"{ROWS:,} rows in" in told
    schema = Schema.load(data)
    assert (schema.names, schema.dense) == ([*IDS, "gender", "age"], NUMBERS)
    assert sum(schema.rows.values()) == ROWS
    config = ROOT / "configs" / "kdd2012" / "ues_deepfm.yaml"
    run_script("search.py", "--config", config, *options([f"data.path={data}", f"run.dir={run}", *TINY]))
    run_script("retrain.py", "--run", run)
    (trained,) = (run / "retrain").iterdir()
    assert recorded(trained, "retrain", "step", None) == list(range(1, STEPS + 1))
    body = json.loads((trained / "evaluation.json").read_text())
    assert body["widths"] == dict.fromkeys(schema.names, 8)
    assert body["rows"] == schema.rows["test"] and 0 < body["logloss"] < 1


@pytest.mark.slow
def test_two_processes_under_torchx_give_the_bytes_of_one(
    raw: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]], run_script: Callable
) -> None:
    pytest.importorskip("torchx")
    two = start(*DIST_DDP, "prepare.py", "--", *WORDS, "--input", raw, "--out", tmp_path / "two", "--quiet")
    run_script("prepare.py", *WORDS, "--input", raw, "--out", tmp_path / "one", "--quiet")
    finish(two)
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


def test_what_is_missing_is_said(raw: Path, tmp_path: Path, run_script: Callable) -> None:
    (tmp_path / "training.txt").write_text((raw / "training.txt").read_text())
    done = run_script("prepare.py", *WORDS, "--input", tmp_path, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2 and not list(tmp_path.glob("out*"))
    assert done.stderr == (
        f"error: {tmp_path}/userid_profile.txt: no such file. training.txt needs it for gender and age: "
        "put the file of that name from the same archive beside it\n"
    )
