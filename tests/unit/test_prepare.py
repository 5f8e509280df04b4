"""From raw files to a prepared data set: splits, ids, layout, repeatability, and nothing half-written."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import blocks
from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.data.prepare import splits, vocabulary
from embsearch_dist.data.prepare.partial import MARK, whole_directory
from embsearch_dist.data.prepare.pipeline import Options, prepare, summary
from embsearch_dist.data.prepare.splits import HOW_TO_SPLIT, random_split
from embsearch_dist.data.prepare.vocabulary import load_values
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Schema
from tests.raw_clicks import digest, make_raw


def raw_rows(source: Path) -> list[list[str]]:
    return [line.split(",") for line in (source.parent / "clicks.csv").read_text().splitlines()[1:]]


def test_ids_are_those_of_the_training_split_by_falling_count(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    schema = prepare("table", source, tmp_path / "out", min_count=80, quiet=True)
    raw = raw_rows(source)
    split = random_split(np.arange(len(raw)), 0)
    train = [r for r, s in zip(raw, split, strict=True) if s == 0]
    counts = Counter(r[2] for r in train if r[2])
    kept = sorted((v for v, n in counts.items() if n >= 80), key=lambda v: (-counts[v], v))
    assert 0 < len(kept) < len(counts), "the example must have rare values"
    assert load_values(tmp_path / "out", "user").rows() == [(v, i + 1, counts[v]) for i, v in enumerate(kept)]
    assert schema.fields[0].cardinality == len(kept) + 1
    for k, name in enumerate(SPLITS):
        ids, dense, label = read_rows(tmp_path / "out", schema, name)
        rows = [r for r, s in zip(raw, split, strict=True) if s == k]
        assert ids[0].tolist() == [kept.index(r[2]) + 1 if r[2] in kept else 0 for r in rows]
        assert label.tolist() == [float(r[0]) for r in rows]
        scores = np.array([float(r[4]) for r in train])
        expected = (np.array([float(r[4]) for r in rows]) - scores.mean()) / scores.std()
        assert np.allclose(dense[:, 0].numpy(), expected, atol=1e-6)
    seen = schema.provenance["fields"]["user"]  # type: ignore[index,call-overload]
    missing = sum(not r[2] for r in train) / len(train)
    rare = sum(bool(r[2]) and r[2] not in kept for r in train) / len(train)
    assert seen == {"distinct": len(counts), "missing_share": round(missing, 6), "rare_share": round(rare, 6)}


def test_time_split_is_exact_and_breaks_ties_by_row(tmp_path: Path) -> None:
    source = make_raw(tmp_path, rows=1003)
    schema = prepare("table", source, tmp_path / "out", split="time", quiet=True)
    assert schema.rows == {"train": 802, "validation": 100, "test": 101}
    raw = raw_rows(source)
    order = sorted(range(len(raw)), key=lambda i: (float(raw[i][1]), i))
    parts = {"train": order[:802], "validation": order[802:902], "test": order[902:]}
    book = [v for v, _, _ in load_values(tmp_path / "out", "user").rows()]
    for name, rows in parts.items():
        ids, _, _ = read_rows(tmp_path / "out", schema, name)
        assert ids[0].tolist() == [book.index(raw[i][2]) + 1 if raw[i][2] in book else 0 for i in sorted(rows)]


def test_random_split_is_8_1_1_and_a_function_of_row_and_seed() -> None:
    split = random_split(np.arange(200_000), 3)
    share = np.bincount(split) / 200_000
    # Three standard deviations of a share of one tenth are 0.002.
    assert np.allclose(share, [0.8, 0.1, 0.1], atol=0.003)
    assert np.array_equal(split[777:999], random_split(np.arange(777, 999), 3))
    assert (split != random_split(np.arange(200_000), 4)).mean() > 0.3
    # Neighbouring rows are independent: 0.01 of pairs are (validation, validation).
    assert abs(float(((split[1:] == 1) & (split[:-1] == 1)).mean()) - 0.01) < 0.001


def test_layout_has_fixed_row_groups_and_narrow_types(tmp_path: Path) -> None:
    schema = prepare("table", make_raw(tmp_path), tmp_path / "out", row_group_rows=100, rows_per_shard=250, quiet=True)
    files = sorted((tmp_path / "out" / "train").iterdir())
    groups = [
        [pq.read_metadata(f).row_group(g).num_rows for g in range(pq.read_metadata(f).num_row_groups)] for f in files
    ]
    assert [n for f in groups for n in f][:-1] == [100] * (schema.rows["train"] // 100)
    assert [sum(f) for f in groups][:-1] == [300] * (len(groups) - 1) and len(groups) == 3
    arrow = pq.read_schema(files[0])
    assert [(f.name, str(f.type)) for f in arrow] == [
        *(("label", "float"), ("user", "int32"), ("price", "int32"), ("score", "float"))
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*SPLITS, "vocabulary", "schema.json", "manifest.json"]
    )
    assert Schema.load(tmp_path / "out") == schema


def test_neither_blocks_nor_shards_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_raw(tmp_path)
    whole = prepare("table", source, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 777)
    cut = prepare("table", source, tmp_path / "cut", row_group_rows=64, rows_per_shard=64, quiet=True)
    assert whole.fields == cut.fields and whole.rows == cut.rows
    for name in SPLITS:
        a, b = (read_rows(tmp_path / d, s, name) for d, s in (("whole", whole), ("cut", cut)))
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[2], b[2]) and np.allclose(a[1], b[1], atol=1e-6)


def test_limits_of_memory_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_raw(tmp_path)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    for split in HOW_TO_SPLIT:
        prepare("table", source, tmp_path / split, split=split, min_count=3, quiet=True)
    monkeypatch.setattr(vocabulary, "PASS_VALUES", 50)
    monkeypatch.setattr(vocabulary, "BATCH_VALUES", 10)
    monkeypatch.setattr(splits, "TIMES_IN_MEMORY", 8)
    for split in HOW_TO_SPLIT:
        prepare("table", source, tmp_path / f"{split}-tight", split=split, min_count=3, quiet=True)
        assert digest(tmp_path / f"{split}-tight") == digest(tmp_path / split)


def test_the_row_at_a_rank_is_found_without_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times:
        def __init__(self, first_row: int, time: np.ndarray) -> None:
            self.first_row, self.rows, self._time = first_row, len(time), time
            self.times = (float(time.min()), float(time.max()))

        def time(self) -> np.ndarray:
            assert self.times[0] != self.times[1], "times that are all alike are not stored"
            return self._time

    rng = np.random.default_rng(0)
    near = 1.4e15 + rng.integers(0, 50, 400)  # differ in their last bits only
    time = np.concatenate([rng.normal(0, 1e3, 300), near, np.full(200, -0.0), rng.integers(-2, 3, 300), [1e300]])
    parts = [Times(k, time[k : k + 100]) for k in range(0, len(time), 100)]
    order = np.lexsort((np.arange(len(time)), time))
    for limit in (1, 200, 1 << 20):
        monkeypatch.setattr(splits, "TIMES_IN_MEMORY", limit)
        for rank in (0, 1, 250, 480, 600, 900, len(time) - 1):
            found = splits._at_rank(parts, rank)  # type: ignore[arg-type]
            assert found == (time[order[rank]], order[rank])


def test_two_runs_give_the_same_bytes_whatever_the_threads(tmp_path: Path, repo_root: Path) -> None:
    source = make_raw(tmp_path, rows=5000)
    for threads in ("1", "4"):
        subprocess.run(
            [sys.executable, repo_root / "launch" / "prepare.py", "--format", "table", "--input", source]
            + ["--out", tmp_path / threads, "--quiet"],
            env=os.environ | {"POLARS_MAX_THREADS": threads},
            check=True,
        )
    assert digest(tmp_path / "1") == digest(tmp_path / "4")
    assert len(digest(tmp_path / "1")) == 7


def test_an_error_in_the_last_row_leaves_nothing(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    with (tmp_path / "clicks.csv").open("a") as f:
        f.write("5,1,a,1,1\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"clicks.csv, line 1002, column 'click'"):
        prepare("table", source, tmp_path / "out", quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_killed_prepare_is_not_taken_for_whole_and_does_not_block_the_next(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    partial = tmp_path / "out.partial"
    (partial / "train").mkdir(parents=True)
    (partial / MARK).touch()
    with pytest.raises(UserError, match="not a prepared data set"):
        Schema.load(tmp_path / "out")
    prepare("table", source, tmp_path / "out", quiet=True)
    assert not partial.exists() and (tmp_path / "out" / "schema.json").exists()


def test_a_living_prepare_is_left_alone(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with (partial / MARK).open("w") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work there"):
            prepare("table", source, tmp_path / "out", quiet=True)
    assert (partial / MARK).exists()


def test_overwrite_replaces_only_prepared_data_and_only_when_done(tmp_path: Path) -> None:
    source = make_raw(tmp_path)
    out = tmp_path / "out"
    prepare("table", source, out, quiet=True)
    before = digest(out)
    with pytest.raises(UserError, match=r"out exists. .*--overwrite"):
        prepare("table", source, out, quiet=True)
    with pytest.raises(UserError, match="empty"):
        prepare("table", make_raw(tmp_path, rows=2), out, overwrite=True, quiet=True)
    assert digest(out) == before, "a failed overwrite must leave what was there"
    prepare("table", make_raw(tmp_path, seed=1), out, overwrite=True, quiet=True)
    assert digest(out) != before
    keep = tmp_path / "mine"
    keep.mkdir()
    (keep / "thesis.tex").touch()
    with pytest.raises(UserError, match="mine is not a prepared data set"):
        prepare("table", source, keep, overwrite=True, quiet=True)
    assert (keep / "thesis.tex").exists()
    with pytest.raises(UserError, match="clicks.csv lies in"):
        prepare("table", source, tmp_path, overwrite=True, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clicks.csv", "mine", "out", "source.yaml"]


@pytest.mark.parametrize("name", ["config.yaml", "retrain/adass", "model.json", "notes.txt", "train/mine.csv", "raw"])
def test_overwrite_deletes_nothing_that_no_preparation_made(tmp_path: Path, name: str) -> None:
    """Run directories and model directories hold a schema.json, too."""
    source, out = make_raw(tmp_path), tmp_path / "out"
    prepare("table", source, out, quiet=True)
    mine = out / name / "kept" if name in ("raw", "retrain/adass") else out / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("weeks of work")
    with pytest.raises(UserError, match=f"{name.split('/')[0]}.* was not made by a preparation of data, .*--out"):
        prepare("table", source, out, overwrite=True, quiet=True)
    assert mine.read_text() == "weeks of work" and not out.with_name("out.partial").exists()


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"), whole_directory(tmp_path / "out", False):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "chrono"}, "--split 'chrono'"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"min_count": 0}, "--min-count must be at least 1"),
        ({"row_group_rows": 0}, "--row-group-rows must be at least 1"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_values_all_rare_or_missing_leave_one_id(tmp_path: Path) -> None:
    (tmp_path / "clicks.csv").write_text("click,user,gone\n" + "".join(f"{i % 2},u{i},\n" for i in range(100)))
    (tmp_path / "s.yaml").write_text(
        "files: clicks.csv\nlabel: click\nmin_count: 2\nfields: {user: categorical, gone: bucketed}\n"
    )
    schema = prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True)
    assert schema.cardinalities == [1, 1]
    assert not read_rows(tmp_path / "out", schema, "train")[0].any()
    text = summary(schema)
    assert "100.00%" in text and f"{schema.rows['train']}" in text


def test_script_prints_the_error_alone_and_exits_2(
    tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = str(tmp_path / "out")
    bad = run_script("prepare.py", "--format", "criteo", "--input", str(tmp_path / "no.txt"), "--out", out, check=False)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.splitlines() == [f"error: {tmp_path}/no.txt: no such file. Check --input"]
    good = run_script("prepare.py", "--format", "synthetic", "--rows", "2000", "--out", out)
    assert "label mean" in good.stdout and "2,000 rows in" in good.stdout
    assert Schema.load(out).dataset == "synthetic"
    again = run_script("prepare.py", "--format", "synthetic", "--out", out + "2", "--split", "time", check=False)
    assert again.returncode == 2 and again.stderr.startswith("error: a chronological split is not possible")
    shown = run_script("prepare.py", "--help").stdout
    assert "python launch/prepare.py --format movielens_1m" in shown and "--min-count" in shown


def test_example_source_file_is_valid_and_complete(repo_root: Path, tmp_path: Path) -> None:
    text = (repo_root / "configs" / "sources" / "example.yaml").read_text()
    (tmp_path / "example.yaml").write_text(text)
    header = "clicked,shown_at,user,item,price,position,tags,liked,Ad.Text (en)\n"
    cells = [(i % 2, 1 + i // 10, i % 5, i % 7, i, i % 3, i % 4, i % 9, i / 8, i % 2) for i in range(100)]
    line = "%d,2014-10-%02d,u%d,i%d,%d,%d,t%d|t8,i%d:%g|i1:2,hi %d\n"
    rows = "".join(line % row for row in cells)
    for name in ("clicks_1.csv", "clicks_2.csv"):
        (tmp_path / name).write_text(header + rows)
    schema = prepare("table", tmp_path / "example.yaml", tmp_path / "out", split="time", quiet=True)
    assert schema.dataset == "my_clicks" and schema.names == ["user", "item", "price", "tags", "liked", "ad_text"]
    assert [(f.pooling, f.weighted) for f in schema.fields[3:5]] == [("mean", False), ("sum", True)]
    assert schema.dense == ("position",) and schema.rows == {"train": 160, "validation": 20, "test": 20}


def test_movielens_1m_whole(data_dir: Path, tmp_path: Path) -> None:
    schema = prepare("movielens_1m", data_dir / "movielens-1m", tmp_path / "out", quiet=True)
    assert sum(schema.rows.values()) == 1_000_209
    assert schema.names[0] == "user_id" and schema.fields[0].cardinality == 6_041
    likes = sum(int(read_rows(tmp_path / "out", schema, s)[2].sum()) for s in SPLITS)
    assert likes == 575_281
    # Most rated movie: American Beauty, 2858, in any random 80 %.
    assert load_values(tmp_path / "out", "movie_id").row(0)[0] == "2858"
    with pytest.raises(UserError, match=r"chronological split is not possible: .*no timestamps; use --split random"):
        prepare("movielens_1m", data_dir / "movielens-1m", tmp_path / "other", split="time", quiet=True)
    assert not (tmp_path / "other").exists()


def test_movielens_100k_by_time_has_the_newest_in_test(data_dir: Path, tmp_path: Path) -> None:
    schema = prepare("movielens_100k", data_dir / "movielens-100k", tmp_path / "out", split="time", quiet=True)
    assert schema.rows == {"train": 80_000, "validation": 10_000, "test": 10_000}
    stamp = np.sort(np.loadtxt(data_dir / "movielens-100k" / "u.data", dtype=np.int64)[:, 3])
    hours = load_values(tmp_path / "out", "hour_in_day")
    ids = read_rows(tmp_path / "out", schema, "test")[0][schema.names.index("hour_in_day")].numpy()
    found = Counter(int(h) for h in hours["value"].gather(ids - 1))
    # Ties at the cut could differ by row, but hours within one second are equal.
    assert found == Counter(((stamp[90_000:] // 3600) % 24).tolist())


def test_criteo_and_avazu_defaults(data_dir: Path, tmp_path: Path) -> None:
    criteo = prepare("criteo", data_dir / "criteo" / "train_first_10000.txt", tmp_path / "c", split="time", quiet=True)
    assert criteo.rows == {"train": 8_000, "validation": 1_000, "test": 1_000} and len(criteo.fields) == 39
    assert criteo.provenance["min_count"] == 10
    counts = load_values(tmp_path / "c", "C3")["count"]
    assert int(counts.min()) >= 10  # type: ignore[arg-type]
    first = (data_dir / "criteo" / "train_first_10000.txt").read_text().splitlines()[:8000]
    assert (
        int(counts[0]) == Counter(line.split("\t")[16] for line in first if line.split("\t")[16]).most_common(1)[0][1]
    )
    avazu = prepare("avazu", data_dir / "avazu" / "train_first_9999.csv", tmp_path / "a", min_count=1, quiet=True)
    assert len(avazu.fields) == 22 and sum(avazu.rows.values()) == 9_999
    body = json.loads((tmp_path / "a" / "schema.json").read_text())
    assert body["provenance"]["min_count"] == 1 and body["provenance"]["files"][0]["bytes"] == 1_549_115
