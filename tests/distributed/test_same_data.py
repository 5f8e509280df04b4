"""Ranks whose copies of the data differ, or are damaged differently, stop together or leave out the same."""

from __future__ import annotations

import itertools
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.store.manifest import MANIFEST
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_sealed
from tests.factories import open_run, rank_context, small_config
from tests.ranks import run_ranks

LINES = [f"{i * 7 % 2},{i},{i % 13},{i}" for i in range(500)]


def make(folder: Path, lines: list[str]) -> Path:
    """Training split of two files of four row groups of 50 rows."""
    folder.mkdir()
    (folder / "r.csv").write_text("y,t,n,x\n" + "\n".join(lines) + "\n")
    (folder / "r.yaml").write_text("files: r.csv\nlabel: y\ntime: t\nfields: {n: categorical, x: dense}\n")
    prepare("table", folder / "r.yaml", folder / "out", split="time", row_group_rows=50, rows_per_shard=200, quiet=True)
    return folder / "out"


def open_training(rank: int, world_size: int, paths: list[str], run_dir: str, limit: int) -> dict[str, Any]:
    """Open the training split of this rank's copy and read an epoch: how it ended."""
    context = rank_context(rank, world_size)
    begin, found = time.monotonic(), {"text": "no error"}
    config = small_config(paths[rank], run_dir, f"data.skip_unreadable={limit}", "train.batch_size=50")
    try:
        run = open_run(config, context)
        stream = run.stream("train", 50, shuffle=True)
        found |= {"rows": stream.rows, "left_out": [[e.name, e.group] for e in stream.left_out]}
        found["windows"] = zlib.crc32(str([[(g.path.name, g.index) for g in w] for w in stream.windows(0)]).encode())
        found["batches"] = sum(1 for _ in stream.epoch(0))
    except UserError as e:
        found |= {"text": str(e), "everywhere": e.everywhere}
    found["seconds"] = time.monotonic() - begin
    return found | {"sum": float(context.sum(torch.ones(1)))}  # the group still works


def open_many(rank: int, world_size: int, cases: dict[str, Any]) -> dict[str, Any]:
    return {name: open_training(rank, world_size, *case) for name, case in cases.items()}


