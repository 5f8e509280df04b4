"""Row groups that cannot be read: all of them are found, no other is, and the order of the rest is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream, read_rows
from embsearch_dist.data.store import unreadable
from embsearch_dist.data.store.manifest import MANIFEST
from embsearch_dist.data.store.shards import LeftOut
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json, write_sealed
from embsearch_dist.ranks.same_data import RECORD
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.position import Progress
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.trainer import Trainer
from tests.factories import CONFIGS, one_rank, open_run, prepared_rows, small_config

ROWS = 1000
DAMAGED = ("part-00001.parquet", 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 training rows in four files of 4, 4, 4 and 1 row groups of 64; 100 validation and test rows, in 2 each."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [f"{i * 7 % 2},{i},k{i},{i / 10}" for i in range(ROWS)]
    return prepared_rows(folder, lines, "key")


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def spoil(path: Path, group: int) -> None:
    """Flip bits in the first page of a row group."""
    column = pq.read_metadata(path).row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    whole = bytearray(path.read_bytes())
    place = start + column.total_compressed_size // 2
    whole[place : place + 8] = bytes(b ^ 0xFF for b in whole[place : place + 8])
    path.write_bytes(whole)


def cut(path: Path) -> None:
    """Take the footer off."""
    path.write_bytes(path.read_bytes()[:-20])


def found(data: Path, split: str = "train") -> tuple[list[LeftOut], list[str]]:
    return unreadable.find(data, Schema.load(data), split, unreadable.names_of(data, split))


def keys(entries: list[LeftOut]) -> list[tuple[str, int | None, int | None, int]]:
    return [(e.name, e.group, e.rows, e.count) for e in entries]


def test_whole_data_has_none_and_is_not_decoded(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreadable, "read_groups", lambda *_: pytest.fail("the checksums are right"))
    for split in ("train", "validation", "test"):
        assert found(prepared, split) == ([], [])


@pytest.mark.parametrize("with_manifest", [True, False])
def test_each_damaged_row_group_is_found_and_no_other(data: Path, with_manifest: bool) -> None:
    if not with_manifest:
        (data / MANIFEST).unlink()
    spoil(data / "train" / "part-00001.parquet", 2)
    spoil(data / "train" / "part-00000.parquet", 0)
    spoil(data / "train" / "part-00000.parquet", 3)
    entries, changed = found(data)
    assert keys(entries) == [
        ("part-00000.parquet", 0, 64, 1),
        ("part-00000.parquet", 3, 64, 1),
        ("part-00001.parquet", 2, 64, 1),
    ]
    assert all(e.why.startswith("cannot be read (") for e in entries) and changed == []
    assert found(data, "validation") == ([], [])


@pytest.mark.parametrize(
    ("with_manifest", "rows", "count", "damage"),
    [(True, 256, 4, cut), (False, None, 1, cut), (True, 256, 4, Path.unlink)],
)
def test_a_file_without_a_footer_is_left_out_whole(
    data: Path, with_manifest: bool, rows: int | None, count: int, damage: object
) -> None:
    if not with_manifest:
        (data / MANIFEST).unlink()
    damage(data / "train" / "part-00002.parquet")  # type: ignore[operator]
    entries, _ = found(data)
    assert keys(entries) == [("part-00002.parquet", None, rows, count)]
    assert entries[0].why.startswith("not a whole Parquet file")
    stream = open_stream(data, entries)
    assert (stream.rows, stream.rows_left_out) == (544, 256)


def test_ids_out_of_range_are_found_and_a_file_that_only_changed_is_used(data: Path) -> None:
    path = data / "train" / "part-00001.parquet"
    schema, frame = pq.read_schema(path), pl.read_parquet(path)
    top = Schema.load(data).fields[0].cardinality
    ids = frame["key"].to_list()
    ids[70] = top
    changed = frame.with_columns(pl.Series("key", ids, dtype=pl.Int32))
    pq.write_table(changed.to_arrow().cast(schema), path, row_group_size=64)
    pq.write_table(pq.read_table(data / "train" / "part-00000.parquet"), data / "train" / "part-00000.parquet")
    entries, other = found(data)
    assert keys(entries) == [("part-00001.parquet", 1, 64, 1)]
    assert f"1 ids outside 0..{top - 1}, the first is {top}" in entries[0].why
    assert other == ["part-00000.parquet"]


def open_stream(data: Path, left_out: list[LeftOut], batch: int = 96, **options: object) -> BatchStream:
    options = {"window_rows": 200} | options
    return BatchStream(data, Schema.load(data), "train", batch, left_out=left_out, **options)  # type: ignore[arg-type]


def cells(batch: Batch) -> np.ndarray:
    return np.column_stack([batch.sparse.values().numpy(), batch.dense.numpy(), batch.label.numpy()])


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_all_rows_but_those(prepared: Path, data: Path, shuffle: bool) -> None:
    ids, dense, label = read_rows(prepared, Schema.load(prepared), "train")
    whole = np.column_stack([ids.numpy().T, dense.numpy(), label.numpy()])
    rest = np.delete(whole, slice(256 + 2 * 64, 256 + 3 * 64), axis=0)
    spoil(data / "train" / DAMAGED[0], DAMAGED[1])
    stream = open_stream(data, found(data)[0], batch=92, shuffle=shuffle)  # 8 * 92 = 736 rows: no tail
    assert (stream.rows, stream.rows_left_out, stream.batches_per_epoch) == (736, 64, 8)
    seen = np.concatenate([cells(b) for b in stream.epoch(1)])
    if shuffle:
        assert not np.array_equal(seen, rest)
        seen, rest = seen[np.lexsort(seen.T)], rest[np.lexsort(rest.T)]
    assert np.array_equal(seen, rest)


def test_the_order_without_them_is_the_same_for_any_number_of_ranks(data: Path) -> None:
    spoil(data / "train" / DAMAGED[0], DAMAGED[1])
    entries = found(data)[0]
    alone = [cells(b) for b in open_stream(data, entries).epoch(2)]
    ranks = [[cells(b) for b in open_stream(data, entries, rank=r, world_size=3).epoch(2)] for r in range(3)]
    assert len(alone) == 7
    for k, batch in enumerate(alone):
        assert np.array_equal(np.concatenate([rank[k] for rank in ranks]), batch)
    # An epoch that has become shorter than the position of a checkpoint is over.
    assert list(open_stream(data, entries).epoch(2, start_batch=8)) == []


def test_missing_rows_that_nobody_left_out_are_still_an_error(data: Path) -> None:
    spoil(data / "train" / DAMAGED[0], DAMAGED[1])
    entries = found(data)[0]
    (data / "train" / "part-00003.parquet").unlink()
    with pytest.raises(UserError, match="768 rows in the shards, 800 in schema.json"):
        open_stream(data, entries)


def test_lists_are_merged_by_row_group_and_a_whole_file_takes_its_groups_in() -> None:
    a, b = LeftOut("a", 1, 64, 1, "saved"), LeftOut("b", 0, 64, 1, "x")
    again, all_of_b = LeftOut("a", 1, 64, 1, "found"), LeftOut("b", None, 256, 4, "y")
    assert unreadable.merge([a], [again, b]) == [a, b]
    assert unreadable.merge([b, a], [all_of_b]) == [a, all_of_b]
    assert unreadable.total([a, all_of_b]) == 5


def run_in(data: Path, directory: Path, limit: int) -> Run:
    overrides = [f"data.path={data}", f"run.dir={directory}", f"data.skip_unreadable={limit}"]
    return Run(load_config(CONFIGS, None, overrides, method="adass"), Schema.load(data), one_rank())


def test_a_run_leaves_out_up_to_n_and_says_which(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(data / "train" / DAMAGED[0], DAMAGED[1])
    stream = run_in(data, tmp_path / "run", 1).stream("train", 96, shuffle=True)
    assert stream.rows == 736
    told = capsys.readouterr().out
    assert "train split: left out because it cannot be read: 1 row group, 64 of 800 rows" in told
    assert "train/part-00001.parquet, row group 2: cannot be read (" in told and "NOTE" not in told
    assert [e["group"] for e in read_json(tmp_path / "run" / RECORD)["splits"]["train"]] == [2]
    # By default a file that is not that of the manifest is refused at once, and its row group named.
    with pytest.raises(UserError, match=r"part-00001.parquet, row group 2: cannot be read"):
        run_in(data, tmp_path / "other", 0).stream("train", 96, shuffle=True)


def test_more_than_n_in_all_splits_together_is_an_error(data: Path, tmp_path: Path) -> None:
    spoil(data / "train" / DAMAGED[0], DAMAGED[1])
    spoil(data / "train" / "part-00000.parquet", 0)
    with pytest.raises(
        UserError, match=r"2 row groups cannot be read, data.skip_unreadable allows 1: train/part-00000"
    ):
        run_in(data, tmp_path / "run", 1).stream("train", 96, shuffle=True)
    assert not (tmp_path / "run").exists()
    spoil(data / "validation" / "part-00000.parquet", 1)
    run = run_in(data, tmp_path / "run", 2)
    run.stream("train", 96, shuffle=True)
    with pytest.raises(UserError, match=r"1 row group and 2 of other splits cannot be read, .* allows 2: validation"):
        run.stream("validation", 96, shuffle=False)
    assert run_in(data, tmp_path / "run", 3).stream("validation", 96, shuffle=False).rows == 64


def test_a_number_below_zero_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config key data.skip_unreadable: must be >= 0, got -1"):
        run_in(data, tmp_path / "run", -1)


def test_all_of_them_is_an_error(data: Path, tmp_path: Path) -> None:
    for path in (data / "test").iterdir():
        for group in range(pq.read_metadata(path).num_row_groups):
            spoil(path, group)
    with pytest.raises(UserError, match="no row group can be read"):
        run_in(data, tmp_path / "run", 9).stream("test", 96, shuffle=False)


def test_a_run_that_goes_on_keeps_its_list_and_says_when_it_grows(
    data: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "train" / DAMAGED[0]
    spoil(path, DAMAGED[1])
    first = list(run_in(data, tmp_path / "run", 2).stream("train", 96, shuffle=True).epoch(0))
    (tmp_path / "run" / "checkpoints" / "fit" / "step-3").mkdir(parents=True)
    shutil.copy(prepared / "train" / DAMAGED[0], path)
    capsys.readouterr()
    again = list(run_in(data, tmp_path / "run", 2).stream("train", 96, shuffle=True).epoch(0))
    assert all(np.array_equal(cells(a), cells(b)) for a, b in zip(first, again, strict=True))
    told = capsys.readouterr().out
    assert "it can be read again, but stays left out" in told and "NOTE" not in told
    spoil(data / "train" / "part-00002.parquet", 1)
    stream = run_in(data, tmp_path / "run", 2).stream("train", 96, shuffle=True)
    assert stream.rows == 672
    assert "NOTE: this run has trained before with another list" in capsys.readouterr().out
    # Not allowed any longer: stop rather than take another order silently.
    with pytest.raises(
        UserError, match=r"2 row groups cannot be read, data.skip_unreadable allows 0: .*unreadable.json"
    ):
        run_in(data, tmp_path / "run", 0).stream("train", 96, shuffle=True)


def test_training_goes_on_when_more_has_broken(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fit(steps: int) -> Progress:
        run = open_run(small_config(data, tmp_path / "run", *sizes, f"train.steps={steps}"), one_rank())
        training = run.stream("train", 92, shuffle=True)
        task = SubnetTask(run.config, Allocation.uniform(run.schema, 4), run.context)
        with Monitor(run.dir, "fit", quiet=True) as monitor:
            root = run.dir / "checkpoints" / "fit"
            trainer = Trainer(task, run.config.train, run.config.optim, training, None, run.context, monitor, root)
            return trainer.fit()

    sizes = ["train.batch_size=92", "train.epochs=3", "train.patience=0", "data.skip_unreadable=9"]
    spoil(data / "train" / DAMAGED[0], DAMAGED[1])
    fit(7)  # of 8 batches
    assert "NOTE" not in capsys.readouterr().out
    (data / "train" / "part-00000.parquet").unlink()
    progress = fit(20)  # an epoch of 480 rows has 5 batches, so this one is over
    assert "NOTE: this run has trained before with another list" in capsys.readouterr().out
    assert progress.step == 15 and progress.epoch == 3


def test_a_list_of_other_data_counts_for_nothing_but_stops_training(data: Path, tmp_path: Path) -> None:
    spoil(data / "train" / DAMAGED[0], DAMAGED[1])
    run_in(data, tmp_path / "run", 1).stream("train", 96, shuffle=True)
    before = (tmp_path / "run" / RECORD).read_bytes()
    body = read_json(data / "schema.json")
    write_sealed(data / "schema.json", body | {"dataset": "later"})
    with pytest.raises(UserError, match="was written for other data"):
        run_in(data, tmp_path / "run", 1).stream("train", 96, shuffle=True)
    assert run_in(data, tmp_path / "run", 0).stream("test", 96, shuffle=False).rows == 100
    assert run_in(data, tmp_path / "run", 1).stream("test", 96, shuffle=False).rows == 100
    assert (tmp_path / "run" / RECORD).read_bytes() == before


def test_a_list_that_is_not_one_is_named(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "run" / RECORD, {"splits": {"train": [{"file": "x"}]}})
    with pytest.raises(UserError, match=r"unreadable.json: not as it was written"):
        run_in(data, tmp_path / "run", 1).stream("train", 96, shuffle=True)
