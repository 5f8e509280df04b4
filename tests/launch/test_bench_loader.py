"""``tools/bench/loader.py`` on tiny data: every figure is there and says what it claims."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.schema import Schema
from tests.scripts import Done, fork_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    folder, env = tmp_path_factory.mktemp("bench"), os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*words: object) -> Done:
        done = fork_script(ROOT / "tools" / "bench" / "loader.py", [*map(str, words)], ROOT, env, 120, folder)
        assert done is not None, "not done after 120 s"
        return done

    return run


def test_it_measures_both_sides_from_disk_and_from_memory(tmp_path: Path, data: Path, bench: Callable) -> None:
    sizes = ["--batch", 128, "--window-rows", 1000, "--trainer-rate", 2000, "--sample-s", 0.01]
    done = bench("--data", data, *sizes, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    found, schema = json.loads((tmp_path / "out.json").read_text()), Schema.load(data)
    batches = schema.rows["train"] // 128
    assert (found["fields"], found["batch"], found["batches"]) == (4, 128, batches)
    assert (found["window_rows"], found["split_rows"]) == (1000, schema.rows["train"])
    for state in ("disk", "cache"):
        assert found[f"loader_{state}_rows"] == 128 * batches
        assert found[f"pyarrow_{state}_rows"] == schema.rows["train"]
        rate, floor = found[f"loader_{state}_rows_per_s"], found[f"pyarrow_{state}_rows_per_s"]
        assert rate > 0 and floor > 0 and found[f"loader_{state}_mb_from_disk"] >= 0
        assert found[f"loader_to_pyarrow_{state}"] == pytest.approx(rate / floor)
        assert found[f"loader_to_trainer_{state}"] == pytest.approx(rate / 2000)
    assert found["memory_samples"] >= 2
    assert 10 < found["first_quarter_peak_mb"] < 100_000 and 10 < found["last_quarter_peak_mb"] < 100_000
    # The same figures are on the screen, one a line.
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(found)


def test_batches_bound_a_pass_and_help_has_commands(data: Path, bench: Callable) -> None:
    done = bench("--data", data, "--batch", 128, "--window-rows", 500, "--batches", 3)
    figures = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()}
    # 384 rows lie in the first window, which is one row group of 500.
    assert figures["loader_cache_rows"] == "384" and figures["pyarrow_cache_rows"] == "500"
    assert not any(key.startswith("loader_to_trainer") for key in figures)
    assert "python tools/bench/loader.py --data" in bench("--help").stdout
