"""The groups of a prepared data set: together they are its rows, each reads like any data set, none is half there."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.prepare import partition
from embsearch_dist.data.prepare.partition import is_written, write_group
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.store.manifest import shards_of, verify
from embsearch_dist.data.store.shards import LeftOut, Shards
from embsearch_dist.data.store.unreadable import find, names_of
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.schema import SPLITS, Schema
from tests.raw_clicks import digest, make_raw
from tests.raw_lists import make_lists

GROUPS = 3
Assignment = dict[str, np.ndarray]
USER, WEIGHTS = 1, 5  # of a row of "lists", as row_list gives it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``lists``: list, weighted and dense columns, training files of 256, 256, 256 and some rows; ``plain``: none."""
    folder = tmp_path_factory.mktemp("partition")
    (folder / "raw").mkdir()
    source, _ = make_lists(folder / "raw")
    prepare("table", source, folder / "lists", row_group_rows=64, rows_per_shard=256, min_count=2, quiet=True)
    prepare("table", make_raw(folder / "raw"), folder / "plain", row_group_rows=100, rows_per_shard=300, quiet=True)
    return folder


@pytest.fixture
def source(folder: Path) -> Path:
    return folder / "lists"


def random_groups(schema: Schema, seed: int = 0) -> Assignment:
    """A group for every row; most are of group 1, so that it fills several files."""
    rng = np.random.default_rng(seed)
    return {split: rng.choice(GROUPS, n, p=[0.2, 0.7, 0.1]) for split, n in schema.rows.items()}


def row_list(directory: Path, split: str) -> list[tuple]:
    """Everything of every row, in stored order; nothing when the split has no shards."""
    if not (directory / split).exists():
        return []
    shards = Shards(directory, Schema.load(directory), split)
    rows = shards.read(shards.groups)
    columns: list[list] = [rows.label.tolist(), *rows.ids.tolist(), *rows.dense.T.tolist()]
    for bags in rows.bags:
        ends = list(zip(bags.offsets, bags.offsets[1:]))
        columns += [[tuple(x[a:b].tolist()) for a, b in ends] for x in (bags.ids, bags.weights) if x is not None]
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("name", ["lists", "plain"])
def test_the_groups_together_are_the_source_in_its_order(folder: Path, tmp_path: Path, name: str) -> None:
    source, schema = folder / name, Schema.load(folder / name)
    assignment = random_groups(schema)
    for group in range(GROUPS):
        out = tmp_path / str(group)
        made = write_group(source, schema, assignment, group, out)
        assert made == Schema.load(out)
        assert made.fields == schema.fields and made.fingerprint == schema.fingerprint
        assert verify(out)[0] == len(list(out.glob("*/part-*.parquet")))
        for split in SPLITS:
            every = row_list(source, split)
            own = [row for row, g in zip(every, assignment[split], strict=True) if g == group]
            assert len(own) > 0 and row_list(out, split) == own
            assert made.rows[split] == len(own)
            mean = made.provenance["label_mean"][split]  # type: ignore[index,call-overload]
            assert mean == pytest.approx(np.mean([row[0] for row in own]), abs=1e-6)
    total = {s: sum(Schema.load(tmp_path / str(g)).rows[s] for g in range(GROUPS)) for s in SPLITS}
    assert total == schema.rows


def test_layout_and_column_types_are_those_of_the_source(source: Path, tmp_path: Path) -> None:
    schema = Schema.load(source)
    assignment = random_groups(schema)
    write_group(source, schema, assignment, 1, tmp_path / "out")
    files = sorted((tmp_path / "out" / "train").iterdir())
    footers = [pq.read_metadata(f) for f in files]
    rows = int((assignment["train"] == 1).sum())
    assert rows > 512 and [f.name for f in files] == [f"part-{k:05d}.parquet" for k in range(3)]
    assert [f.num_rows for f in footers] == [256, 256, rows - 512]
    sizes = [f.row_group(k).num_rows for f in footers for k in range(f.num_row_groups)]
    assert set(sizes[:-1]) == {64} and sum(sizes) == rows
    assert pq.read_schema(files[0]).equals(pq.read_schema(source / "train" / "part-00000.parquet"))
    assert shards_of(tmp_path / "out", "train")[1] == 64
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted([*SPLITS, "manifest.json", "schema.json"])


