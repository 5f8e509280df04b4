"""Bad input: one line that says what is wrong, exit code 2, no traceback, and no allocation left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.files import read_json, write_sealed
from embsearch_dist.schema import Schema
from tests.factories import command_line, small_schema
from tests.launch.processes import LAUNCH, ROOT
from tests.scripts import fork_ranks


@pytest.fixture
def damaged(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "damaged"))


def rewrite(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Change a shard and keep its column types."""
    schema = pq.read_schema(path)
    frame = change(pl.read_parquet(path))
    table: pa.Table = frame.to_arrow().cast(schema)
    pq.write_table(table, path, row_group_size=500, write_page_checksum=True)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.strip().endswith(errors[0])
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.path=nowhere", ("nowhere is not a prepared data set", "launch/prepare.py")),
        ("search.candidate=[2,4]", ("unknown config key 'search.candidate'", "did you mean 'candidates'")),
        ("search.candidates=[8,2,4]", ("search.candidates: widths must ascend, but 2 follows 8", "write [2, 4, 8]")),
        ("search.budget=5", ("search.budget: '5' is 5 parameters", "narrowest allocation", "needs")),
        ("search.budget=lots", ("search.budget: 'lots' is not a budget",)),
    ],
)
def test_a_bad_setting_of_a_search(
    data: Path, config: Path, tmp_path: Path, run_script: Callable, override: str, parts: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    done = run_script("search.py", "--config", config, *command_line(data, run, override), check=False)
    assert_refused(done, *parts)
    assert not (run / "allocation.json").exists()
    assert not (run / "checkpoints").exists()  # found before anything was trained


def test_unknown_options_and_files(tmp_path: Path, run_script: Callable) -> None:
    done = run_script("search.py", "--confg", "a.yaml", check=False)
    assert_refused(done, "unknown option --confg", "did you mean 'config'")
    done = run_script("search.py", "--config", tmp_path / "none.yaml", check=False)
    assert_refused(done, "none.yaml does not exist")


def test_an_unknown_key_is_refused_before_torch_is_loaded() -> None:
    """Loading it takes seconds."""
    code = """
import sys
from embsearch_dist.errors import UserError
from launch import evaluate, export, plan, retrain
for script in (retrain, evaluate, export, plan):
    try:
        script.main(["--train.epoch=3"])
    except UserError as e:
        print(script.__name__, e)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *told, loaded = done.stdout.splitlines()
    assert [line.split()[0] for line in told] == ["launch.retrain", "launch.evaluate", "launch.export", "launch.plan"]
    assert all("unknown config key 'train.epoch' (did you mean 'epochs'?)" in line for line in told), told
    assert loaded == "False"


def test_ids_outside_a_table_are_counted_and_named(
    damaged: Path, config: Path, tmp_path: Path, run_script: Callable
) -> None:
    cardinality = next(f.cardinality for f in Schema.load(damaged).fields if f.name == "idle")
    path = damaged / "train" / "part-00000.parquet"
    bad = pl.when(pl.int_range(pl.len()) < 3).then(cardinality + 7).otherwise(pl.col("idle")).alias("idle")
    rewrite(path, lambda f: f.with_columns(bad.cast(pl.Int32)))
    run = tmp_path / "run"
    done = run_script("search.py", "--config", config, *command_line(damaged, run), check=False)
    assert_refused(done, str(path), "idle", "3 ")
    assert not (run / "allocation.json").exists()


def test_a_shard_that_is_missing_is_noticed(damaged: Path, config: Path, tmp_path: Path, run_script: Callable) -> None:
    (damaged / "validation" / "part-00000.parquet").unlink()
    run = tmp_path / "run"
    done = run_script("search.py", "--config", config, *command_line(damaged, run), check=False)
    assert_refused(done, "validation", "part-*.parquet")
    assert not (run / "allocation.json").exists()


def test_an_allocation_of_another_schema(data: Path, config: Path, tmp_path: Path, run_script: Callable) -> None:
    foreign = tmp_path / "foreign.json"
    Allocation.uniform(small_schema(10, 20), 4).save(foreign)
    where = command_line(data, tmp_path / "run")
    done = run_script("retrain.py", "--config", config, "--allocation", foreign, *where, check=False)
    assert_refused(done, "foreign.json was made for data set 'small'", "not for 'tiny'", "only one of them")
    assert not (tmp_path / "run" / "retrain").exists()


@pytest.mark.parametrize(
    ("script", "words", "part"),
    [
        ("retrain.py", ["--run", "nowhere"], "nowhere: no config.yaml there"),
        ("evaluate.py", ["--run", "nowhere"], "nowhere: not a directory of retrain.py"),
        ("evaluate.py", ["--run", "nowhere", "--split", "tests"], "'tests' is none of train, validation, test"),
        ("report.py", ["nowhere"], "nowhere"),
    ],
)
def test_a_directory_that_is_none_of_ours(script: str, words: list[str], part: str, run_script: Callable) -> None:
    assert_refused(run_script(script, *words, check=False), part)


def test_a_run_directory_that_is_not_ours_is_never_deleted(
    data: Path, config: Path, tmp_path: Path, run_script: Callable
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    where = command_line(data, precious, "run.overwrite=true")
    done = run_script("search.py", "--config", config, *where, check=False)
    assert_refused(done, "precious is not a run directory", "not deleted")
    assert (precious / "thesis.tex").read_text() == "years of work"


@pytest.fixture
def refused_on_ranks(config: Path, tmp_path: Path) -> Callable[..., None]:
    """``refused_on_ranks(data, *parts)``: two ranks end soon, with one message and no allocation."""

    def run(data: Path, *parts: str) -> None:
        run = tmp_path / "run"
        words = ["--config", str(config), *command_line(data, run, "search.policy.metric=logloss")]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        ranks = fork_ranks(2, LAUNCH / "search.py", words, ROOT, env, 90, tmp_path)
        told = "".join(done.stdout + done.stderr for done in ranks if done is not None)
        assert [done is not None and done.returncode for done in ranks] == [2, 2], told
        assert "Traceback" not in told
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, told
        for part in parts:
            assert part in errors[0]
        assert not (run / "allocation.json").exists()

    return run


def test_more_ranks_than_rows(damaged: Path, refused_on_ranks: Callable) -> None:
    rewrite(damaged / "validation" / "part-00000.parquet", lambda f: f.head(1))
    body = read_json(damaged / "schema.json")
    body["rows"]["validation"] = 1
    write_sealed(damaged / "schema.json", body)
    (damaged / "manifest.json").unlink()
    refused_on_ranks(damaged, "split 'validation' has 1 rows for 2 ranks")


def test_a_damaged_row_group_stops_a_search_or_is_left_out_when_told(
    damaged: Path, config: Path, tmp_path: Path, run_script: Callable
) -> None:
    path, run = damaged / "train" / "part-00000.parquet", tmp_path / "run"
    column = pq.read_metadata(path).row_group(3).column(2)
    whole = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    whole[middle] ^= 0xFF
    path.write_bytes(whole)
    where = command_line(damaged, run)
    done = run_script("search.py", "--config", config, *where, check=False)
    assert_refused(done, f"{path}, row group 3: cannot be read")
    assert not (run / "allocation.json").exists()
    # The same command with leave to skip goes on in the same run directory.
    done = run_script("search.py", "--config", config, *where, "--data.skip_unreadable", 1)
    rows = Schema.load(damaged).rows["train"]
    assert f"left out because it cannot be read: 1 row group, 500 of {rows:,} rows" in done.stdout
    assert "  train/part-00000.parquet, row group 3: cannot be read (" in done.stdout
    assert (run / "allocation.json").exists()
    assert [e["group"] for e in read_json(run / "unreadable.json")["splits"]["train"]] == [3]


def test_a_broken_shard_ends_all_ranks(damaged: Path, refused_on_ranks: Callable) -> None:
    path = damaged / "train" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    refused_on_ranks(damaged, str(path))
