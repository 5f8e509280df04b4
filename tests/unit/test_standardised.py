"""Dense columns on their way into the shards: constants, and values that are too large once standardised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import embsearch_dist as es
from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.splits import random_split
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS

ROWS = 1000
SPLIT = random_split(np.arange(ROWS), 0)
TEST = int(np.flatnonzero(SPLIT == 2)[0])
TRAIN = int(np.flatnonzero(SPLIT == 0)[5])


def write(folder: Path, cell: Callable[[int], str]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [f"{i % 2},{i % 3},{cell(i)}\n" for i in range(ROWS)]
    (folder / "a.csv").write_text("y,u,p\n" + "".join(lines))
    (folder / "s.yaml").write_text("files: a.csv\nlabel: y\nfields: {u: categorical, p: dense}\n")
    return folder / "s.yaml"


@pytest.mark.parametrize("constant", ["0.1", "0.3", "19.99", "1e308", "-7"])
def test_a_constant_has_no_deviation_and_becomes_zeros(tmp_path: Path, constant: str) -> None:
    source = write(tmp_path, lambda i: "0.5" if i == TEST else "" if i % 7 == 0 else constant)
    schema = prepare("table", source, tmp_path / "out", quiet=True)
    assert schema.provenance["dense"] == {"p": {"mean": float(constant), "std": 0.0}}
    for split in SPLITS:
        assert not read_rows(tmp_path / "out", schema, split)[1].any()


def test_the_scale_of_other_columns_stays_what_it_was(tmp_path: Path) -> None:
    schema = prepare("table", write(tmp_path, lambda i: str(i % 7 / 10)), tmp_path / "out", quiet=True)
    x = (np.arange(ROWS) % 7 / 10)[SPLIT == 0]
    scale = {"mean": float(x.mean()), "std": float((((x - x.mean()) ** 2).sum() / len(x)) ** 0.5)}
    assert schema.provenance["dense"] == {"p": scale}


@pytest.mark.parametrize("value", ["1e40", "-1.7976931348623157e308"])
def test_a_value_too_large_once_standardised_is_refused_with_its_row(tmp_path: Path, value: str) -> None:
    source = write(tmp_path, lambda i: value if i == TEST else str(i % 7 / 10))
    told = rf"'p': {float(value):g} in row {TEST + 1} of the input is too large .*Correct it".replace("+", r"\+")
    with pytest.raises(UserError, match=told):
        prepare("table", source, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_so_it_is_with_the_scale_of_earlier_data(tmp_path: Path) -> None:
    prepare("table", write(tmp_path / "old", lambda i: str(i % 7)), tmp_path / "first", quiet=True)
    source = write(tmp_path / "new", lambda i: "1e39" if i == TRAIN else str(i % 7))
    with pytest.raises(UserError, match=rf"'p': 1e\+39 in row {TRAIN + 1} of the input is too large"):
        prepare("table", source, tmp_path / "out", vocabulary=tmp_path / "first", quiet=True)


def test_tables_in_memory_are_standardised_alike() -> None:
    rows = {"u": ["a", "b"] * 50, "p": [0.3] * 100, "label": [0, 1] * 50}
    other = {**rows, "p": [0.5] * 100}
    own = es.ArraySource(["u"], {"train": rows, "validation": rows, "test": other}, dense=["p"], raw=True)
    for split in SPLITS:
        assert set(own.read(split, 0, 100)["p"]) == {0}
    varied = {**rows, "p": [0.1, 0.2] * 50}
    own = es.ArraySource(["u"], {"train": varied, "validation": varied, "test": varied}, dense=["p"], raw=True)
    assert pytest.approx(1) == own.read("train", 0, 100)["p"].std(ddof=0)
    with pytest.raises(UserError, match=r"dense column 'p': 1e\+40 is too large once standardised"):
        own.encode(pl.DataFrame({"u": ["a"], "p": [1e40]}))
    with pytest.raises(UserError, match="dense column 'p': its values are too large to standardise"):
        large = {**rows, "p": [1.0, np.inf] * 50}
        es.ArraySource(["u"], {"train": large, "validation": large, "test": large}, dense=["p"], raw=True)
