"""Texts of the configuration are taken as they stand: from the command line, and dollar signs of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from embsearch_dist.config.read import load_config
from embsearch_dist.errors import UserError
from tests.factories import CONFIGS

WORDS = [
    "exp #1",
    "2024_01_15",
    "007",
    "no",
    "1e3",
    "null",
    "~",
    "[x]",
    "a: b",
    "'q'",
    "0x1F",
    "1:30",
    "\u00fc x",
    "${",
    "${oc.env:HOME}",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_text_is_literal_and_stays_so_in_the_run_directory(word: str, tmp_path: Path) -> None:
    config = load_config(CONFIGS, None, [f"run.dir={word}", f"search.name={word}", "train.epochs=3"], method="adass")
    assert (config.run.dir, config.search.name, config.train.epochs) == (word, word, 3)
    config.save(tmp_path)
    again = load_config(CONFIGS, tmp_path / "config.yaml")
    assert again == config


def test_a_key_of_dist_tables_is_a_whole_name() -> None:
    given = ["dist.tables.a.b=row_wise", "dist.tables.${x} y=table_wise", "dist.tables.7=data_parallel"]
    config = load_config(CONFIGS, None, given, method="adass")
    assert config.dist.tables == {"a.b": "row_wise", "${x} y": "table_wise", "7": "data_parallel"}


def test_a_file_reads_no_environment_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "word")
    file = tmp_path / "x.yaml"
    file.write_text("method: adass\nrun: {seed: 5}\ndata: {path: '${oc.env:SECRET}/${run.seed}'}\n")
    assert load_config(CONFIGS, file).data.path == "${oc.env:SECRET}/${run.seed}"
    told = load_config(CONFIGS, file, ["run.interpolate=true"])
    assert told.data.path == "word/5" and not told.run.interpolate
    file.write_text(file.read_text().replace("seed: 5", "seed: 5, interpolate: true"))
    with pytest.raises(UserError, match="x.yaml: config key run.interpolate: belongs on the command line"):
        load_config(CONFIGS, file)


def test_an_error_in_a_file_names_it(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    for text in (
        "method: adass\ntrain: {epochs: many}\n",
        "method: adass\ntrain: {epoch: 1}\n",
        "method: adass\ntrain: 3\n",
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="x.yaml: .*train"):
            load_config(CONFIGS, file)
    file.write_bytes(b"method: ad\xffass\n")
    with pytest.raises(UserError, match="x.yaml: not a text file"):
        load_config(CONFIGS, file)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(CONFIGS, tmp_path)
