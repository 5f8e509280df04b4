"""Broken files that a later stage reads: refused in one line that names the file, or read as they were. Seeded."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.store.manifest import MANIFEST, compare_ends, identity
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, write_json
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.networks.architecture import Architecture
from embsearch_dist.report.reading import read_lines
from embsearch_dist.schema import Schema
from embsearch_dist.train.lines import compare_lines, lines_of
from embsearch_dist.train.monitor import Monitor
from launch.common import read_run_config
from tests.factories import prepared, small_config
from tests.unit.test_nasrec_choosing import searched

JUNK = [None, True, -1, 1e308, 10**30, "", "x" * 300, [], {}, [[]], {"a": {}}, float("nan")]


def places(body: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every value inside a JSON body, as its holder and key."""
    found = [] if found is None else found
    for key in body if isinstance(body, dict) else range(len(body)):
        found.append((body, key))
        if isinstance(body[key], dict | list):
            places(body[key], found)
    return found


def corrupt(path: Path, rng: random.Random) -> str:
    """Break a file in one of six ways; says how."""
    data = path.read_bytes()
    kind = rng.choice(["bytes", "bit", "cut", "type", "directory", "loop"])
    if kind == "type" and path.suffix != ".json":
        kind = "bit"
    if kind == "bytes":
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:])
    elif kind == "bit":
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "type":
        body = json.loads(data)
        holder, key = rng.choice(places(body))
        holder[key] = rng.choice(JUNK)
        path.write_text(json.dumps(body))
    else:
        path.unlink()
        path.mkdir() if kind == "directory" else os.symlink(path.name, path)
    return kind


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each file, beside prepared data."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(prepared(tmp_path_factory), folder / "data", ignore=shutil.ignore_patterns("vocabulary"))
    schema = Schema.load(folder / "data")
    one = Allocation.uniform(schema, 4)
    one.save(folder / "allocation.json")
    GroupedAllocation(schema, (one, one), ({"train": 5}, {"train": 6}), {}).save(folder / GROUPS)
    small_config(folder / "data", folder).save(folder)
    shutil.copy(searched(folder / "nasrec") / "architectures" / "rank-1.json", folder / "architecture.json")
    with Monitor(folder, "fit", quiet=True) as monitor:
        for step in range(8):
            monitor.scalars(step, {"loss": 1 / (step + 1), "lr": 0.01})
    write_json(folder / "known.json", lines_of(folder, "fit"))
    return folder


def of_data(folder: Path, schema: Schema) -> Any:
    read = Schema.load(folder / "data")
    for split in ("train", "validation", "test"):
        compare_ends(folder / "data", split)
    return read.fingerprint, read.rows, identity(folder / "data", read)


def of_lines(folder: Path, schema: Schema) -> Any:
    """What a report shows of a finished stage, or the words with which it says that lines are others."""
    for text in compare_lines(folder, "fit", read_json(folder / "known.json")):
        raise UserError(text)
    return read_lines(folder / "metrics.jsonl")


READERS: dict[str, Callable[[Path, Schema], Any]] = {
    "config.yaml": lambda folder, schema: dataclasses.asdict(read_run_config(folder)),
    "allocation.json": lambda folder, schema: Allocation.load(folder / "allocation.json", schema).widths,
    GROUPS: lambda folder, schema: [a.widths for a in GroupedAllocation.load(folder / GROUPS, schema).allocations],
    "architecture.json": lambda folder, schema: Architecture.load(folder / "architecture.json"),
    "data/schema.json": of_data,
    f"data/{MANIFEST}": of_data,
    "metrics.jsonl": of_lines,
}


def sweep(whole: Path, tmp_path: Path, name: str, seed: int, count: int) -> dict[str, int]:
    """Break one file again and again; refused or harmless each time, anything else fails."""
    rng, schema = random.Random(f"{name} {seed}"), Schema.load(whole / "data")
    right, counts = READERS[name](whole, schema), {"refused": 0, "harmless": 0}
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    for _ in range(count):
        kind = corrupt(folder / name, rng)
        try:
            found = READERS[name](folder, schema)
        except UserError as e:
            assert "\n" not in str(e) and str(folder) in str(e), f"{name}, {kind}: {e}"
            counts["refused"] += 1
        else:
            # Other data are noticed where their identity is compared with that of what was made from them.
            other = name.startswith("data/") and found[2] != right[2]
            assert found == right or other, f"{name}, {kind}: read as something else"
            counts["harmless"] += 1
        path = folder / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copy(whole / name, path)
    return counts


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_refused_or_harmless(whole: Path, tmp_path: Path, name: str) -> None:
    assert sweep(whole, tmp_path, name, 0, 12)["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_hundreds_of_broken_files(whole: Path, tmp_path: Path, name: str) -> None:
    assert sweep(whole, tmp_path, name, 1, 100)["refused"] > 50
