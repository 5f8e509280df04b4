"""Data are their bytes: changed, swapped, copied and stale ones are refused by name, moved and older ones go on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.store.manifest import MANIFEST, compare_ends, identity
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json, write_sealed
from embsearch_dist.methods.stages import Stage, check_stages, inputs_of
from embsearch_dist.methods.ues.method import UES
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.manifest import check_facts, facts_of
from tests.factories import one_rank, prepared, small_config


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared(tmp_path_factory), tmp_path / "data"))


def known(folder: Path) -> str:
    return identity(folder, Schema.load(folder))


def flip_labels(folder: Path) -> None:
    for path in folder.glob("*/part-*.parquet"):
        table: pa.Table = pq.read_table(path)
        label = pc.subtract(pa.scalar(1, pa.float32()), table["label"])
        table = table.set_column(0, table.schema.field("label"), label)
        pq.write_table(table, path, row_group_size=500, compression="lz4", write_statistics=False)


def swap(folder: Path) -> None:
    (folder / "test").rename(folder / "other")
    (folder / "validation").rename(folder / "test")
    (folder / "other").rename(folder / "validation")


def copied(folder: Path) -> None:
    shutil.copy(folder / "train" / "part-00000.parquet", folder / "train" / "part-00009.parquet")


def one_bit(folder: Path) -> None:
    path = next((folder / "train").glob("part-*.parquet"))
    body = bytearray(path.read_bytes())
    body[9] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize("change", [flip_labels, swap, copied, one_bit])
def test_shards_that_are_not_those_of_the_manifest_are_named(data: Path, change: Callable[[Path], None]) -> None:
    splits = ("train", "validation", "test")
    for split in splits:
        compare_ends(data, split)
    change(data)
    with pytest.raises(UserError, match=r"part-0000\d.parquet: .*manifest.json"):
        for split in splits:
            compare_ends(data, split)


def test_another_preparation_is_other_data_and_a_moved_one_is_not(data: Path, tmp_path: Path) -> None:
    moved = data.rename(tmp_path / "moved")
    first = known(moved)
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = "\n".join(f"{k % 3 % 2},{k % 7},{k % 5}" for k in range(400))
    (raw / "r.csv").write_text(f"y,a,b\n{rows}\n")
    (raw / "r.yaml").write_text("files: r.csv\nlabel: y\nfields: {a: categorical, b: categorical}\n")
    found = []
    for seed in (0, 1, 0):
        out = raw / f"out{len(found)}"
        schema = prepare("table", raw / "r.yaml", out, seed=seed, quiet=True)
        found.append((schema.fingerprint, known(out)))
    assert found[0] == found[2] and found[0][0] == found[1][0] and found[0][1] != found[1][1]
    assert first == known(moved.rename(tmp_path / "again"))


def test_a_stale_manifest_and_one_of_an_older_version(data: Path) -> None:
    body = read_json(data / MANIFEST)
    now = known(data)
    for entry in body["files"]:
        del entry["ends"]
    write_sealed(data / MANIFEST, body)
    compare_ends(data, "train")
    assert known(data) == now
    write_sealed(data / MANIFEST, {**body, "rows": {**body["rows"], "train": 5}})
    with pytest.raises(UserError, match="manifest.json: of other data than schema.json"):
        known(data)
    (data / MANIFEST).unlink()
    compare_ends(data, "train")
    without = known(data)
    flip_labels(data)
    assert known(data) != without


def test_what_was_made_from_other_data_is_refused_and_what_knows_none_is_not(data: Path, tmp_path: Path) -> None:
    schema = dataclasses.replace(Schema.load(data), data="a" * 16)
    other, unknown = dataclasses.replace(schema, data="b" * 16), dataclasses.replace(schema, data="")
    assert other.fingerprint == schema.fingerprint
    file = tmp_path / "allocation.json"
    Allocation.uniform(schema, 4).save(file)
    Allocation.load(file, schema)
    Allocation.load(file, unknown)
    with pytest.raises(UserError, match=r'allocation.json was made from data aaaa.*this is bbbb.*"data"'):
        Allocation.load(file, other)
    facts = [facts_of(1, 1, {}, "s", {}, d) for d in ("a", "b", "")]
    check_facts(tmp_path, facts[0], facts[2], exact=True)
    check_facts(tmp_path, facts[2], facts[1], exact=True)
    with pytest.raises(UserError, match="was made from data a, this is b"):
        check_facts(tmp_path, facts[0], facts[1], exact=False)


def test_a_stage_remembers_its_data(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", method="ues")
    schema = dataclasses.replace(Schema.load(data), data="a" * 16)
    run = Run(config, schema, one_rank())
    method = UES()
    stage: Stage = method.stages()[0]
    type(stage).repeatable, before = False, type(stage).repeatable
    try:
        write_json(run.dir / "stages" / f"{stage.name}.json", {"state": "running", "inputs": inputs_of(stage, run)})
        check_stages(method, run)
        check_stages(method, Run(config, dataclasses.replace(schema, data=""), one_rank()))
        with pytest.raises(UserError, match="made from data aaaa.*is bbbb"):
            check_stages(method, Run(config, dataclasses.replace(schema, data="b" * 16), one_rank()))
    finally:
        type(stage).repeatable = before
