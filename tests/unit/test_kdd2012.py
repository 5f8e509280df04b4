"""KDD Cup 2012 track 2: the join against a plain reader, what is wrong with its files, and the made-up ones."""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch.distributed as dist

from embsearch_dist.data.formats import LABEL, blocks, kdd2012, open_source
from embsearch_dist.data.formats.kdd2012 import IDS, LARGEST_USER, NUMBERS
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.team import Team
from embsearch_dist.data.prepare.vocabulary import load_values
from embsearch_dist.data.store.shards import column_types
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.schema import SPLITS, Schema
from tests.kdd_files import line, make_kdd, plain_rows, write_kdd
from tests.raw_clicks import OPTIONS, digest
from tools.make.kdd import AGES, BASE_RATE, CHUNK_ROWS, GENDERS, NOBODY, PAIRS, RANKS, UNTOLD, KddLike, Pair, main, make

BLOCK = 3000  # bytes: 1000 rows come in some twenty chunks


def read_all(path: Path) -> pl.DataFrame:
    return pl.concat([c.frame for c in open_source("kdd2012", path).chunks()])


# ---- reading ----


def test_rows_are_joined_as_a_plain_reader_joins_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)
    expected = plain_rows(make_kdd(tmp_path))
    source = open_source("kdd2012", tmp_path)
    chunks = list(source.chunks())
    # All of both files but the last line end.
    assert len(chunks) > 15 and sum(c.consumed for c in chunks) == source.bytes - 1
    with ThreadPoolExecutor(4) as pool:  # the threads of prepare share one table of profiles
        frame = pl.concat(list(pool.map(lambda c: c.frame, chunks)))
    assert frame.columns == [LABEL, *IDS, "gender", "age", *NUMBERS]
    for name in (*IDS, "gender", "age"):
        assert frame[name].to_list() == [row[name] for row in expected], name
    assert frame[LABEL].to_list() == [row["label"] for row in expected]
    for name in NUMBERS:
        assert np.allclose(frame[name], [row[name] for row in expected], rtol=1e-15), name
    # Nobody, a user without a profile and a profile that does not tell are there, and are not the same.
    nobody, told = frame["user_id"].is_null(), frame["gender"].is_not_null()
    assert nobody.any() and (~nobody & ~told).any() and (frame["gender"] == "0").any()
    assert frame["age"].is_null().equals(frame["gender"].is_null())
    # The fixture has what the format has: several clicks in a row, hashes beyond 63 bits.
    assert "2" in {text.split("\t")[0] for text in (tmp_path / "training.txt").read_text().splitlines()}
    assert max(int(x) for x in frame["display_url"]) > 2**63


def test_users_of_any_size_are_looked_up(tmp_path: Path) -> None:
    users = (0, 1, 5, LARGEST_USER, LARGEST_USER + 1, 2**64 - 1, "")
    text = "".join(line(user_id=u) for u in users)
    profiles = f"5\t2\t6\n0\t1\t1\n{LARGEST_USER}\t0\t1\n"
    frame = read_all(write_kdd(tmp_path, text, profiles))
    assert frame["user_id"].to_list() == [None, *map(str, users[1:-1]), None]
    assert frame["gender"].to_list() == [None, None, "2", "0", None, None, None]
    assert frame["age"].to_list() == [None, None, "6", "1", None, None, None]


def test_counts_below_zero_count_as_zero(tmp_path: Path) -> None:
    frame = read_all(
        write_kdd(tmp_path, line(impression=-3, click=-1) + line(impression=0) + line(impression=7, click=5))
    )
    assert np.allclose(frame["impression"], [0, 0, np.log(8)]) and frame[LABEL].to_list() == [0, 0, 1]


def test_blank_ids_are_missing(tmp_path: Path) -> None:
    frame = read_all(write_kdd(tmp_path, line(**dict.fromkeys(IDS, "")) + line()))
    assert frame.select(pl.col(IDS).is_null().sum()).row(0) == (1,) * len(IDS)


def test_folder_file_and_gzip_give_the_same(tmp_path: Path) -> None:
    folder = make_kdd(tmp_path / "plain", rows=50)
    expected = read_all(folder)
    assert read_all(folder / "training.txt").equals(expected)
    (tmp_path / "zip").mkdir()
    for name in ("training.txt", "userid_profile.txt"):
        (tmp_path / "zip" / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    assert read_all(tmp_path / "zip").equals(expected)
    (folder / "training.txt").rename(folder / "part.txt")
    assert read_all(folder / "part.txt").equals(expected)
    assert [f.name for f in open_source("kdd2012", folder / "part.txt").files] == ["part.txt", "userid_profile.txt"]


def test_repeated_profiles_do_no_harm_and_contradictions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = "3\t1\t2\n7\t1\t3\n3\t1\t2\n"
    assert read_all(write_kdd(tmp_path, line(user_id=3), same))["age"].to_list() == ["2"]
    other = same + "4\t1\t1\n7\t1\t4\n"
    write_kdd(tmp_path, line(), other)
    with pytest.raises(UserError, match=r"userid_profile.txt, line 2: user_id 7 is there twice, with another gender"):
        read_all(tmp_path)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 12)  # two lines: now the second one is found, in a later block
    with pytest.raises(UserError, match=r"userid_profile.txt, line 5: user_id 7 is there twice"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["click", *NUMBERS])
