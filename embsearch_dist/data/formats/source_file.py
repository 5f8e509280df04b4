"""The YAML source file that describes a user's own data: its keys, checked, and literal names.

Every plain word is text: columns may be called on, no, 0, 010 or null. Numbers are read where a key wants one.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from embsearch_dist.data.formats.cells import Spelling
from embsearch_dist.data.formats.columns import KINDS, LABEL, MAX_LENGTH, TIME, Bag, Column, LabelColumn
from embsearch_dist.data.formats.times import TimeColumn, check_zone, strftime_of
from embsearch_dist.errors import UserError, nearest_or_all
from embsearch_dist.schema import POOLINGS

TEXT_KEYS = ("delimiter", "encoding", "quotes", "spaces", "missing", "decimal", "thousands")
KEYS = ("name", "files", "format", *TEXT_KEYS, "label", "time", "fields", "min_count")
LABEL_KEYS = ("column", "threshold", "positive", "negative")
TIME_KEYS = ("column", "format", "zone")
LIST_KEYS = ("pooling", "max_length", "separator", "weight_separator", "weights")
FIELD_KEYS = ("column", "kind", "whole_numbers", *LIST_KEYS)
FORMATS = ("csv", "tsv", "parquet")
ENCODINGS = {"utf8": "utf-8", "latin1": "latin-1", "iso-8859-1": "latin-1", "utf16": "utf-16"}
LONGEST = 10_000
LONGEST_NAME = 1000
EXAMPLE = "configs/sources/example.yaml shows a whole source file"
PATTERN = re.compile(r"\*|\^.*\$", re.DOTALL)  # names that polars takes for several columns


@dataclass(frozen=True)
class TableSource:
    """The source file, checked.

    Attributes:
        path: of the source file.
        name: of the data set.
        files: paths, folders and patterns as they are written.
        format: ``csv``, ``tsv`` or ``parquet``; empty: by the files.
        likely: as ``format``, of files alone that do not tell it themselves.
        delimiter: one character; empty: that of the format.
        encoding: ``utf-8``, ``latin-1`` or ``utf-16``.
        quoted: whether quotes protect separators.
        spelling: how cells are written.
        label: where the label stands; none in rows that are to be predicted.
        time: where the time stands, if there is one.
        columns: fields and dense columns, in the order of the schema.
        raw: the column of the files behind each of ``columns``.
        min_count: rows a value needs.
    """

    path: Path
    name: str
    files: tuple[str, ...]
    format: str
    delimiter: str
    encoding: str
    quoted: bool
    spelling: Spelling
    label: LabelColumn | None
    time: TimeColumn | None
    columns: tuple[Column, ...]
    raw: dict[str, str]
    min_count: int
    likely: str = ""

    @property
    def uses(self) -> tuple[tuple[str, str, str], ...]:
        """Every use of a column of the files: key of the source file, column, and what for: ``label``, ``time`` (or
        ``digits`` or ``dates``, see :attr:`TimeColumn.use`), ``categorical``, ``number``, ``list`` or ``weights``."""
        found = [("label", self.label.column, "label")] if self.label else []
        if self.time:
            found.append(("time", self.time.column, self.time.use))
        for c in self.columns:
            use = c.kind if c.kind in ("categorical", "list") else "number"
            found.append((f"field {c.name!r}", self.raw[c.name], use))
            if c.bag is not None and c.bag.weights:
                found.append((f"field {c.name!r}: weights", c.bag.weights, "weights"))
        return tuple(found)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns to read from the files."""
        return tuple(dict.fromkeys(column for _, column, _ in self.uses))

    def describe(self) -> dict[str, Any]:
        """How further rows of this kind are read; JSON-able. What belongs to single files or the label is left out."""
        kinds = {"delimiter": self.delimiter, "encoding": self.encoding, "quoted": self.quoted, "format": self.format}
        columns = [{**describe_column(c), "column": self.raw[c.name]} for c in self.columns]
        spelling = asdict(self.spelling) | {"missing": list(self.spelling.missing)}
        return {"format": "table", "columns": columns, "text": kinds, "spelling": spelling}


