"""Batches: the same global batches for any number of ranks, every row once, resumable, and checked."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from embsearch_dist.data.load import dataset as module
from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.dataset import BatchStream, open_split, read_rows
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.store.shards import Shards
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema

ROWS = 1000


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that can be told apart: field ``key`` is unique, ``n`` and ``x`` follow from it. 800/100/100."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [f"{i * 7 % 2},{i},k{i},{i % 13},{i / 10}" for i in range(ROWS)]
    (folder / "r.csv").write_text("y,t,key,n,x\n" + "\n".join(lines) + "\n")
    (folder / "r.yaml").write_text(
        "files: r.csv\nlabel: y\ntime: t\nfields: {key: categorical, n: categorical, x: dense}\n"
    )
    prepare("table", folder / "r.yaml", folder / "out", split="time", row_group_rows=64, rows_per_shard=256, quiet=True)
    return folder / "out"


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    import shutil

    shutil.copytree(prepared, tmp_path / "out")
    return tmp_path / "out"


def stream(directory: Path, split: str = "train", batch: int = 96, **options: object) -> BatchStream:
    options = {"window_rows": 200} | options
    return BatchStream(directory, Schema.load(directory), split, batch, **options)  # type: ignore[arg-type]


def cells(batch: Batch) -> np.ndarray:
    """``[B, 4]``: ids of both fields, dense and label of every sample."""
    ids = batch.sparse.values().view(2, batch.size).numpy()
    return np.column_stack([ids.T, batch.dense.numpy(), batch.label.numpy()])


def stored(directory: Path, split: str = "train") -> np.ndarray:
    ids, dense, label = read_rows(directory, Schema.load(directory), split)
    return np.column_stack([ids.numpy().T, dense.numpy(), label.numpy()])


def in_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


def test_an_epoch_has_every_row_once_with_its_own_label_but_for_the_dropped_tail(prepared: Path) -> None:
    s = stream(prepared)
    seen = np.concatenate([cells(b) for b in s.epoch(0)])
    assert s.batches_per_epoch == 8 and len(seen) == 768
    # 736 of the 800 training keys are distinct ids beyond 0: each is a row of its own.
    whole = {tuple(r) for r in stored(prepared)}
    assert len(whole) == 800 and {tuple(r) for r in seen} <= whole and len({tuple(r) for r in seen}) == 768


def test_order_is_a_function_of_seed_and_epoch_alone(prepared: Path) -> None:
    def order(epoch: int, **options: object) -> np.ndarray:
        return np.concatenate([cells(b) for b in stream(prepared, **options).epoch(epoch)])

    first = order(0)
    s = stream(prepared)
    list(s.epoch(0))
    later = np.concatenate([cells(b) for b in s.epoch(1)])
    assert np.array_equal(later, order(1)), "what was read before must not matter"
    assert np.array_equal(first, order(0, prefetch=0))
    assert not np.array_equal(first, order(1)) and not np.array_equal(first, order(0, seed=1))
    # Which rows share a window differs between epochs, not only their order inside it.
    assert not np.array_equal(in_order(first[:192]), in_order(order(1)[:192]))
    assert np.array_equal(order(0, window_rows=5000), order(0, window_rows=800)), "one window either way"


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch", [96, 97, 799])
def test_any_number_of_ranks_sees_the_same_global_batches(
    prepared: Path, shuffle: bool, world: int, batch: int
) -> None:
    alone = [cells(b) for b in stream(prepared, batch=batch, shuffle=shuffle).epoch(2)]
    ranks = [
        list(stream(prepared, batch=batch, shuffle=shuffle, rank=r, world_size=world).epoch(2)) for r in range(world)
    ]
    assert len({len(r) for r in ranks}) == 1, "ranks must agree on the number of batches"
    joined = [np.concatenate([cells(r[k]) for r in ranks]) for k in range(len(ranks[0]))]
    sizes = [[r[k].size for r in ranks] for k in range(len(ranks[0]))]
    assert all(max(s) - min(s) <= 1 and min(s) > 0 for s in sizes)
    assert np.array_equal(np.concatenate(joined), np.concatenate(alone))
    for one, many in list(zip(alone, joined))[:-1]:
        assert np.array_equal(one, many)
    assert [b.position for b in ranks[0]] == [Position(2, k + 1) for k in range(len(ranks[0]))]


def test_evaluation_has_all_rows_in_stored_order_and_no_empty_batch(prepared: Path) -> None:
    for world in (1, 2, 3):
        ranks = [stream(prepared, "test", 33, shuffle=False, rank=r, world_size=world) for r in range(world)]
        batches = [list(r.epoch(0)) for r in ranks]
        # 100 = 3 * 33 + 1: a rest of one row joins the batch before it where there are more ranks than that.
        assert ranks[0].batches_per_epoch == (4 if world == 1 else 3)
        rows = np.concatenate([cells(b[k]) for k in range(len(batches[0])) for b in batches])
        assert np.array_equal(rows, stored(prepared, "test"))
        assert all(b.size > 0 for r in batches for b in r)


def test_a_split_smaller_than_a_batch_is_one_batch(prepared: Path) -> None:
    s = stream(prepared, "validation", 4096)
    (only,) = list(s.epoch(0))
    assert s.batches_per_epoch == 1 and only.size == 100
    assert np.array_equal(in_order(cells(only)), in_order(stored(prepared, "validation")))
    two = [next(iter(stream(prepared, "validation", 4096, rank=r, world_size=2).epoch(0))) for r in (0, 1)]
    assert np.array_equal(np.concatenate([cells(b) for b in two]), cells(only))


@pytest.mark.parametrize("start", [0, 1, 3, 7, 8])
def test_resuming_at_a_position_gives_the_rest_without_reading_what_was_before(
    prepared: Path, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [cells(b) for b in stream(prepared).epoch(3)]
    read: list[int] = []
    true_read = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, groups: read.append(len(groups)) or true_read(self, groups))
    resumed = stream(prepared, start=Position(3, start))
    rest = [cells(b) for b in resumed.epoch(3)]
    assert len(rest) == len(whole) - start
    assert all(np.array_equal(a, b) for a, b in zip(whole[start:], rest))
    stops = np.cumsum([sum(g.rows for g in w) for w in resumed.windows(3)])
    # A window is needed when it ends after the first batch begins and begins before the last full batch ends.
    needed = (stops > start * 96) & (np.append(0, stops[:-1]) < 768)
    assert len(read) == (0 if start == 8 else needed.sum())
    assert len(list(resumed.epoch(4))) == 8, "the next epoch begins at its beginning"


def test_the_jagged_tensor_is_what_torchrec_would_build_and_look_up(prepared: Path) -> None:
    schema = Schema.load(prepared)
    batch = next(iter(stream(prepared).epoch(0)))
    sparse = batch.sparse
    assert sparse.keys() == ["key", "n"] and sparse.stride() == 96
    assert sparse.values().dtype == torch.int32 and sparse.values().is_contiguous()
    assert sparse.length_per_key() == [96, 96] and sparse.offset_per_key() == [0, 96, 192]
    assert torch.equal(sparse.lengths(), torch.ones(192, dtype=torch.int32))
    assert torch.equal(sparse.offsets(), torch.arange(193, dtype=torch.int32))
    assert batch.dense.shape == (96, 1) and batch.dense.dtype == torch.float32
    assert batch.label.shape == (96,) and batch.label.dtype == torch.float32
    tables = [
        EmbeddingBagConfig(name=f.name, embedding_dim=4, num_embeddings=f.cardinality, feature_names=[f.name])
        for f in schema.fields
    ]
    bags = EmbeddingBagCollection(tables=tables)
    pooled = bags(sparse)
    for name in schema.names:
        assert torch.equal(pooled[name], bags.embedding_bags[name].weight[sparse[name].values().long()])


def test_small_splits_are_read_from_disk_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    true_read = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, groups: reads.append(1) or true_read(self, groups))
    small, large = stream(prepared, window_rows=800), stream(prepared, window_rows=300)
    for epoch in range(3):
        list(small.epoch(epoch))
    assert len(reads) == 1
    list(large.epoch(0))
    assert len(reads) > 3


def loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_closing_early_stops_the_thread_and_errors_surface(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = stream(prepared).epoch(0)
    next(iter(batches))
    assert len(loaders()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert not loaders()

    true_read = Shards.read
    calls: list[int] = []

    def failing(self: Shards, groups: list) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return true_read(self, groups)

    monkeypatch.setattr(Shards, "read", failing)
    got = []
    with pytest.raises(MemoryError, match="no room"):
        for batch in stream(prepared).epoch(0):
            got.append(batch)
    assert 0 < len(got) < 8 and not loaders()


def test_the_thread_stays_no_further_ahead_than_told(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    true_call = module.BatchMaker.__call__
    monkeypatch.setattr(
        module.BatchMaker, "__call__", lambda self, rows, position: made.append(1) or true_call(self, rows, position)
    )
    batches = stream(prepared, prefetch=2).epoch(0)
    next(iter(batches))
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One consumed, two waiting, one in the thread's hand.
    assert len(made) == 4
    batches.close()  # type: ignore[attr-defined]


def rewrite(path: Path, column: str, row: int, value: object) -> None:
    """Change one cell of a shard, keeping its row groups of 64."""
    frame = pl.read_parquet(path)
    values = frame[column].to_list()
    values[row] = value
    changed = frame.with_columns(pl.Series(column, values, dtype=frame[column].dtype))
    pq.write_table(changed.to_arrow(), path, row_group_size=64)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("n", 14, r"part-00001.parquet, row group 1: field 'n' has 1 ids outside 0..13, the first is 14"),
        ("n", -1, r"row group 1: field 'n' has 1 ids outside 0..13, the first is -1"),
        ("n", None, r"row group 1: column 'n' has 1 nulls"),
        ("label", 0.5, r"row group 1: 1 labels are neither 0 nor 1, the first is 0.5"),
        ("label", float("nan"), r"row group 1: 1 labels are neither 0 nor 1"),
        ("x", float("inf"), r"row group 1: dense column 'x' has values that are not finite"),
    ],
)
def test_bad_cells_in_a_shard_are_named(damaged: Path, column: str, value: object, message: str) -> None:
    rewrite(damaged / "train" / "part-00001.parquet", column, 100, value)
    with pytest.raises(UserError, match=message):
        list(stream(damaged).epoch(0))
    with pytest.raises(UserError, match=message):
        read_rows(damaged, Schema.load(damaged), "train")


def test_damaged_files_are_named(damaged: Path) -> None:
    path = damaged / "train" / "part-00002.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"part-00002.parquet: not a whole Parquet file"):
        stream(damaged)
    # Flipped bits in the pages: the footer is fine, the checksum of a page is not.
    middle = len(whole) // 3
    path.write_bytes(whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 8]) + whole[middle + 8 :])
    with pytest.raises(UserError, match=r"part-00002.parquet, row group \d: cannot be read"):
        list(stream(damaged).epoch(0))
    path.unlink()
    with pytest.raises(UserError, match=r"544 rows in the shards, 800 in schema.json"):
        stream(damaged)


def test_shards_that_do_not_fit_the_schema_are_refused(damaged: Path) -> None:
    path = damaged / "test" / "part-00000.parquet"
    pl.read_parquet(path).with_columns(pl.col("n").cast(pl.Int64)).write_parquet(path)
    with pytest.raises(UserError, match=r"column 'n' has type int64, expected int32"):
        stream(damaged, "test")
    pl.read_parquet(path).drop("n").write_parquet(path)
    with pytest.raises(UserError, match=r"column 'n' is missing"):
        stream(damaged, "test")
    path.unlink()
    with pytest.raises(UserError, match=r"no part-\*.parquet there"):
        stream(damaged, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2 ranks does not exist"),
        ({"batch": 3, "world_size": 4}, "too small for 4 ranks"),
        ({"split": "test", "batch": 512, "world_size": 101}, "has 100 rows for 101 ranks"),
        ({"window_rows": 0}, "window_rows 0"),
    ],
)
def test_sizes_are_checked(prepared: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream(prepared, **options)


def test_a_start_beyond_the_epoch_is_refused(prepared: Path) -> None:
    with pytest.raises(UserError, match="cannot start at epoch 0, batch 9: an epoch has 8 batches"):
        stream(prepared).epoch(0, start_batch=9)


def test_read_rows_stops_at_its_limit(prepared: Path) -> None:
    shards = open_split(prepared, "train")
    assert shards.rows == 800 and [g.rows for g in shards.groups] == [64] * 12 + [32]
    ids, dense, label = read_rows(prepared, shards.schema, "train", limit=70)
    assert ids.shape == (2, 70) and dense.shape == (70, 1) and label.shape == (70,)
    assert np.array_equal(ids.numpy(), stored(prepared)[:70, :2].T)
    assert read_rows(prepared, shards.schema, "train", limit=5000)[2].shape == (800,)
