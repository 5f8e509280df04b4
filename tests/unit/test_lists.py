"""List fields from the raw cell to the batch, against a reader in plain Python."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.formats import blocks
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream, open_split, read_rows
from embsearch_dist.data.prepare import encode, staging, vocabulary
from embsearch_dist.data.prepare.pipeline import prepare, summary
from embsearch_dist.data.prepare.scratch import save_record
from embsearch_dist.data.prepare.splits import random_split
from embsearch_dist.data.prepare.vocabulary import load_values
from embsearch_dist.data.store.bags import Bags, offsets_of
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS, Schema
from tests.raw_clicks import digest
from tests.raw_lists import Row, make_lists

LISTS = ("tags", "likes", "big")


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    folder = tmp_path_factory.mktemp("lists")
    source, rows = make_lists(folder)
    prepare("table", source, folder / "out", row_group_rows=64, rows_per_shard=256, min_count=2, quiet=True)
    prepare("table", source, folder / "unique", row_group_rows=64, rows_per_shard=256, quiet=True)
    return folder, rows


def books(directory: Path) -> dict[str, dict[str, int]]:
    names = Schema.load(directory).names
    return {n: {v: i for v, i, _ in load_values(directory, n).rows()} for n in names}


def per_sample(batch: Batch, schema: Schema) -> dict[str, list[list[int]]]:
    """Field -> the ids of each sample."""
    found = {}
    for name in schema.names:
        jagged = batch.sparse[name]
        ends = jagged.offsets().tolist()
        ids = jagged.values().tolist()
        found[name] = [ids[a:b] for a, b in zip(ends, ends[1:])]
    return found


def test_every_value_of_a_training_row_counts_and_rare_ones_share_id_0(clicks: tuple[Path, list[Row]]) -> None:
    folder, rows = clicks
    schema, split = Schema.load(folder / "out"), random_split(np.arange(len(rows)), 0)
    train = [r for r, s in zip(rows, split, strict=True) if s == 0]
    for name in LISTS:
        counts = Counter(v for r in train for v in r.lists[name])
        kept = sorted((v for v, n in counts.items() if n >= 2), key=lambda v: (-counts[v], v))
        assert load_values(folder / "out", name).rows() == [(v, i + 1, counts[v]) for i, v in enumerate(kept)]
        of = next(f for f in schema.fields if f.name == name)
        total = sum(counts.values())
        assert of.cardinality == len(kept) + 1 and of.mean_length == pytest.approx(total / len(train), abs=1e-4)
        seen = schema.provenance["fields"][name]  # type: ignore[index,call-overload]
        empty = sum(not r.lists[name] for r in train)
        rare = total - sum(counts[v] for v in kept)
        assert seen["missing_share"] == round(empty / len(train), 6)
        assert seen["rare_share"] == round(rare / (total + empty), 6)
    assert rare > 0, "the example must have rare values"
    for k, split_name in enumerate(SPLITS):
        shards = open_split(folder / "out", split_name)
        found = shards.read(shards.groups)
        mine = [r for r, s in zip(rows, split, strict=True) if s == k]
        for bags, name in zip(found.bags, LISTS, strict=True):
            book = books(folder / "out")[name]
            assert bags.lengths.tolist() == [len(r.lists[name]) for r in mine]
            assert bags.ids.tolist() == [book.get(v, 0) for r in mine for v in r.lists[name]]
        weights = found.bags[1].weights
        assert weights is not None and found.bags[0].weights is None
        assert np.array_equal(weights, np.array([w for r in mine for _, w in r.likes], np.float32))
        part = shards.read(shards.groups, limit=70)
        assert len(part) == 70 and part.bags[2].ids.tolist() == found.bags[2].take(slice(0, 70)).ids.tolist()


def test_the_schema_and_the_shards_say_what_is_a_list(clicks: tuple[Path, list[Row]]) -> None:
    folder, rows = clicks
    schema = Schema.load(folder / "out")
    assert [(f.name, f.pooling, f.weighted) for f in schema.fields] == [
        *(("user", "", False), ("tags", "mean", False), ("likes", "sum", True), ("big", "sum", False))
    ]
    arrow = pq.read_schema(folder / "out" / "train" / "part-00000.parquet")
    ids, weights = pa.list_(pa.int32()), pa.list_(pa.float32())
    assert [(f.name, f.type) for f in arrow] == [
        *(("label", pa.float32()), ("user", pa.int32()), ("tags", ids)),
        *(("likes", ids), ("likes weights", weights), ("big", ids), ("x", pa.float32())),
    ]
    raw = (folder / "clicks.csv").read_text().splitlines()[1:]
    longer = sum(sum(bool(t) for t in line.split(",")[2].split("|")) > 4 for line in raw)
    assert schema.provenance["fields"]["tags"]["shortened_rows"] == longer > 0  # type: ignore[index,call-overload]
    assert f"mean, {longer:,} rows cut to 4" in summary(schema)


@pytest.mark.parametrize("block", [777, 5000])
def test_blocks_passes_and_row_groups_change_no_bytes(
    clicks: tuple[Path, list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    folder, _ = clicks
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(vocabulary, "PASS_VALUES", 50)
    out = tmp_path / "out"
    prepare("table", folder / "source.yaml", out, row_group_rows=64, rows_per_shard=256, min_count=2, quiet=True)
    # The mean of a dense column depends on the blocks in its last digits; the lists on nothing.
    found, wanted = ({k: v for k, v in digest(d).items() if k != "schema.json"} for d in (out, folder / "out"))
    assert found == wanted and Schema.load(out).fields == Schema.load(folder / "out").fields


def test_single_values_declared_a_list_give_the_same_ids(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("y,v\n" + "".join(f"{i % 2},v{i * i % 17}\n" for i in range(300)))
    found = []
    for kind in ("categorical", "list"):
        (tmp_path / "s.yaml").write_text(f"files: c.csv\nlabel: y\nfields: {{v: {kind}}}\n")
        if kind == "list":
            (tmp_path / "s.yaml").write_text("files: c.csv\nlabel: y\nfields: {v: {kind: list}}\n")
        prepare("table", tmp_path / "s.yaml", tmp_path / kind, quiet=True)
        shards = open_split(tmp_path / kind, "train")
        batch = next(BatchStream(tmp_path / kind, shards.schema, "train", 64).epoch(0))
        found.append((load_values(tmp_path / kind, "v").rows(), batch))
    (one, single), (two, listed) = found
    assert one == two
    for part in ("values", "lengths", "offsets", "length_per_key", "offset_per_key", "stride"):
        a, b = (getattr(batch.sparse, part)() for batch in (single, listed))
        assert np.array_equal(a, b) and type(a) is type(b), part
    assert listed.sparse.weights_or_none() is None


@pytest.mark.parametrize(("shuffle", "world"), [(True, 1), (True, 3), (False, 2)])
def test_batches_hold_each_row_with_its_own_lists_on_any_number_of_ranks(
    clicks: tuple[Path, list[Row]], shuffle: bool, world: int
) -> None:
    folder, rows = clicks
    directory = folder / "unique"
    schema, book = Schema.load(directory), books(directory)
    of_user = {book["user"][r.user]: r for r in rows if r.user in book["user"]}
    options = {"shuffle": shuffle, "window_rows": 200, "world_size": world}
    ranks = [list(BatchStream(directory, schema, "train", 97, rank=r, **options).epoch(1)) for r in range(world)]  # type: ignore[arg-type]
    alone = list(BatchStream(directory, schema, "train", 97, shuffle=shuffle, window_rows=200).epoch(1))
    users = []
    for batch in (b for rank in ranks for b in rank):
        found = per_sample(batch, schema)
        weights = batch.sparse["likes"].weights().tolist()
        for k, (user,) in enumerate(found["user"]):
            row = of_user[user]
            users.append(user)
            for name in LISTS:
                assert found[name][k] == [book[name][v] for v in row.lists[name]]
            mine, weights = weights[: len(row.likes)], weights[len(row.likes) :]
            assert mine == [np.float32(w) for _, w in row.likes]
            assert batch.label[k] == row.click
        assert batch.sparse["tags"].weights().eq(1).all() and not weights
    assert len(users) == len(set(users)) > 600
    assert sorted(users) == sorted(u for b in alone for u in b.sparse["user"].values().tolist())


def test_a_batch_of_lists_has_all_that_torchrec_would_compute(clicks: tuple[Path, list[Row]]) -> None:
    folder, _ = clicks
    batch = next(BatchStream(folder / "out", Schema.load(folder / "out"), "train", 96).epoch(0))
    sparse = batch.sparse
    given = [sparse.length_per_key_or_none(), sparse.offset_per_key_or_none(), sparse._offsets, sparse._lengths]
    assert all(x is not None for x in given)
    plain = type(sparse)(sparse.keys(), sparse.values(), sparse.weights(), lengths=sparse.lengths())
    assert given[0] == plain.length_per_key() and given[1] == plain.offset_per_key()
    assert sparse.offsets().equal(plain.offsets()) and sparse.stride() == 96
    for tensor in (sparse.values(), sparse.lengths(), sparse.offsets()):
        assert tensor.dtype.itemsize == 4 and tensor.is_contiguous()


@pytest.mark.parametrize("start", [1, 5])
def test_resuming_in_the_middle_gives_the_rest(clicks: tuple[Path, list[Row]], start: int) -> None:
    folder, _ = clicks
    stream = BatchStream(folder / "out", Schema.load(folder / "out"), "train", 96, window_rows=200)
    whole, rest = list(stream.epoch(2)), list(stream.epoch(2, start))
    assert len(rest) == len(whole) - start > 0
    for a, b in zip(whole[start:], rest, strict=True):
        assert a.sparse.values().equal(b.sparse.values()) and a.sparse.offsets().equal(b.sparse.offsets())
        assert a.sparse.weights().equal(b.sparse.weights()) and a.label.equal(b.label)


def test_taking_and_joining_bags_is_what_lists_of_lists_do() -> None:
    rng = np.random.default_rng(1)
    lists = [rng.integers(0, 99, n).tolist() for n in rng.integers(0, 4, 50)]
    ids = np.array([x for one in lists for x in one], np.int32)
    bags = Bags(ids, offsets_of(np.array([len(x) for x in lists])), ids.astype(np.float32) / 2)

    def told(b: Bags) -> list[list[int]]:
        assert b.weights is not None and np.array_equal(b.weights, b.ids.astype(np.float32) / 2)
        return [b.ids[i:j].tolist() for i, j in zip(b.offsets, b.offsets[1:])]

    order = rng.permutation(50)[:30]
    assert told(bags.take(order)) == [lists[i] for i in order]
    assert told(bags.take(slice(7, 30))) == lists[7:30]
    assert told(bags.take(slice(9, 9))) == [] == told(bags.take(order[:0]))
    assert told(Bags.join([bags.take(slice(0, 9)), bags.take(slice(9, 9)), bags.take(order)])) == [
        *lists[:9],
        *(lists[i] for i in order),
    ]


def test_read_rows_refuses_lists_and_names_one(clicks: tuple[Path, list[Row]]) -> None:
    folder, _ = clicks
    with pytest.raises(UserError, match="'tags' has no single id a row"):
        read_rows(folder / "out", Schema.load(folder / "out"), "train")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tags", [1, 99], r"row group 1: field 'tags' has 1 ids outside 0..12, the first is 99"),
        ("tags", [-1], r"row group 1: field 'tags' has 1 ids outside 0..12, the first is -1"),
        ("tags", [None], r"row group 1: column 'tags' has 1 nulls"),
        ("tags", None, r"row group 1: column 'tags' has 1 nulls"),
        ("likes weights", float("nan"), r"row group 1: column 'likes weights' has not one finite weight"),
        ("likes weights", [1.0] * 9, r"row group 1: column 'likes weights' has not one finite weight"),
    ],
)
def test_bad_lists_in_a_shard_are_named(
    clicks: tuple[Path, list[Row]], tmp_path: Path, column: str, value: object, message: str
) -> None:
    import shutil

    shutil.copytree(clicks[0] / "out", tmp_path / "out")
    path = tmp_path / "out" / "train" / "part-00001.parquet"
    frame = pl.read_parquet(path)
    values = frame[column].to_list()
    row = next(i for i in range(70, 128) if values[i])  # of the second row group, and not empty
    values[row] = [value] * len(values[row]) if isinstance(value, float) else value
    changed = frame.with_columns(pl.Series(column, values, dtype=frame[column].dtype))
    types = pa.schema([f.with_nullable(True) for f in pq.read_schema(path)])
    pq.write_table(changed.to_arrow().cast(types), path, row_group_size=64)
    with pytest.raises(UserError, match=message):
        list(BatchStream(tmp_path / "out", Schema.load(tmp_path / "out"), "train", 96).epoch(0))


def test_parquet_lists_and_their_weights_give_what_the_text_gives(tmp_path: Path) -> None:
    source, rows = make_lists(tmp_path / "text", rows=300)
    prepare("table", source, tmp_path / "one", quiet=True)
    frame = pl.DataFrame(
        {
            "click": [r.click for r in rows],
            "user": [r.user for r in rows],
            "tags": [r.tags for r in rows],
            "likes": [[v for v, _ in r.likes] for r in rows],
            "how": [[w for _, w in r.likes] for r in rows],
            "big": [r.big for r in rows],
        },
        schema_overrides={"tags": pl.List(pl.String), "likes": pl.List(pl.String), "how": pl.List(pl.Float64)},
    )
    frame.write_parquet(tmp_path / "c.parquet")
    fields = (
        "user: categorical, tags: {kind: list, pooling: mean}, likes: {kind: list, weights: how}, big: {kind: list}"
    )
    (tmp_path / "s.yaml").write_text(f"files: c.parquet\nlabel: click\nfields: {{{fields}}}\n")
    prepare("table", tmp_path / "s.yaml", tmp_path / "two", quiet=True)
    found = [open_split(tmp_path / d, "train") for d in ("one", "two")]
    one, two = (shards.read(shards.groups) for shards in found)
    assert np.array_equal(one.ids, two.ids)
    for a, b in zip(one.bags, two.bags, strict=True):
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.offsets, b.offsets)
    assert one.bags[1].weights is not None and np.array_equal(one.bags[1].weights, two.bags[1].weights)
    assert found[0].schema.fields == found[1].schema.fields


def test_a_bad_cell_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    source, _ = make_lists(tmp_path, rows=50)
    lines = (tmp_path / "clicks.csv").read_text().splitlines()
    lines[20] = "1,u,a,b:1|c,b1,0"
    (tmp_path / "clicks.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"clicks.csv, line 21, column 'likes': .*there is none. Write one"):
        prepare("table", source, tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_prepare_of_lists_goes_on_to_the_same_bytes(
    clicks: tuple[Path, list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = clicks
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    options: dict = {"row_group_rows": 64, "rows_per_shard": 256, "min_count": 2, "quiet": True}
    prepare("table", folder / "source.yaml", tmp_path / "whole", **options)
    left = 0

    def save(path: Path, body: dict) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        save_record(path, body)

    for module in (encode, staging, vocabulary):
        monkeypatch.setattr(module, "save_record", save)
    for stop in (2, 5, 9):  # in staging, counting and encoding
        out, left = tmp_path / f"out{stop}", stop
        with pytest.raises(KeyboardInterrupt):
            prepare("table", folder / "source.yaml", out, **options)
        prepare("table", folder / "source.yaml", out, **options)
        assert digest(out) == digest(tmp_path / "whole")


def test_movielens_genres_as_a_list(data_dir: Path, tmp_path: Path) -> None:
    ratings = data_dir / "movielens-1m" / "ratings_first_50440.dat"
    one = prepare("movielens_1m", ratings, tmp_path / "one", quiet=True)
    several = prepare("movielens_1m", ratings, tmp_path / "list", genres="list", quiet=True)
    assert [f for f in one.fields if f.name != "genres"] == [f for f in several.fields if f.name != "genres"]
    assert several.fields[7].pooling == "mean" and several.fields[7].cardinality == 19
    assert one.fields[7].pooling == "" and one.fields[7].cardinality > 200
    book = {i: v for v, i, _ in load_values(tmp_path / "list", "genres").rows()}
    movie = {i: v for v, i, _ in load_values(tmp_path / "list", "movie_id").rows()}
    lines = (data_dir / "movielens-1m" / "movies.dat").read_text(encoding="latin-1").splitlines()
    genres = {line.split("::")[0]: line.split("::")[2].split("|") for line in lines}
    shards = open_split(tmp_path / "list", "test")
    rows, (bags,) = shards.read(shards.groups), shards.read(shards.groups).bags
    names = [n for n in several.names if n != "genres"]
    found = rows.ids[names.index("movie_id")]
    known = [k for k, i in enumerate(found) if i]
    assert len(known) > 4000
    for k in known:
        assert [book[i] for i in bags.take(slice(k, k + 1)).ids] == genres[movie[found[k]]]


def test_genres_are_a_list_only_on_demand_and_only_of_movielens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--genres list is for movielens_1m and movielens_100k, not for criteo"):
        prepare("criteo", tmp_path, tmp_path / "out", genres="list")
    with pytest.raises(UserError, match="--genres 'many' is none of one, list"):
        prepare("movielens_1m", tmp_path, tmp_path / "out", genres="many")