def describe_column(column: Column) -> dict[str, Any]:
    """A column as JSON; what it lacks is left out."""
    body: dict[str, Any] = {"name": column.name, "kind": column.kind}
    body |= {"bag": asdict(column.bag)} if column.bag is not None else {}
    return body | {key: True for key in ("whole", "log") if getattr(column, key)}


class _Literal(yaml.SafeLoader):
    """YAML whose plain words are all text, in which no key may be there twice."""

    # Only the merge key `<<` keeps its meaning.
    yaml_implicit_resolvers = {
        "<": [(tag, regexp) for tag, regexp in yaml.SafeLoader.yaml_implicit_resolvers["<"] if tag.endswith(":merge")]
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(k) for k, _ in node.value]
        for i, (key_node, _) in enumerate(node.value):
            if (key := keys[i]) in keys[:i]:
                line = key_node.start_mark.line + 1
                raise UserError(f"{self.name}, line {line}: key {key!r} is there twice. Remove one")
        return super().construct_mapping(node, deep)


def source_words(path: Path) -> dict:
    """The keys of a YAML source file as they stand there, every plain word as text; unchecked.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    return _load(path)


def read_source_file(path: Path) -> TableSource:
    """Read and check a YAML source file (not the data it names).

    Raises:
        UserError: names the file and the key, and the nearest known one for an unknown key.
    """
    body = _load(path)
    for key in body:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}. {nearest_or_all(str(key), KEYS)}")
    for key in ("files", "label", "fields"):
        if not body.get(key):
            raise UserError(f"{path}: key {key!r} is missing. {EXAMPLE}")
    label = _label(path, body["label"])
    columns, raw = _fields(path, body["fields"], label.column)
    file_format = body.get("format", "")
    if file_format not in ("", *FORMATS):
        raise UserError(f"{path}: format {file_format!r} is none of csv, tsv, parquet. Write one of them")
    min_count = _whole(body.get("min_count", "1"))
    if min_count is None or min_count < 1:
        raise UserError(f"{path}: min_count must be a whole number of at least 1, got {body['min_count']!r}")
    quotes = body.get("quotes", "double")
    if quotes not in ("double", "none"):
        raise UserError(f"{path}: quotes must be double (RFC 4180) or none (quotes are plain text), got {quotes!r}")
    if file_format == "parquet":
        for key in ("delimiter", "encoding", "quotes"):
            if key in body:
                raise UserError(f"{path}: {key} is for text, not for Parquet. Remove it")
    return TableSource(
        path=path,
        name=_word(path, "name", body["name"]) if body.get("name") else path.stem,
        files=_words(path, "files", body["files"]),
        format=file_format,
        delimiter="" if (mark := body.get("delimiter", "")) == "" else delimiter_of(mark, f"{path}: delimiter"),
        encoding=encoding_of(body.get("encoding", "utf-8"), f"{path}: encoding"),
        quoted=quotes == "double",
        spelling=_spelling(path, body),
        label=label,
        time=_time(path, body["time"]) if body.get("time") else None,
        columns=columns,
        raw=raw,
        min_count=min_count,
    )


def _word(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: {key} must be a name, got {value!r}")
    return value


def _words(path: Path, key: str, value: object) -> tuple[str, ...]:
    every = value if isinstance(value, list) else [value]
    if not every or not all(isinstance(v, str) for v in every):
        what = "a list of paths" if key == "files" else "a text or a list of texts"
        raise UserError(f"{path}: {key} must be {what}, got {value!r}")
    return tuple(every)


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value) else None


def delimiter_of(value: object, told: str) -> str:
    """What parts the cells of a line, from how a person writes it: ``tab`` is one, too.

    Raises:
        UserError: it is no single character; begins with ``told``, which says where it was given.
    """
    value = {"\\t": "\t", "tab": "\t"}.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, str) or len(value.encode()) != 1 or value in ('"', "\n", "\r"):
        raise UserError(f"{told} must be one ASCII character other than a quote, got {value!r}")
    return value


def encoding_of(value: object, told: str) -> str:
    """The name of an encoding, of its several ones that by which readers know it.

    Raises:
        UserError: it is none that they read; begins with ``told``, which says where it was given.
    """
    encoding = ENCODINGS.get(str(value).lower(), str(value).lower())
    if encoding not in ("utf-8", "latin-1", "utf-16"):
        raise UserError(f"{told} {encoding!r} is none of utf-8, latin-1, utf-16. Convert the file to UTF-8")
    return encoding


def _spelling(path: Path, body: dict) -> Spelling:
    missing = _words(path, "missing", body["missing"]) if "missing" in body else ()
    decimal, thousands = body.get("decimal", "."), body.get("thousands", "")
    if decimal not in (".", ","):
        raise UserError(f"{path}: decimal must be '.' or ',', got {decimal!r}")
    wrong = not isinstance(thousands, str) or len(thousands) > 1 or thousands in tuple("0123456789+-eE")
    if wrong or thousands == decimal:
        raise UserError(f"{path}: thousands must be one character, other than decimal ({decimal!r}), got {thousands!r}")
    spaces = body.get("spaces", "keep")
    if spaces not in ("keep", "trim"):
        raise UserError(f"{path}: spaces must be keep or trim (blanks around cells do not count), got {spaces!r}")
    return Spelling(missing, decimal, thousands, spaces == "trim")


def _known(path: Path, key: str, body: object, known: tuple[str, ...], plain: str) -> dict:
    """A mapping with known keys alone, among them a column."""
    if not isinstance(body, dict):
        raise UserError(f"{path}: {key} must be a column name or {plain}, got {body!r}")
    for k in body:
        if k not in known:
            raise UserError(f"{path}: {key}: unknown key {k!r}. {nearest_or_all(str(k), known)}")
    if not isinstance(body.get("column"), str) or not body["column"]:
        raise UserError(f"{path}: {key}: key 'column' is missing or no name, got {body.get('column')!r}")
    return body


def _time(path: Path, body: object) -> TimeColumn:
    if isinstance(body, str):
        return TimeColumn(body)
    given = _known(path, "time", body, TIME_KEYS, "{column: ..., format: ..., zone: ...}")
    pattern, zone = given.get("format", ""), given.get("zone", "")
    for key, value, check in (("format", pattern, strftime_of), ("zone", zone, check_zone)):
        try:
            if value != "":
                check(_word(path, f"time: {key}", value))
        except (ValueError, pl.exceptions.PolarsError) as e:
            raise UserError(f"{path}: time: {key} {value!r} is not known: {' '.join(str(e).split())[:200]}") from e
    return TimeColumn(given["column"], strftime_of(pattern) if pattern else "", zone)


def _load(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file. --format table takes a YAML source file as --input") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a YAML source file ({e}). Check --input") from e
    try:
        loader = _Literal(text)
        loader.name = str(path)
        body = loader.get_single_data()
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or " ".join(str(e).split())
        raise UserError(f"{path}{line}: not valid YAML ({reason})") from e
    except (RecursionError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a source file ({type(e).__name__}: {e}). {EXAMPLE}") from e
    if not isinstance(body, dict):
        raise UserError(f"{path}: not a source file: expected `key: value` lines. See configs/sources/example.yaml")
    return body


def _label(path: Path, body: object) -> LabelColumn:
    if isinstance(body, str):
        return LabelColumn(body)
    given = _known(path, "label", body, LABEL_KEYS, "{column: ..., threshold: ...}")
    words = {key: _words(path, f"label: {key}", given[key]) for key in ("positive", "negative") if key in given}
    if len(words) == 1:
        raise UserError(f"{path}: label: positive and negative go together. Name the values of both")
    both = set(words.get("positive", ())) & set(words.get("negative", ()))
    if both:
        raise UserError(f"{path}: label: {sorted(both)[0]!r} is positive and negative. Remove one")
    if words and "threshold" in given:
        raise UserError(f"{path}: label: a threshold, or positive and negative values. Remove one")
    threshold = None
    if "threshold" in given:
        try:
            threshold = float(given["threshold"])
        except (TypeError, ValueError) as e:
            raise UserError(f"{path}: label: threshold must be a number, got {given['threshold']!r}") from e
        if not math.isfinite(threshold):
            raise UserError(f"{path}: label: threshold must be finite, got {given['threshold']!r}")
    return LabelColumn(given["column"], threshold, **words)


def _fields(path: Path, body: object, label: str) -> tuple[tuple[Column, ...], dict[str, str]]:
    if not isinstance(body, dict):
        raise UserError(f"{path}: fields must be `name: kind` lines (kind: {', '.join(KINDS)}), got {body!r}")
    columns, raw = [], {}
    for key, value in body.items():
        name, spec = str(key), value if isinstance(value, dict) else {"kind": value}
        for k in spec:
            if k not in FIELD_KEYS:
                raise UserError(f"{path}: field {name!r}: unknown key {k!r}. {nearest_or_all(str(k), FIELD_KEYS)}")
        kind = spec.get("kind", "categorical")
        if kind not in KINDS:
            raise UserError(f"{path}: field {name!r}: unknown kind {kind!r}. {nearest_or_all(str(kind), KINDS)}")
        if len(name) > LONGEST_NAME:
            raise UserError(
                f"{path}: a field's name has {len(name)} letters, at most {LONGEST_NAME} can be: {name[:40]}... "
                f"Rename it: `new_name: {{column: ..., kind: {kind}}}`"
            )
        if not name.strip() or not name.isprintable() or PATTERN.fullmatch(name) or name in ("label", LABEL, TIME):
            raise UserError(
                f"{path}: {name!r} cannot name a field (not empty, no control characters, not 'label', '*' or '^...$')."
                f" Rename it: `new_name: {{column: {name!r}, kind: {kind}}}`"
            )
        raw[name] = _word(path, f"field {name!r}: column", spec.get("column", name))
        if raw[name] == label:
            raise UserError(f"{path}: field {name!r} is the label column {label!r} itself. Remove it from fields")
        whole = spec.get("whole_numbers", "false")
        if whole not in ("true", "false") or (whole == "true" and kind not in ("categorical", "list")):
            raise UserError(f"{path}: field {name!r}: whole_numbers is true or false, of categorical fields and lists")
        bag = _bag(f"{path}: field {name!r}", spec, label)
        columns.append(Column(name, kind, bag, whole == "true"))
    for weights, name in ((f"{c.name} weights", c.name) for c in columns if c.bag is not None and c.bag.weighted):
        if weights in raw:
            raise UserError(
                f"{path}: {weights!r} cannot name a field: the weights of {name!r} have that name in the prepared "
                f"data. Rename it: `new_name: {{column: {raw[weights]!r}, ...}}`"
            )
    if all(c.kind == "dense" for c in columns):
        raise UserError(f"{path}: fields has no categorical or bucketed one; at least one is needed")
    return tuple(columns), raw


def _bag(where: str, spec: dict, label: str) -> Bag | None:
    """The keys of a list field, checked; ``None`` for a field of another kind."""
    given = {k: spec[k] for k in LIST_KEYS if k in spec}
    if spec.get("kind") != "list":
        if given:
            raise UserError(f"{where}: {next(iter(given))} is for lists. Write `kind: list`, or remove it")
        return None
    most = _whole(given.get("max_length", str(MAX_LENGTH)))
    if most is None or not 1 <= most <= LONGEST:
        raise UserError(f"{where}: max_length must be a whole number from 1 to {LONGEST}, got {given['max_length']!r}")
    bag = Bag(**given | {"max_length": most})
    if bag.pooling not in POOLINGS:
        raise UserError(f"{where}: pooling must be {' or '.join(POOLINGS)}, got {bag.pooling!r}")
    for key in ("separator", *(("weight_separator",) if "weight_separator" in given else ())):
        mark = getattr(bag, key)
        if not isinstance(mark, str) or len(mark) != 1 or not mark.isascii():
            raise UserError(f"{where}: {key} must be one ASCII character, got {mark!r}")
    if bag.separator == bag.weight_separator:
        raise UserError(f"{where}: separator and weight_separator are both {bag.separator!r}. Make them differ")
    if "weights" in given and (not isinstance(bag.weights, str) or bag.weights in ("", label)):
        raise UserError(f"{where}: weights must be the column that holds them, got {bag.weights!r}")
    if bag.weights and bag.weight_separator:
        raise UserError(f"{where}: weights stand in column {bag.weights!r} or behind weight_separator. Remove one key")
    if bag.weighted and bag.pooling != "sum":
        raise UserError(f"{where}: weights need `pooling: sum`, not {bag.pooling}. Remove the weights or the pooling")
    return bag