def spoil(path: Path, at: float) -> None:
    """Flip bits at a place between 0 (beginning) and 1 (end) of a file."""
    whole = bytearray(path.read_bytes())
    place = int(len(whole) * at)
    whole[place : place + 8] = bytes(b ^ 0xFF for b in whole[place : place + 8])
    path.write_bytes(whole)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Name of the case -> how it ended on both ranks."""
    folder = tmp_path_factory.mktemp("copies")
    whole = make(folder / "whole", LINES)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, folder / name))

    schema = copy("schema")
    body = read_json(schema / "schema.json")
    body["fields"][0]["cardinality"] += 1
    write_sealed(schema / "schema.json", body)
    fewer = make(folder / "fewer", LINES[:-10])
    other = make(folder / "other", [f"{1 - int(line[0])}{line[1:]}" for line in LINES])
    unmarked = [copy("unmarked0"), copy("unmarked1")]
    for path in unmarked:
        (path / MANIFEST).unlink()
    changed = unmarked[1] / "train" / "part-00001.parquet"
    pq.write_table(pq.read_table(changed), changed, row_group_size=50, compression="none")
    shard, group, footer, gone = copy("shard"), copy("group"), copy("footer"), copy("gone")
    (shard / "train" / "part-00001.parquet").unlink()
    spoil(group / "train" / "part-00000.parquet", 0.1)
    cut(footer / "train" / "part-00001.parquet")
    shutil.rmtree(gone / "train")
    apart, both = copy("apart"), copy("both")
    spoil(apart / "train" / "part-00001.parquet", 0.1)
    spoil(both / "train" / "part-00000.parquet", 0.1)

    number = itertools.count()

    def case(first: Path, second: Path, limit: int = 0) -> list[Any]:
        return [[str(first), str(second)], str(folder / f"run{next(number)}"), limit]

    cases = {
        "equal": case(whole, copy("equal")),
        "schema": case(whole, schema),
        "rows": case(whole, fewer),
        "content": case(whole, other),
        "content without manifest": case(*unmarked),
        "shard missing": case(whole, shard),
        "split missing": case(whole, gone),
        "group, stop": case(whole, group),
        "group, skip": case(whole, group, 1),
        "group of both": case(both, both, 1),
        "a group of each": case(group, apart, 2),
        "a group of each, too many": case(group, apart, 1),
        "footer": case(footer, whole, 4),
        "split missing, skip": case(whole, gone, 4),
    }
    ranks = run_ranks(open_many, 2, folder, cases)
    found = {name: [rank[name] for rank in ranks] for name in cases}
    assert not list(folder.glob("run*/checkpoints"))
    for results in found.values():
        for result in results:
            assert result["seconds"] < 20 and result["sum"] == 2
    return found


def test_equal_copies_are_fine(ended: dict[str, list[dict[str, Any]]]) -> None:
    for found in ended["equal"]:
        assert (found["text"], found["rows"], found["batches"]) == ("no error", 400, 8)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("schema", ["field 'n': cardinality 15", "there, cardinality 14", " on rank 0. "]),
        ("rows", ["rows of the train split: 392 there, 400 on rank 0", "rows of the validation split: 49 there"]),
        ("content", ["train/part-00000.parquet: 200 rows in 4 row groups", "; train/part-00001.parquet: ", "SHA-256"]),
        ("content without manifest", ["train/part-00001.parquet: 200 rows in 4 row groups", " bytes there"]),
    ],
)
def test_copies_that_differ_end_both_ranks_and_what_differs_is_named(
    ended: dict[str, list[dict[str, Any]]], name: str, parts: list[str]
) -> None:
    first, second = ended[name]
    assert first["text"] == second["text"] and first["everywhere"] and second["everywhere"]
    assert first["text"].startswith("rank 1 (") and ") sees other data than rank 0: " in first["text"]
    for part in parts:
        assert part in first["text"]


def test_a_shard_that_one_rank_lacks_ends_both(ended: dict[str, list[dict[str, Any]]]) -> None:
    first, second = ended["shard missing"]
    assert "train: 200 rows in the shards, 400 in schema.json. A shard is missing" in second["text"]
    assert first["text"] == f"rank 1 failed while opening the train split: {second['text']}"
    first, second = ended["split missing"]
    assert "train: no part-*.parquet there" in second["text"] and "train: no part-*.parquet there" in first["text"]


def test_a_group_that_one_rank_cannot_read_stops_by_default_and_is_left_out_by_both_when_told(
    ended: dict[str, list[dict[str, Any]]],
) -> None:
    first, second = ended["group, stop"]
    assert "rank 1 failed while comparing the train split with its manifest" in first["text"]
    assert "part-00000.parquet, row group 0: cannot be read" in second["text"]
    for name in ("group, skip", "group of both"):
        first, second = ended[name]
        assert first["left_out"] == second["left_out"] == [["part-00000.parquet", 0]]
        assert first["rows"] == second["rows"] == 350 and first["batches"] == second["batches"] == 7
        assert first["windows"] == second["windows"]


def test_what_any_copy_lacks_counts_for_all(ended: dict[str, list[dict[str, Any]]]) -> None:
    first, second = ended["a group of each"]
    wanted = [["part-00000.parquet", 0], ["part-00001.parquet", 0]]
    assert first["left_out"] == second["left_out"] == wanted and first["rows"] == second["rows"] == 300
    first, second = ended["a group of each, too many"]
    assert first["text"].split(": ", 1)[1] == second["text"].split(": ", 1)[1]
    assert "2 row groups cannot be read, data.skip_unreadable allows 1" in first["text"] and first["everywhere"]
    first, second = ended["footer"]
    assert first["left_out"] == second["left_out"] == [["part-00001.parquet", None]] and first["rows"] == 200
    first, second = ended["split missing, skip"]
    for found in (first, second):
        assert "8 row groups cannot be read, data.skip_unreadable allows 4" in found["text"] and found["everywhere"]