@pytest.mark.parametrize("cell", ["1.5", "x", ""])
def test_a_number_that_is_none_is_named(tmp_path: Path, name: str, cell: str) -> None:
    write_kdd(tmp_path, line() * 3 + line(**{name: cell}) + line())
    shown = "blank" if cell == "" else repr(cell)
    with pytest.raises(UserError, match=rf"training.txt, line 4, column '{name}': not a whole number: {shown}. Write"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("cell", ["-1", "7.0", "a1b2", " 7", str(2**64)])
def test_an_id_that_is_none_is_named(tmp_path: Path, name: str, cell: str) -> None:
    write_kdd(tmp_path, line() + line(**{name: ""}) + line(**{name: cell}))
    with pytest.raises(
        UserError, match=rf"training.txt, line 3, column '{name}': not a whole number from 0 .*'{cell}'"
    ):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("rows", "profiles", "message"),
    [
        (line() + "0\t1\t2\n", "7\t1\t3\n", r"training.txt, line 2: 3 columns \(separator: tab\), expected 12"),
        (line() + "9\t" + line(), "7\t1\t3\n", r"training.txt, line 2: 13 columns .*expected 12"),
        (line() + "\n" + line(), "7\t1\t3\n", r"training.txt, line 2: the line is blank"),
        ("", "7\t1\t3\n", r"training.txt: the file has no rows"),
        (line(), "", r"userid_profile.txt: the file has no rows"),
        (line(), "7\t1\t3\n8\t1\n", r"userid_profile.txt, line 2: 2 columns .*expected 3"),
        (line(), "7\t1\t3\n8\tM\t1\n", r"userid_profile.txt, line 2, column 'gender': not a whole number: 'M'"),
        (line(), "7\t1\t3\n8\t1\t\n", r"userid_profile.txt, line 2, column 'age': not a whole number: blank"),
        (line(), "7\t1\t3\n8\t1\t25\n", r"userid_profile.txt, line 2, column 'age': 25 is not from 0 to 9"),
        (line(), "7\t-1\t3\n", r"userid_profile.txt, line 1, column 'gender': -1 is not from 0 to 9"),
        (line(), f"{LARGEST_USER + 1}\t1\t3\n", r"line 1, column 'user_id': 268435456 is not from 0 to 268,435,455"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(
    tmp_path: Path, rows: str, profiles: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_all(write_kdd(tmp_path, rows, profiles))


def test_missing_files_are_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such directory. Check --input"):
        open_source("kdd2012", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no training.txt or training.txt.gz in this directory. Unpack track 2"):
        open_source("kdd2012", tmp_path)
    (tmp_path / "training.txt").write_text(line())
    with pytest.raises(UserError, match=r"userid_profile.txt: no such file. training.txt needs it .*beside it"):
        open_source("kdd2012", tmp_path)
    with pytest.raises(UserError, match=r"format kdd2012 takes one --input, not 2"):
        open_source("kdd2012", [tmp_path, tmp_path])


def test_a_bad_profile_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, loads = kdd2012.read_blocks, []

    def read_and_note(path: Path, layout: blocks.Layout) -> Iterator[blocks.Block]:
        loads.append(path.name)
        return read(path, layout)

    monkeypatch.setattr(kdd2012, "read_blocks", read_and_note)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 40)
    write_kdd(tmp_path, line() * 4, "7\tM\t3\n")
    chunks = list(open_source("kdd2012", tmp_path).chunks())
    for chunk in chunks:
        with pytest.raises(UserError, match="column 'gender': not a whole number: 'M'"):
            _ = chunk.frame
    assert len(chunks) > 1 and loads == ["training.txt", "userid_profile.txt"]


# ---- preparing ----


def prepared_rows(directory: Path, schema: Schema, split: str) -> pl.DataFrame:
    frame = pl.concat([pl.read_parquet(f) for f in sorted((directory / split).glob("*.parquet"))])
    assert frame.columns == list(column_types(schema.fields, list(schema.dense)))
    return frame


def test_prepared_rows_are_the_rows_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)
    expected = plain_rows(make_kdd(tmp_path / "raw"))
    schema = prepare("kdd2012", tmp_path / "raw", tmp_path / "out", min_count=1, **OPTIONS)
    assert (schema.dataset, schema.names, schema.dense) == ("kdd2012", [*IDS, "gender", "age"], NUMBERS)
    assert (schema.fields[8].cardinality, schema.fields[9].cardinality) == (4, 7)
    found = pl.concat([prepared_rows(tmp_path / "out", schema, split) for split in SPLITS])
    train = found.head(schema.rows["train"])
    # Values by id, ids of rare ones aside (a value of other splits alone has id 0, as has a missing one).
    names = {f: [None, *load_values(tmp_path / "out", f)["value"]] for f in schema.names}
    back = {f: [names[f][i] for i in train[f]] for f in schema.names}
    told = {(*(row[f] for f in schema.names), row["label"]) for row in expected}
    assert {(*values, y) for *values, y in zip(*back.values(), train["label"])} <= told
    assert int(found["label"].sum()) == sum(row["label"] for row in expected)
    for name in NUMBERS:
        x = train[name].to_numpy()
        assert abs(x.mean()) < 1e-6 and abs(x.std() - 1) < 1e-6
        scale = schema.provenance["dense"][name]  # type: ignore[index]
        raw = sorted({round(float(v), 5) for v in found[name].to_numpy() * scale["std"] + scale["mean"]})
        assert np.allclose(raw, sorted({row[name] for row in expected}), atol=1e-4)


def test_two_processes_and_one_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are threads here, which meet in a store as processes do."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)
    make_kdd(tmp_path / "raw")
    store = dist.HashStore()

    def work(out: str, team: Team) -> Schema:
        return prepare("kdd2012", tmp_path / "raw", tmp_path / out, team=team, min_count=2, **OPTIONS)

    with ThreadPoolExecutor(2) as pool:
        left, right = pool.map(lambda rank: work("two", Team(rank, 2, store)), range(2))
    assert left == right == work("one", Team())
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


def test_defaults_and_the_split_there_is_not(tmp_path: Path) -> None:
    make_kdd(tmp_path / "raw", rows=200)
    schema = prepare("kdd2012", tmp_path / "raw", tmp_path / "out", quiet=True)
    assert schema.provenance["min_count"] == 10
    assert "label is click > 0" in schema.provenance["notes"]  # type: ignore[operator]
    names = [f["name"] for f in read_json(tmp_path / "out" / "manifest.json")["sources"]]
    assert names == ["training.txt", "userid_profile.txt"]
    with pytest.raises(UserError, match=r"training.txt has no time column; use --split random"):
        prepare("kdd2012", tmp_path / "raw", tmp_path / "late", split="time", quiet=True)


def test_other_profiles_are_other_work(tmp_path: Path) -> None:
    """What an earlier start left belongs to the profiles it was joined with."""
    make_kdd(tmp_path / "raw", rows=200)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(
            "embsearch_dist.data.prepare.pipeline.build_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare("kdd2012", tmp_path / "raw", tmp_path / "out", min_count=1, **OPTIONS)
    assert (tmp_path / "out.partial" / "stage" / "all.json").exists()
    profiles = tmp_path / "raw" / "userid_profile.txt"
    profiles.write_text(re.sub(r"\t\d\n", "\t9\n", profiles.read_text()))
    prepare("kdd2012", tmp_path / "raw", tmp_path / "out", min_count=1, **OPTIONS)
    assert load_values(tmp_path / "out", "age")["value"].to_list() == ["9"]


# ---- made-up files ----

USERS = 20_000


@functools.cache
def drawn(n: int = 150_000) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return KddLike(0, USERS).draw(np.arange(n, dtype=np.uint64))


def test_made_files_have_the_form_and_are_read_as_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = CHUNK_ROWS + 1000
    assert main(["--out", str(tmp_path), "--rows", str(rows), "--users", str(USERS)]) == 0
    assert re.search(rf"{rows:,} rows, 0.00 GB in .* rows/s", capsys.readouterr().out)
    lines = (tmp_path / "training.txt").read_text().splitlines(keepends=True)
    form = re.compile(r"\d+(\t\d+){11}\n")
    assert len(lines) == rows and [text for text in lines if not form.fullmatch(text)] == []
    profiles = (tmp_path / "userid_profile.txt").read_text().splitlines(keepends=True)
    assert [text for text in profiles if not re.fullmatch(r"[1-9]\d*\t[012]\t[1-6]\n", text)] == []
    truth = read_json(tmp_path / "truth.json")
    assert (truth["rows"], truth["users"], truth["profiles"]) == (rows, USERS, len(profiles))
    assert truth["rank"] == RANKS and truth["base_rate"] == sum(text[:2] != "0\t" for text in lines) / rows
    frame, (columns, _) = read_all(tmp_path), drawn()
    for name in IDS:
        expected = [str(x) if name != "user_id" or x else None for x in columns[name][:rows]]
        assert frame[name].to_list() == expected, name
    assert (frame[LABEL].to_numpy() == (columns["click"][:rows] > 0)).all()
    told, profile = KddLike(0, USERS).profiles(columns["user_id"][:rows].astype(np.uint64))
    for name in ("gender", "age"):
        expected = [str(x) if known else None for x, known in zip(profile[name], told)]
        assert frame[name].to_list() == expected, name


def test_a_row_depends_on_its_number_alone(tmp_path: Path) -> None:
    columns, p = drawn()
    some = np.array([3, 70_000, 1, 149_999], np.uint64)
    again, q = KddLike(0, USERS).draw(some)
    assert all((again[name] == columns[name][some]).all() for name in columns) and (q == p[some]).all()
    make(tmp_path / "a", 3000, users=50, quiet=True)
    make(tmp_path / "b", 3000, users=50, quiet=True)
    make(tmp_path / "c", 3000, users=50, seed=1, quiet=True)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert not set(digest(tmp_path / "a").values()) & set(digest(tmp_path / "c").values())


def test_shares_are_those_stated() -> None:
    columns, p = drawn()
    click, impression = columns["click"], columns["impression"]
    assert abs((click > 0).mean() - BASE_RATE) < 0.003 and abs(p.mean() - BASE_RATE) < 0.002
    assert (click <= impression).all() and (click > 1).any() and 1.1 < impression.mean() < 1.25
    assert (columns["position"] >= 1).all() and (columns["position"] <= columns["depth"]).all()
    user = columns["user_id"]
    assert abs((user == 0).mean() - NOBODY) < 0.005 and user.max() <= USERS
    told, profile = KddLike(0, USERS).profiles(np.arange(USERS + 1, dtype=np.uint64))
    assert not told[0] and abs(told[1:].mean() - (1 - UNTOLD)) < 0.005
    for found, shares in ((profile["gender"], GENDERS), (profile["age"] - 1, AGES)):
        assert np.allclose(np.bincount(found) / len(found), shares, atol=0.015)


def test_clicks_follow_the_stated_probability() -> None:
    columns, p = drawn()
    label = columns["click"] > 0
    order = np.argsort(np.argsort(p)) + 1.0
    n = label.sum()
    reached = (order[label].sum() - n * (n + 1) / 2) / (n * (len(order) - n))
    auc = KddLike(0, USERS).bayes_auc(len(p))
    assert auc > 0.7 and abs(reached - auc) < 0.01
    # And in every tenth of the rows by probability, within what chance allows.
    for part in np.array_split(np.argsort(p), 10):
        assert abs(label[part].sum() - p[part].sum()) < 5 * (p[part] * (1 - p[part])).sum() ** 0.5


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.left}-{p.right}")
def test_a_pair_has_the_stated_rank_and_profiles_count_where_there_are_some(pair: Pair) -> None:
    model = KddLike(0, USERS)
    told, profile = model.profiles(np.arange(USERS + 1, dtype=np.uint64))
    of_a_user = pair.left in profile
    if of_a_user:
        kinds = np.unique(profile[pair.left][told])
        left = np.array([np.flatnonzero(told & (profile[pair.left] == k))[0] for k in kinds])
    else:
        left = np.arange(60)
    right = np.arange(60)
    x, y = (grid.ravel().astype(np.uint64) for grid in np.meshgrid(left, right, indexing="ij"))
    index = {name: np.zeros(len(x), np.uint64) for name in IDS}
    index |= {"user_id" if of_a_user else pair.left: x, pair.right: y}
    one = np.ones(len(x), np.int64)

    def interaction(users: np.ndarray) -> np.ndarray:
        logit = model._logit(index | {"user_id": users}, {"depth": one, "position": one})
        table = logit.reshape(len(left), len(right))
        table = table - table.mean(0)
        return table - table.mean(1, keepdims=True)

    rank = np.linalg.matrix_rank(interaction(index["user_id"]), tol=1e-8)
    assert rank == min(pair.rank, len(left) - 1) and RANKS[pair.left] == RANKS[pair.right] == pair.rank
    if of_a_user:
        assert np.abs(interaction(np.zeros_like(x))).max() < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "--rows must be from 1 to"),
        ({"rows": 5, "users": 0}, "--users must be from 1 to 268,435,455, got 0"),
        ({"rows": 5, "users": 2**28}, "--users must be from 1 to 268,435,455"),
        ({"rows": 5, "seed": -1}, "--seed must be at least 0, got -1"),
        ({"rows": 10**12}, "take 72.* GB, .* are free. Give fewer --rows"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "userid_profile.txt").write_text("mine")
    assert main(["--out", str(tmp_path), "--rows", "10"]) == 2
    assert "userid_profile.txt exists. Give another --out" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["userid_profile.txt"]
