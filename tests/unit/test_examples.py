"""The examples of docs/library.md and of the library's docstrings run, in a folder with a tiny prepared data set."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from torchrec import EmbeddingBagConfig

import embsearch_dist as es
from embsearch_dist import allocation, api
from embsearch_dist.data.sources import arrays, registry, source, split, tables
from embsearch_dist.library import own_tables, supernet, widths
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.trial import merged
from embsearch_dist.schema import Schema
from tests.factories import prepared, small_config
from tests.served import WIDTHS, exported, run_of, single

ROOT = Path(__file__).resolve().parents[2]
MODULES = (allocation, api, arrays, own_tables, registry, source, split, supernet, tables, widths)
PAGE = (ROOT / "docs" / "library.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the examples find what they name: a data set, a config, an allocation and an exported model."""
    data = prepared(tmp_path_factory)
    (tmp_path / "runs/data").mkdir(parents=True)
    (tmp_path / "runs/data/my").symlink_to(data)
    (tmp_path / "my").mkdir()
    words = [f"{s}.{k}={v}" for s, body in merged(METHODS["utilities"].trial).items() for k, v in body.items()]
    config = small_config("runs/data/my", "runs/my", *words, "run.threads=1", method="utilities")
    (tmp_path / "my/config.yaml").write_text(config.to_yaml())
    run = run_of(data)
    (tmp_path / "exported").mkdir()
    exported(run, single(run), tmp_path / "exported/my")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_allocation(folder: Path) -> None:
    (folder / "runs/my").mkdir()
    es.Allocation(Schema.load(folder / "runs/data/my"), WIDTHS).save(folder / "runs/my/allocation.json")


def test_every_python_block_of_the_page_runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One after the other, in one program, as a reader would."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7 and len(blocks) == PAGE.count("```python")
    with_allocation(folder)
    clicks = prepared(tmp_path_factory).parent / "clicks.csv"
    names: dict[str, Any] = {"frame": pl.read_csv(clicks).drop("click").head(20)}
    for number, block in enumerate(blocks):
        if 'run_dir="runs/my"' in block:
            (folder / "runs/my/allocation.json").unlink()  # a search wants a directory of its own
        exec(compile(block, f"docs/library.md, block {number + 1}", "exec"), names)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples_in_docstrings_run(module: ModuleType, folder: Path) -> None:
    with_allocation(folder)
    found = doctest.testmod(module, extraglobs={"es": es, "EmbeddingBagConfig": EmbeddingBagConfig})
    assert found.failed == 0
    assert "+SKIP" not in Path(str(module.__file__)).read_text()


def test_what_has_an_example() -> None:
    finder = doctest.DocTestFinder()
    named = {t.name.rpartition(".")[2] for m in MODULES for t in finder.find(m, m.__name__) if t.examples}
    wanted = {"Supernet", "search_widths", "ArraySource", "register_source", "to_torch", "open_data", "load_model"}
    assert wanted <= named
