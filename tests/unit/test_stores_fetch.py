"""Fetching a prepared data set and raw files from a store: whole and right, or an error that names the object."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from embsearch_dist.data.store.manifest import MANIFEST, verify
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema
from embsearch_dist.stores import fetch
from embsearch_dist.stores.fetch import fetch_prepared
from embsearch_dist.stores.inputs import fetch_inputs
from embsearch_dist.stores.urls import Store, StoreError, join
from tests.factories import make_data
from tests.faulty_store import Faulty, faulty_store

URL = "s3://bucket/data"
SHARD = "bucket/data/train/part-00000.parquet"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("stores"), rows=600)


@pytest.fixture
def store(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """A store that holds the prepared data at :data:`URL`."""
    found = faulty_store(tmp_path, monkeypatch)
    shutil.copytree(prepared, tmp_path / "bucket" / "data")
    return found


def test_what_was_fetched_is_the_data_set_and_is_not_fetched_again(store: Faulty, prepared: Path) -> None:
    folder = fetch_prepared(URL)
    assert verify(folder) == verify(prepared)
    store.read.clear()
    assert fetch_prepared(URL) == folder
    assert list(store.read) == [f"bucket/data/{MANIFEST}"]


def test_a_cut_download_goes_on_where_it_was(store: Faulty, prepared: Path) -> None:
    size = (prepared / "train" / "part-00000.parquet").stat().st_size
    store.cut[SHARD] = size // 2
    verify(fetch_prepared(URL))
    assert store.read[SHARD] == size


def test_an_interrupted_fetch_keeps_what_has_come(store: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "AT_ONCE", 1)  # so that the files come in the order of the manifest
    store.on = lambda what, path: OSError("no route (injected)") if path == SHARD else None
    with pytest.raises(StoreError, match=r"s3://bucket/data/train/part-00000.parquet: no route .*tried 3 times"):
        fetch_prepared(URL)
    store.on, store.read = lambda what, path: None, {}
    verify(fetch_prepared(URL))
    assert SHARD in store.read and "bucket/data/test/part-00000.parquet" not in store.read


@pytest.mark.parametrize("how", ["wrong", "short", "missing"])
def test_a_file_that_is_not_the_one_of_the_manifest_is_refused(store: Faulty, tmp_path: Path, how: str) -> None:
    file = tmp_path / SHARD
    body = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "short":
        file.write_bytes(body[:-10])
    else:
        body[100] ^= 1
        file.write_bytes(body)
    says = {
        "wrong": "SHA-256 .*wrong bytes",
        "short": r"7,\d+ bytes there, not .*cut upload",
        "missing": "missing, manifest",
    }
    with pytest.raises(UserError, match=rf"{URL}/train/part-00000.parquet: {says[how]}.*Upload the data set again"):
        fetch_prepared(URL)
    assert not [p for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir() and p.suffix != ".partial"]


def test_another_data_set_under_the_same_url_is_fetched_anew(
    store: Faulty, prepared: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = fetch_prepared(URL)
    other = make_data(tmp_path_factory.mktemp("other"), rows=500)
    shutil.rmtree(tmp_path / "bucket" / "data")
    shutil.copytree(other, tmp_path / "bucket" / "data")
    second = fetch_prepared(URL)
    assert second != first and verify(second) == verify(other) and verify(first) == verify(prepared)


def test_a_damaged_file_of_the_cache_is_fetched_again_alone(store: Faulty, prepared: Path) -> None:
    folder = fetch_prepared(URL)
    file = folder / "test" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    store.read.clear()
    assert fetch_prepared(URL) == folder and verify(folder) == verify(prepared)
    assert [p for p in store.read if p.endswith(".parquet")] == ["bucket/data/test/part-00000.parquet"]


def test_a_place_without_a_manifest_and_one_with_a_cut_manifest_are_refused(store: Faulty, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/none: no manifest.json there"):
        fetch_prepared("s3://bucket/none")
    path = tmp_path / "bucket" / "data" / MANIFEST
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match="manifest.json: damaged or cut"):
        fetch_prepared(URL)


def test_the_schema_alone_may_be_fetched(store: Faulty, prepared: Path) -> None:
    folder = fetch.fetch_schema(URL)
    assert Schema.load(folder) == Schema.load(prepared) and list(store.read) == ["bucket/data/schema.json"]
    with pytest.raises(UserError, match="none/schema.json: missing"):
        fetch.fetch_schema("s3://bucket/none")


def test_a_manifest_cannot_name_files_elsewhere(store: Faulty, tmp_path: Path) -> None:
    from embsearch_dist.files import sealed

    path = tmp_path / "bucket" / "data" / MANIFEST
    body = json.loads(path.read_text())
    body["files"][0]["name"] = "../../outside"
    body["sha256"] = sealed(body)
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match="outside the data set"):
        fetch_prepared(URL)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://key:secret@bucket/x", "a key in a URL"),
        ("ftp://host/x", "ftp:// is none of s3://"),
        ("s3:///x", "names no bucket"),
        ("file://host/x", "names the host"),
    ],
)
def test_urls_that_cannot_be_used(url: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as told:
        Store(url)
    assert "secret" not in str(told.value)


def test_a_query_stays_behind_what_is_joined() -> None:
    assert join("s3://b/a/?region=x", "c", "d") == "s3://b/a/c/d?region=x"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_a_file_a_folder_and_a_pattern(store: Faulty, tmp_path: Path) -> None:
    write(tmp_path / "bucket" / "raw", day2_txt="2", day10_txt="10", other_csv="no")
    (folder,) = fetch_inputs("criteo", ["s3://bucket/raw"])
    assert sorted(p.name for p in folder.iterdir()) == ["day10.txt", "day2.txt", "other.csv"]
    assert [p.read_text() for p in fetch_inputs("criteo", ["s3://bucket/raw/day*.txt"])] == ["2", "10"]
    assert fetch_inputs("criteo", ["s3://bucket/raw/day2.txt", tmp_path])[1] == tmp_path
    with pytest.raises(UserError, match="there is nothing in the store"):
        fetch_inputs("criteo", ["s3://bucket/rw"])


def test_a_pattern_of_a_store_skips_marks_and_refuses_folders_as_one_of_files_does(
    store: Faulty, tmp_path: Path
) -> None:
    raw = tmp_path / "bucket" / "raw"
    for folder in ("day2", "day10", "_old", "day2/_temporary", "day2/sub"):
        write(raw / folder, a_txt=f"{folder}/a", b_txt=f"{folder}/b", _SUCCESS="")
    write(raw / "day3.txt", _mark="")
    found = fetch_inputs("criteo", ["s3://bucket/raw/*/*.txt"])
    assert [p.read_text() for p in found] == ["day2/a", "day2/b", "day10/a", "day10/b"]
    found = fetch_inputs("criteo", ["s3://bucket/raw/day2/**"])
    assert [p.read_text() for p in found] == ["day2/a", "day2/b", "day2/sub/a", "day2/sub/b"]
    write(raw, day1_txt="1")
    assert [p.read_text() for p in fetch_inputs("criteo", ["s3://bucket/raw/day*.txt"])] == ["1"]
    with pytest.raises(
        UserError, match=r"s3://bucket/raw/day10: this folder fits the pattern, its files do not. Add /\* to it"
    ):
        fetch_inputs("criteo", ["s3://bucket/raw/day*"])


def test_raw_files_are_fetched_again_when_they_change_and_not_otherwise(store: Faulty, tmp_path: Path) -> None:
    write(tmp_path / "bucket" / "raw", a_txt="one", b_txt="two")
    (folder,) = fetch_inputs("criteo", ["s3://bucket/raw"])
    times = [(folder / n).stat().st_mtime_ns for n in ("a.txt", "b.txt")]
    assert times == [(tmp_path / "bucket" / "raw" / n).stat().st_mtime_ns for n in ("a.txt", "b.txt")]
    store.read.clear()
    write(tmp_path / "bucket" / "raw", b_txt="new")
    os.utime(tmp_path / "bucket" / "raw" / "b.txt", ns=(1, 1))
    fetch_inputs("criteo", ["s3://bucket/raw"])
    assert (folder / "b.txt").read_text() == "new" and list(store.read) == ["bucket/raw/b.txt"]
    (tmp_path / "bucket" / "raw" / "a.txt").unlink()
    fetch_inputs("criteo", ["s3://bucket/raw"])
    assert [p.name for p in folder.iterdir()] == ["b.txt"]


def test_a_listing_that_is_older_than_the_object_is_refused(store: Faulty, tmp_path: Path) -> None:
    write(tmp_path / "bucket" / "raw", a_txt="longer than before")
    store.old["bucket/raw/a.txt"] = 3
    with pytest.raises(UserError, match=r"raw/a.txt: 18 bytes there, not 3; .*the store's listing is old"):
        fetch_inputs("criteo", ["s3://bucket/raw"])


def test_a_source_file_may_name_urls_and_may_lie_at_one(store: Faulty, tmp_path: Path, prepared: Path) -> None:
    from embsearch_dist.data.prepare.pipeline import prepare

    shutil.copytree(prepared.parent, tmp_path / "bucket" / "source", ignore=shutil.ignore_patterns("out"))
    text = (prepared.parent / "clicks.yaml").read_text()
    (tmp_path / "clicks.yaml").write_text(text.replace("clicks.csv", "['s3://bucket/source/clicks.csv']"))
    for word in ("s3://bucket/source/clicks.yaml", tmp_path / "clicks.yaml"):
        out = tmp_path / Path(str(word)).parent.name
        prepare("table", fetch_inputs("table", [word]), out / "out", quiet=True, row_group_rows=500)
        assert (out / "out" / MANIFEST).read_bytes() == (prepared / MANIFEST).read_bytes()


def test_a_name_with_a_hash_is_not_cut_to_that_of_another_object(store: Faulty, tmp_path: Path) -> None:
    (tmp_path / "bucket" / "raw").mkdir()
    for name in ("a", "a#1.txt"):
        (tmp_path / "bucket" / "raw" / name).write_text(name)
    for url in ("s3://bucket/raw/a#1.txt", "file:///raw/a#1.txt"):
        with pytest.raises(UserError, match=r"a#1.txt: a # ends the path of a URL. Write %23 for it"):
            fetch_inputs("criteo", [url])
    assert [p.read_text() for p in fetch_inputs("criteo", ["s3://bucket/raw/a%231.txt"])] == ["a#1.txt"]
    (folder,) = fetch_inputs("criteo", ["s3://bucket/raw"])
    assert sorted(p.read_text() for p in folder.iterdir()) == ["a", "a#1.txt"]


def test_nothing_is_written_to_a_url(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from embsearch_dist.config.read import load_config
    from launch.prepare import main
    from tests.factories import CONFIGS

    assert main(["--format", "synthetic", "--out", "s3://bucket/data"]) == 2
    assert "--out s3://bucket/data: data are prepared on a disk" in capsys.readouterr().err
    for overrides, says in (
        (["run.dir=s3://bucket/run"], "a run directory lies on a disk; give a folder, and the URL to run.mirror"),
        (["run.mirror=runs/copy"], "run.mirror: must be a URL, got 'runs/copy'"),
        (["data.make=synthetic", "data.path=s3://bucket/data"], "makes data in a folder"),
    ):
        with pytest.raises(UserError, match=says):
            load_config(CONFIGS, None, overrides, method="adass")
