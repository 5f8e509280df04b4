"""Preparing from S3, training from it, mirroring to it, and going on from there on an empty machine: bitwise the same
as with folders and without an end before time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.train.faults import VARIABLE
from embsearch_dist.train.manifest import read_manifest
from embsearch_dist.train.signals import EXIT_CODE
from tests.factories import command_line, recorded
from tests.launch.processes import LAUNCH, TORCHRUN, finish
from tests.object_store import BUCKET, Bucket, s3

STEPS = 20
OVERRIDES = [f"train.steps={STEPS}", "train.save_every=4", "train.patience=0", "train.epochs=2"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3() as found:
        yield found


def result(run: Path) -> dict[str, Any]:
    """The log, the model's worth, and a checksum of every weight and all optimizer state."""
    own = run / "retrain" / "ues-8"
    wanted = (("step", None), ("loss", None), ("step", "validation"), ("auc", "validation"), ("logloss", "validation"))
    log = [recorded(own, "retrain", key, split) for key, split in wanted]
    test = json.loads((own / "evaluation.json").read_text())
    files = read_manifest(own / "checkpoints" / "retrain" / f"step-{STEPS}")["files"]
    tensors = {name: facts for name, facts in files.items() if name.endswith(".distcp")}
    assert len(log[0]) == STEPS and tensors
    return {"log": log, "test": (test["auc"], test["logloss"]), "tensors": tensors}


def test_prepare_train_mirror_and_resume_on_an_empty_machine(
    data: Path, config: Path, tmp_path: Path, bucket: Bucket, run_script: Callable
) -> None:
    def machine(name: str) -> dict[str, str]:
        return bucket.env | {"EMBSEARCH_CACHE": str(tmp_path / name / "cache")}

    # Raw files from S3 give the bytes that the same files on a disk have given.
    raw = bucket.put(data.parent, "raw")
    prepared = tmp_path / "one" / "prepared"
    words = ["--format", "table", "--input", f"{raw}/clicks.yaml", "--out", prepared, "--row-group-rows", 500]
    run_script("prepare.py", *words, env=machine("one"))
    assert (prepared / "manifest.json").read_bytes() == (data / "manifest.json").read_bytes()

    # Stopped halfway, on a machine that is then gone.
    url = bucket.put(prepared, "prepared")
    base = ["--config", config, "--allocation", "ues-8"]
    mirrored = ["--run.mirror", f"s3://{BUCKET}/runs/tiny"]
    one = [*base, *command_line(url, tmp_path / "one" / "run", *OVERRIDES), *mirrored]
    stopped = run_script("retrain.py", *one, env=machine("one") | {VARIABLE: "term step=8"}, check=False)
    assert stopped.returncode == EXIT_CODE and "fetching" in stopped.stdout, stopped.stderr
    shutil.rmtree(tmp_path / "one")

    # On another machine with nothing on its disk.
    two = [*base, *command_line(url, tmp_path / "two" / "run", *OVERRIDES), *mirrored]
    went_on = run_script("retrain.py", *two, env=machine("two"))
    assert "continuing from" in went_on.stdout and "step-9" in went_on.stdout, went_on.stdout

    # With folders and without a stop.
    whole = [*base, *command_line(data, tmp_path / "whole" / "run", *OVERRIDES)]
    run_script("retrain.py", *whole)
    assert result(tmp_path / "two" / "run") == result(tmp_path / "whole" / "run")

    # All of it is in the mirror: the last checkpoints, and results under names of their own.
    names = bucket.names("runs/tiny/retrain/ues-8")
    kept = {name.split("/")[3] for name in names if name.startswith("files/checkpoints/retrain/step-")}
    local = {p.name for p in (tmp_path / "two" / "run").glob("retrain/ues-8/checkpoints/retrain/step-*")}
    assert kept == local and "results/evaluation.json" in names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_of_which_one_is_killed_go_on_from_the_mirror(
    data: Path, config: Path, tmp_path: Path, bucket: Bucket, start: Callable
) -> None:
    url = bucket.put(data, "killed")

    def search(name: str, *more: str, **env: str) -> str:
        words = ["--config", config, *command_line(url, tmp_path / name / "run", "search.supernet.save_every=2"), *more]
        env |= bucket.env | {"EMBSEARCH_CACHE": str(tmp_path / name / "cache")}
        code = None if VARIABLE in env else 0
        return finish(start(*TORCHRUN, "--", LAUNCH / "search.py", *words, **env), code)

    mirrored = ["--run.mirror", f"s3://{BUCKET}/runs/killed"]
    search("one", *mirrored, **{VARIABLE: "kill rank=1 step=21 stage=supernet"})
    shutil.rmtree(tmp_path / "one")
    told = search("two", *mirrored)
    assert "fetching the run from s3://bucket/runs/killed" in told and "continuing from" in told, told
    search("whole")

    def found(name: str) -> Any:
        run = tmp_path / name / "run"
        log = [recorded(run, "supernet", "loss"), recorded(run, "supernet", "auc", "validation")]
        return log, json.loads((run / "allocation.json").read_text())["widths"]

    assert found("two") == found("whole")