def test_provenance_names_the_source_and_the_group_and_the_manifest_no_folder(source: Path, tmp_path: Path) -> None:
    schema = Schema.load(source)
    made = write_group(source, schema, random_groups(schema), 2, tmp_path / "out")
    told = made.provenance["group"]
    assert told["of"] == str(source) and told["number"] == 2  # type: ignore[index,call-overload]
    assert made.provenance["fields"] == schema.provenance["fields"] and made.dataset == schema.dataset
    assert str(source) not in (tmp_path / "out" / "manifest.json").read_text()


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_made_of_it(source: Path, tmp_path: Path, shuffle: bool) -> None:
    schema = Schema.load(source)
    assignment = random_groups(schema)
    out = tmp_path / "out"
    write_group(source, schema, assignment, 0, out)
    stream = BatchStream(out, Schema.load(out), "train", 10, shuffle=shuffle, window_rows=100)
    assert stream.rows == (assignment["train"] == 0).sum() and stream.rows_left_out == 0
    batches = list(stream.epoch(0))
    user = np.concatenate([b.sparse["user"].values().numpy() for b in batches]).tolist()
    likes = np.concatenate([b.sparse["likes"].weights().numpy() for b in batches])
    rows = row_list(out, "train")
    if shuffle:  # drops the last batch that is not full
        assert len(user) == len(rows) // 10 * 10 and likes.sum() > 0
    else:
        assert user == [row[USER] for row in rows]
        assert likes.tolist() == [w for row in rows for w in row[WEIGHTS]]


def test_a_group_without_rows_has_no_shards_and_says_so(source: Path, tmp_path: Path) -> None:
    schema = Schema.load(source)
    assignment = random_groups(schema)
    assignment["validation"][:] = 0
    out = tmp_path / "out"
    made = write_group(source, schema, assignment, 1, out)
    assert made.rows["validation"] == 0 and made.rows["train"] > 0 and made.rows["test"] > 0
    assert not (out / "validation").exists() and "validation" not in made.provenance["label_mean"]  # type: ignore[operator]
    assert verify(out)[0] == 4 and is_written(source, schema, assignment, 1, out)
    BatchStream(out, made, "test", 4)
    with pytest.raises(UserError, match=r"validation: no part-\*.parquet there"):
        BatchStream(out, made, "validation", 4)
    nothing = write_group(source, schema, assignment, 7, tmp_path / "nothing")
    assert nothing.rows == dict.fromkeys(SPLITS, 0) == Schema.load(tmp_path / "nothing").rows
    assert verify(tmp_path / "nothing") == (0, 0) and is_written(source, schema, assignment, 7, tmp_path / "nothing")


def test_only_the_assigned_splits_are_written(source: Path, tmp_path: Path) -> None:
    schema = Schema.load(source)
    assignment = {"test": random_groups(schema)["test"]}
    made = write_group(source, schema, assignment, 1, tmp_path / "out")
    assert made.rows == {"test": int((assignment["test"] == 1).sum())}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "schema.json", "test"]
    assert verify(tmp_path / "out")[0] == 1


