"""prepare.py --format ids as a user starts it, by two processes, and a training on what it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.schema import SPLITS
from tests.factories import command_line

SOURCE = "label: label\nfields: {user: 30, item: {cardinality: 20, column: item_id}}\ndense: [price]\n"


def make(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for part in range(3):
            n = 400 if split == "train" else 80
            columns = {
                "label": pa.array(rng.integers(0, 2, n), pa.int32()),
                "user": pa.array(rng.integers(0, 30, n), pa.int64()),
                "item_id": pa.array(rng.integers(0, 20, n), pa.int32()),
                "price": pa.array(rng.standard_normal(n), pa.float32()),
            }
            (folder / split).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), folder / split / f"part-{part}.parquet")
    (folder / "ids.yaml").write_text(SOURCE)
    return folder


def test_two_processes_take_over_what_one_would_and_it_can_be_trained_on(
    tmp_path: Path, run_script: Callable, on_two_ranks: Callable, config: Path
) -> None:
    words = ["--format", "ids", "--input", make(tmp_path / "made")]
    on_two_ranks("prepare.py", *words, "--out", tmp_path / "two")
    one = run_script("prepare.py", *words, "--out", tmp_path / "one")
    assert "1,680 rows in" in one.stdout and "0 of 9 files are used as they are" in one.stdout
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()
    run_script("prepare.py", "--verify", tmp_path / "two")
    training = command_line(tmp_path / "two", tmp_path / "run", "train.steps=3")
    trained = run_script("retrain.py", "--config", config, "--allocation", "ues-4", *training)
    assert "ues-4: test auc" in trained.stdout
    wrong = run_script("prepare.py", *words, "--out", tmp_path / "no", "--min-count", 2, check=False)
    assert wrong.returncode == 2 and "takes splits and ids as they are" in wrong.stderr
