"""The YAML source file of ``--format ids``: where the files of each split lie, and how many ids each field has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embsearch_dist.data.formats.inputs import expand
from embsearch_dist.data.formats.source_file import source_words
from embsearch_dist.errors import UserError, nearest_or_all
from embsearch_dist.schema import POOLINGS, SPLITS

NAME = "ids.yaml"
KEYS = ("name", "splits", "files", "split", "label", "fields", "dense")
FIELD_KEYS = ("cardinality", "column", "pooling", "weights")
EXAMPLE = "configs/sources/ids.yaml shows a whole one"
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class IdField:
    """A field: its name, the column of its ids, how many there are, and of a list how it is pooled."""

    name: str
    column: str
    cardinality: int
    pooling: str = ""
    weights: str = ""


@dataclass(frozen=True)
class IdSource:
    """The source file, checked.

    Attributes:
        path: of the source file.
        name: of the data set.
        label: column of the label.
        fields: in the order of the schema.
        dense: name -> column.
        files: split -> its Parquet files in their order; all files under ``""`` where a column tells the split.
        split_column: that column; empty where folders tell it.
        splits: value of that column, as text -> split.
    """

    path: Path
    name: str
    label: str
    fields: tuple[IdField, ...]
    dense: dict[str, str]
    files: dict[str, tuple[Path, ...]]
    split_column: str = ""
    splits: tuple[tuple[str, str], ...] = ()

    @property
    def every_file(self) -> list[Path]:
        return [file for files in self.files.values() for file in files]


def read_id_source(path: Path) -> IdSource:
    """Read and check a source file, or the one called ids.yaml in a folder; the data files are not opened.

    Raises:
        UserError: names the file and the key.
    """
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise UserError(
            f"{path}: no such source file. It says where the splits are and how many ids each field has; {EXAMPLE}"
        )
    body = source_words(path)
    _known(path, "key", body, KEYS)
    for key in ("label", "fields"):
        if not body.get(key):
            raise UserError(f"{path}: key {key!r} is missing. {EXAMPLE}")
    fields = _fields(path, body["fields"])
    given = body.get("dense") or []
    if isinstance(given, list):
        given = {name: name for name in given}
    if not isinstance(given, dict) or not all(isinstance(v, str) for pair in given.items() for v in pair):
        raise UserError(f"{path}: dense must be a list of columns, or `name: column` lines")
    if body["label"] in [f.column for f in fields] + list(given.values()):
        raise UserError(f"{path}: column {body['label']!r} is the label and a field. Remove it from the fields")
    _check_names(path, fields, given)
    files, column, splits = _files(path, body)
    return IdSource(path, body.get("name") or path.stem, str(body["label"]), fields, dict(given), files, column, splits)


def _known(path: Path, what: str, body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in body:
        if key not in known:
            raise UserError(f"{path}: unknown {what} {key!r}. {nearest_or_all(str(key), known)}")


def _fields(path: Path, body: object) -> tuple[IdField, ...]:
    if not isinstance(body, dict):
        raise UserError(f"{path}: fields must be `name: CARDINALITY` lines, got {body!r}. {EXAMPLE}")
    found = []
    for name, value in body.items():
        where = f"{path}: field {name!r}"
        spec = value if isinstance(value, dict) else {"cardinality": value}
        _known(path, f"key of field {name!r}:", spec, FIELD_KEYS)
        text = str(spec.get("cardinality", "")).replace("_", "")
        if not re.fullmatch("[0-9]{1,18}", text) or not 1 <= int(text) <= LARGEST:
            raise UserError(
                f"{where}: cardinality must be a whole number from 1 to {LARGEST:,}: one more than the largest id; "
                f"got {spec.get('cardinality')!r}"
            )
        pooling, weights = str(spec.get("pooling", "")), str(spec.get("weights", ""))
        if pooling not in ("", *POOLINGS):
            raise UserError(f"{where}: pooling must be {' or '.join(POOLINGS)}, got {pooling!r}")
        if weights and pooling != "sum":
            raise UserError(f"{where}: weights need `pooling: sum`")
        found.append(IdField(str(name), str(spec.get("column", name)), int(text), pooling, weights))
    return tuple(found)


def _check_names(path: Path, fields: Sequence[IdField], dense: Mapping[str, str]) -> None:
    """Raises ``UserError`` for a name that two columns of the prepared data would have."""
    cures = {"fields": "`new_name: {column: ..., cardinality: ...}`", "dense": "`new_name: column`"}
    taken = {"label": "the label has"}
    taken |= {f"{f.name} weights": f"the weights of {f.name!r} have" for f in fields if f.weights}
    for kind, names in (("fields", [f.name for f in fields]), ("dense", list(dense))):
        for name in names:
            if name in taken:
                raise UserError(
                    f"{path}: {kind}: {name!r} cannot be a name: {taken[name]} it in the prepared data. Give another "
                    f"and the column behind it: {cures[kind]}"
                )
        taken |= dict.fromkeys(names, "a field has")


def _files(path: Path, body: Mapping[str, Any]) -> tuple[dict[str, tuple[Path, ...]], str, tuple[tuple[str, str], ...]]:
    """Files by split, and the column that tells the split with what its values mean."""
    if "split" not in body:
        if "files" in body:
            raise UserError(f"{path}: files needs split: {{column: NAME, train: VALUE, ...}}; or give splits alone")
        given = body.get("splits", {split: split for split in SPLITS})
        if not isinstance(given, dict) or set(given) != set(SPLITS):
            raise UserError(f"{path}: splits must name folders or files for {', '.join(SPLITS)}. {EXAMPLE}")
        files = {split: _expand(path, given[split]) for split in SPLITS}
        _check_apart(path, files)
        return files, "", ()
    if "splits" in body or "files" not in body:
        raise UserError(f"{path}: split by a column needs files, and not splits. {EXAMPLE}")
    split = body["split"]
    if not isinstance(split, dict) or set(split) != {"column", *SPLITS}:
        raise UserError(f"{path}: split must be {{column: NAME, train: VALUE, validation: VALUE, test: VALUE}}")
    values = [(str(v), name) for name in SPLITS for v in _words(split[name])]
    twice = sorted({v for v, _ in values if [w for w, _ in values].count(v) > 1})
    if twice:
        raise UserError(f"{path}: split: value {twice[0]!r} is named twice. Remove one")
    return {"": _expand(path, body["files"])}, str(split["column"]), tuple(values)


def _check_apart(path: Path, files: Mapping[str, Sequence[Path]]) -> None:
    """Raises ``UserError`` for a file of train that another split has, too: it would measure what was learnt."""
    learnt = {(s.st_dev, s.st_ino) for s in (file.stat() for file in files["train"])}
    for split in SPLITS[1:]:
        for file in files[split]:
            if ((s := file.stat()).st_dev, s.st_ino) in learnt:
                raise UserError(f"{path}: splits: {file} is in train and in {split}. Remove it from one of them")


def _words(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _expand(path: Path, named: object) -> tuple[Path, ...]:
    return expand(path, [str(word) for word in _words(named)], any_name=False)[0]