def test_same_bytes_whenever_it_is_written(source: Path, tmp_path: Path) -> None:
    schema = Schema.load(source)
    assignment = random_groups(schema)
    write_group(source, schema, assignment, 1, tmp_path / "a")
    narrow = {split: a.astype(np.uint8) for split, a in reversed(assignment.items())}
    write_group(source, schema, narrow, np.int64(1), tmp_path / "b")  # type: ignore[arg-type]
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    write_group(source, schema, assignment, 0, tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "b"), "another group replaces it"
    shutil.rmtree(tmp_path / "b")
    write_group(source, schema, assignment, 1, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_row_groups_are_read_one_by_one_and_those_without_rows_not_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = Schema.load(source)
    seen: list[tuple[str, int]] = []
    read = partition.read_groups

    def watched(schema: Schema, groups: list) -> object:
        (only,) = groups
        seen.append((f"{only.path.parent.name}/{only.path.name}", only.index))
        return read(schema, groups)

    monkeypatch.setattr(partition, "read_groups", watched)
    assignment = {split: np.zeros(n, int) for split, n in schema.rows.items()}
    assignment["train"][[70, 256]] = 1  # in the second row group of the first file and the first of the second
    ticks: list[int] = []
    made = write_group(source, schema, assignment, 1, tmp_path / "out", tick=ticks.append)
    assert seen == [("train/part-00000.parquet", 1), ("train/part-00001.parquet", 0)]
    assert made.rows == {"train": 2, "validation": 0, "test": 0}
    every = row_list(source, "train")
    assert row_list(tmp_path / "out", "train") == [every[70], every[256]]
    assert sum(ticks) == sum(schema.rows.values()) and max(ticks) == 64


def stop_after(n: int, error: BaseException) -> Callable[[int], None]:
    """A ``tick`` that ends the work at its n-th call."""
    count = itertools.count(1)

    def tick(rows: int) -> None:
        if next(count) == n:
            raise error

    return tick


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), UserError("bad")])
def test_an_interrupted_write_leaves_nothing_and_the_next_is_whole(
    source: Path, tmp_path: Path, error: BaseException
) -> None:
    schema = Schema.load(source)
    assignment = random_groups(schema)
    out = tmp_path / "out"

    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(kind, match="No space left" if isinstance(error, OSError) else None):
        write_group(source, schema, assignment, 1, out, tick=stop_after(13, error))
    assert list(tmp_path.iterdir()) == [] and not is_written(source, schema, assignment, 1, out)
    write_group(source, schema, assignment, 1, out)
    before = digest(out)
    with pytest.raises(kind):
        write_group(source, schema, assignment, 0, out, tick=stop_after(13, error))
    assert digest(out) == before, "what was there stays until the new one is whole"
    assert is_written(source, schema, assignment, 1, out) and not is_written(source, schema, assignment, 0, out)


KILLED = """
import os, signal, sys
import numpy as np
from embsearch_dist.data.prepare.partition import write_group
from embsearch_dist.schema import Schema
source, out = sys.argv[1:]
schema = Schema.load(source)
done = []
def tick(rows):
    done.append(rows)
    if len(done) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
write_group(source, schema, {"train": np.arange(schema.rows["train"]) % 2}, 1, out, tick=tick)
"""


