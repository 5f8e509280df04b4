"""The manifest of a prepared data set: what it holds, and that it finds any damage."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.store.manifest import MANIFEST, verify
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_sealed
from embsearch_dist.schema import Schema
from tests.raw_clicks import OPTIONS, make_raw


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    prepare("table", make_raw(folder), folder / "out", min_count=2, **OPTIONS)
    return folder / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_it_tells_rows_size_and_checksum_of_every_file(made: Path) -> None:
    body = read_json(made / MANIFEST)
    schema = Schema.load(made)
    assert body["fingerprint"] == schema.fingerprint and body["rows"] == schema.rows
    assert body["sources"] == [{"name": "clicks.csv", "bytes": (made.parent / "clicks.csv").stat().st_size}]
    told = {"split": "random", "seed": 0, "min_count": 2, "rows_per_shard": 300, "row_group_rows": 100}
    assert body["options"] == told
    files = [str(p.relative_to(made)) for p in sorted(made.glob("*/*.parquet"))]
    assert [entry["name"] for entry in body["files"]] == files and len(files) == 2 + 5
    for entry in body["files"]:
        data = (made / entry["name"]).read_bytes()
        rows = pq.read_metadata(made / entry["name"]).num_rows
        assert entry["rows"] == rows and entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_nothing_in_it_tells_where_or_when(made: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    source = make_raw(tmp_path / "elsewhere")
    prepare("table", source, tmp_path / "again", min_count=2, **OPTIONS)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (made / MANIFEST).read_bytes()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_rows(path: Path) -> None:
    body = read_json(path)
    body["rows"]["test"] += 1
    write_sealed(path, body)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train/part-00001.parquet", flip, r"train/part-00001.parquet: damaged: SHA-256 [0-9a-f]{64}, manifest.json"),
        ("test/part-00000.parquet", lambda p: p.write_bytes(p.read_bytes()[:-9]), r"damaged: [0-9,]+ bytes, manifest"),
        ("vocabulary/user.parquet", Path.unlink, r"vocabulary/user.parquet: missing. Prepare the data again"),
        ("train/part-00009.parquet", Path.touch, r"train/part-00009.parquet: not in manifest.json. Remove it"),
        ("schema.json", change_rows, r"schema.json: its fields or rows are not those of manifest.json"),
        (MANIFEST, Path.unlink, r"manifest.json: no such file, so nothing can be compared"),
        (MANIFEST, lambda p: p.write_text('{"format": 1}'), r"manifest.json: not a manifest of format 1"),
    ],
)
def test_any_damage_is_found_and_named(copy: Path, file: str, change: Callable, message: str) -> None:
    verify(copy)
    change(copy / file)
    with pytest.raises(UserError, match=message):
        verify(copy)


def test_the_first_of_several_is_named(copy: Path) -> None:
    for name in ("train/part-00002.parquet", "test/part-00000.parquet", "train/part-00000.parquet"):
        flip(copy / name)
    with pytest.raises(UserError, match=r"test/part-00000.parquet: damaged"):
        verify(copy)


def test_the_script_verifies(copy: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    good = run_script("prepare.py", "--verify", copy)
    assert good.stdout.startswith(f"{copy}: 7 files, ") and "all as in manifest.json" in good.stdout
    flip(copy / "train" / "part-00000.parquet")
    bad = run_script("prepare.py", "--verify", copy, check=False)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith(f"error: {copy}/train/part-00000.parquet: damaged") and bad.stderr.count("\n") == 1
    odd = run_script("prepare.py", "--verify", copy, "--out", "x", check=False)
    assert odd.returncode == 2 and "--verify only looks at PREPARED" in odd.stderr
