"""Fields of any name: their vocabularies lie in files of plain names, and all of a run works with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.vocabulary import file_name, file_word, load_values
from embsearch_dist.data.store.manifest import verify
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Field, Schema

NAMES = ["$x_{", "größe", "a/b", ".hidden", "..", "a b: [c]{d}", "n" * 230, "n" * 231, "user", 'q"\\']


def test_a_name_becomes_a_plain_file() -> None:
    words = [file_word(name) for name in NAMES]
    assert len(set(words)) == len(NAMES) and file_name("user-id_2") == "user-id_2.parquet"
    assert all(w.isascii() and len(w) <= 150 and not set(w) & set("/.\\ \"'") for w in words)


def test_fields_of_any_name_are_prepared(tmp_path: Path) -> None:
    lines = [",".join(["click", *('"' + n.replace('"', '""') + '"' for n in NAMES)])]
    lines += [",".join([str(k % 2), *(f"v{(k + j) % 3}" for j in range(len(NAMES)))]) for k in range(60)]
    (tmp_path / "c.csv").write_text("\n".join(lines) + "\n")
    fields = ", ".join(f"{json.dumps(n, ensure_ascii=False)}: categorical" for n in NAMES)
    (tmp_path / "s.yaml").write_text(f"files: c.csv\nlabel: click\nmin_count: 1\nfields: {{{fields}}}\n")
    schema = prepare("table", tmp_path / "s.yaml", tmp_path / "out", quiet=True)
    assert schema.names == NAMES and verify(tmp_path / "out")
    for name in NAMES:
        assert sorted(load_values(tmp_path / "out", name)["value"]) == ["v0", "v1", "v2"]


def test_weights_of_a_list_are_a_column_that_no_field_may_have() -> None:
    with pytest.raises(UserError, match="'a weights' is named twice"):
        Schema("s", (Field("a", 3, "sum", weighted=True), Field("a weights", 3)))
