"""A prepared data set with other field names: what training must take, whatever prepare lets through."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embsearch_dist.files import read_json, write_sealed
from embsearch_dist.schema import Schema

ODD = ("type", "a.b", "", "x$y_{$", " two  words ", "items", "t__0123456789abcdef01234567", "ünï <b>/..", "w" * 258)


def renamed(prepared: Path, folder: Path, names: Mapping[str, str]) -> Path:
    """A copy with the fields ``names`` called otherwise, rows as they were; without vocabulary and manifest."""
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("vocabulary", "manifest.json"))
    for path in sorted(folder.glob("*/part-*.parquet")):
        table: pa.Table = pq.read_table(path)
        table = table.rename_columns([names.get(c, c) for c in table.column_names])
        pq.write_table(table, path, row_group_size=64, write_page_checksum=True)
    body = read_json(folder / "schema.json")
    for field in body["fields"]:
        field["name"] = names.get(field["name"], field["name"])
    write_sealed(folder / "schema.json", body)
    Schema.load(folder).save(folder)
    return folder