def test_a_killed_write_looks_like_nothing_and_does_not_block_the_next(
    source: Path, tmp_path: Path, repo_root: Path
) -> None:
    schema, out = Schema.load(source), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, source, out], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert (tmp_path / "out.partial" / "train" / "part-00000.parquet").exists()
    assert not (tmp_path / "out.partial" / "schema.json").exists()
    assignment = {"train": np.arange(schema.rows["train"]) % 2}
    assert not is_written(source, schema, assignment, 1, out)
    write_group(source, schema, assignment, 1, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and verify(out)[0] == 2
    assert row_list(out, "train") == row_list(source, "train")[1::2]


def test_what_is_whole_is_not_written_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema, out = Schema.load(source), tmp_path / "out"
    assignment = random_groups(schema)
    assert not is_written(source, schema, assignment, 1, out)
    made = write_group(source, schema, assignment, 1, out)
    assert is_written(source, schema, assignment, 1, out)
    other = {split: a.copy() for split, a in assignment.items()}
    other["test"][5] = (other["test"][5] + 1) % GROUPS
    assert not is_written(source, schema, other, 1, out)
    assert not is_written(source, schema, {"train": assignment["train"]}, 1, out)
    assert not is_written(source, schema, assignment, 2, out)
    with monkeypatch.context() as patch:
        patch.setattr(partition, "read_groups", None)  # reading would fail
        assert write_group(source, schema, assignment, 1, out) == made
    shutil.copytree(source, tmp_path / "moved")
    assert is_written(tmp_path / "moved", schema, assignment, 1, out), "the same source at another place"


@pytest.mark.parametrize("file", ["train/part-00001.parquet", "manifest.json"])
def test_a_damaged_group_is_written_again(source: Path, tmp_path: Path, file: str) -> None:
    schema, out = Schema.load(source), tmp_path / "out"
    assignment = random_groups(schema)
    write_group(source, schema, assignment, 1, out)
    before = digest(out)
    (out / file).write_bytes((out / file).read_bytes()[:-20])
    assert not is_written(source, schema, assignment, 1, out)
    write_group(source, schema, assignment, 1, out)
    assert digest(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_changed_source_makes_another_group(folder: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    shutil.copytree(folder / "plain", first)
    schema = Schema.load(first)
    assignment = random_groups(schema)
    write_group(first, schema, assignment, 1, out)
    # As many rows of as many values, but others.
    prepare(
        "table", make_raw(tmp_path, seed=1), first, row_group_rows=100, rows_per_shard=300, quiet=True, overwrite=True
    )
    other = Schema.load(first)
    assert other.rows == schema.rows
    assert not is_written(first, other, assignment, 1, out)
    write_group(first, other, assignment, 1, out)
    assert is_written(first, other, assignment, 1, out)
    own = [row for row, g in zip(row_list(first, "test"), assignment["test"], strict=True) if g == 1]
    assert row_list(out, "test") == own
    # Without a manifest the sizes of the files tell.
    (first / "manifest.json").unlink()
    write_group(first, other, assignment, 1, out)
    assert is_written(first, other, assignment, 1, out) and verify(out)[0] > 0


def test_an_assignment_that_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    schema, out = Schema.load(source), tmp_path / "out"
    good, n = random_groups(schema), Schema.load(source).rows["validation"]
    cases: list[tuple[Assignment, str]] = [
        (good | {"validation": np.zeros(n + 1, int)}, f"split 'validation' of .* has {n} rows, .* has {n + 1} entries"),
        (good | {"validation": np.zeros((n, 1), int)}, f"split 'validation' of .* has {n} rows, .* has {n}x1 entries"),
        (good | {"test": np.zeros(0, int)}, "split 'test' of .* its assignment has 0 entries"),
        (good | {"train": good["train"].astype(float)}, "assignment of split 'train' has type float64. Give integers"),
        (good | {"valid": good["test"]}, "unknown split 'valid'"),
        ({}, "no split of .* is assigned"),
    ]
    for assignment, message in cases:
        for call in (write_group, is_written):
            with pytest.raises(UserError, match=message):
                call(source, schema, assignment, 1, out)
    assert list(tmp_path.iterdir()) == []


def test_only_a_group_is_replaced(folder: Path, source: Path, tmp_path: Path) -> None:
    schema, assignment = Schema.load(source), random_groups(Schema.load(source))
    shutil.copytree(folder / "plain", tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    before = digest(tmp_path)
    for name in ("data", "mine", "mine/thesis.tex"):
        with pytest.raises(UserError, match=f"{name} is in the way and no group of a data set"):
            write_group(source, schema, assignment, 1, tmp_path / name)
    for out in (source, folder):
        with pytest.raises(UserError, match="which is to be read. Write the group elsewhere"):
            write_group(source, schema, assignment, 1, out)
    assert digest(tmp_path) == before
    (tmp_path / "empty").mkdir()
    inside = tmp_path / "data" / "groups" / "1"  # beside the shards: the source stays as whole as it was
    write_group(source, schema, assignment, 1, tmp_path / "empty")
    write_group(
        tmp_path / "data", Schema.load(tmp_path / "data"), random_groups(Schema.load(folder / "plain")), 1, inside
    )
    assert verify(inside)[0] > 0 and verify(tmp_path / "data")[0] > 0


def test_row_groups_that_cannot_be_read_are_passed_over_when_told(source: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(source, broken)
    schema, every = Schema.load(source), row_list(source, "train")
    path = broken / "train" / "part-00001.parquet"
    footer = pq.read_metadata(path)
    column = footer.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    data[start + column.total_compressed_size - 3] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"part-00001.parquet, row group 1: cannot be read"):
        write_group(broken, schema, {"train": np.zeros(len(every), int)}, 0, out)
    left_out, _ = find(broken, schema, "train", names_of(broken, "train"))
    assert [(entry.name, entry.group) for entry in left_out] == [("part-00001.parquet", 1)]
    kept = [row for k, row in enumerate(every) if not 256 + 64 <= k < 256 + 128]
    groups = {"train": np.arange(len(kept)) % 2}
    with pytest.raises(UserError, match=rf"has {len(every)} rows, its assignment has {len(kept)} entries"):
        write_group(broken, schema, groups, 1, out)
    told: dict[str, list[LeftOut]] = {"train": left_out}
    made = write_group(broken, schema, groups, 1, out, told)
    assert row_list(out, "train") == kept[1::2] and made.rows == {"train": len(kept) // 2}
    assert is_written(broken, schema, groups, 1, out, told)
    assert read_json(out / "manifest.json")["rows"] == made.rows
