"""A user's own CSV, TSV or Parquet files, described by a YAML source file; see configs/sources/."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from embsearch_dist.data.formats.blocks import Block, Layout, parse, read_blocks, read_header
from embsearch_dist.data.formats.columns import KINDS, LABEL, TIME, Bag, Chunk, Column, Rows, Source, nearest
from embsearch_dist.errors import UserError
from embsearch_dist.schema import POOLINGS

KEYS = ("name", "files", "format", "delimiter", "encoding", "label", "time", "fields", "min_count")
LABEL_KEYS = ("column", "threshold")
LIST_KEYS = ("pooling", "max_length", "separator", "weight_separator", "weights")
FIELD_KEYS = ("column", "kind", *LIST_KEYS)
LONGEST = 10_000
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "tsv", ".parquet": "parquet", ".pq": "parquet"}
# Field names become file names (vocabulary), table names and parameter names (which may hold no dot).
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
PARQUET_ROWS = 1 << 17


@dataclass(frozen=True)
class TableSource:
    """The source file, checked. ``raw`` gives the column of the files behind each prepared column."""

    path: Path
    name: str
    files: tuple[Path, ...]
    format: str
    delimiter: str
    encoding: str
    label: str
    threshold: float | None
    time: str | None
    columns: tuple[Column, ...]
    raw: dict[str, str]
    min_count: int

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns to read from the files."""
        weights = [c.bag.weights for c in self.columns if c.bag is not None and c.bag.weights]
        every = [self.label, *([self.time] if self.time else []), *self.raw.values(), *weights]
        return tuple(dict.fromkeys(every))


def table(path: Path) -> Source:
    """Open the data that a YAML source file describes.

    Raises:
        UserError: no or unreadable YAML, unknown or missing key, missing file, unknown column; while
            reading also bad cells and rows.
    """
    spec = read_source_file(path)
    for file in spec.files:
        if not file.is_file():
            raise UserError(f"{path}: files: {file} does not exist. Paths are relative to the source file")
    if spec.format == "parquet":
        for file in spec.files:
            _check_names(spec, file, _parquet_names(file))
        cut: Callable[[Path, int | None], Iterator[_Cut]] = lambda file, size: _parquet_rows(spec, file)  # noqa: E731
    else:
        layouts = {}
        for file in spec.files:
            header = read_header(file, spec.delimiter, spec.encoding)
            _check_names(spec, file, header)
            layouts[file] = Layout(header, spec.delimiter, header=True, quoted=True, encoding=spec.encoding)
        cut = lambda file, size: _text_rows(spec, file, layouts[file], size)  # noqa: E731

    def read(clock: _Clock | None, rows: Callable[[], Rows]) -> pl.DataFrame:
        found = rows()
        series = [found.label(spec.label, spec.threshold)]
        if clock is not None:
            series.append(clock.read(found))
        series += [found.convert(c, spec.raw[c.name]) for c in spec.columns]
        return pl.DataFrame(series)

    def chunks() -> Iterator[Chunk]:
        # A small first block: whoever reads any chunk knows how the first rows of all write their time.
        clock = _Clock(spec.time, next(cut(spec.files[0], 1 << 16))[1]()) if spec.time else None
        for file in spec.files:
            for consumed, rows in cut(file, None):
                yield Chunk(consumed, partial(read, clock, rows))

    no_time = None if spec.time else f"{path} names no time column; add `time: COLUMN` or use --split random"
    notes = () if spec.threshold is None else (f"label is {spec.label} > {spec.threshold:g}",)
    recipe = path.read_text(encoding="utf-8")
    return Source(spec.name, spec.columns, spec.files, chunks, spec.min_count, no_time, notes, recipe)


# Bytes of the file, and the rows of them when asked for.
_Cut = tuple[int, Callable[[], Rows]]


def _text_rows(spec: TableSource, file: Path, layout: Layout, block_bytes: int | None) -> Iterator[_Cut]:
    def rows(block: Block) -> Rows:
        return Rows(parse(block, layout, spec.wanted), block.where)

    for block in read_blocks(file, layout, block_bytes):
        yield block.consumed, partial(rows, block)


def _parquet_names(file: Path) -> tuple[str, ...]:
    try:
        return tuple(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file}: cannot be read as Parquet ({_one_line(e)}). Write the file again") from e


def _parquet_rows(spec: TableSource, file: Path) -> Iterator[_Cut]:
    try:
        with pq.ParquetFile(file) as parquet:
            total = parquet.metadata.num_rows
            if total == 0:
                raise UserError(f"{file}: the file has no rows. Give a file with at least one")
            size, first = file.stat().st_size, 0
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=list(spec.wanted)):
                rows = partial(_from_arrow, batch, partial(_parquet_where, file, first))
                yield size * batch.num_rows // total, rows
                first += batch.num_rows
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file}: cannot be read as Parquet ({_one_line(e)}). Write the file again") from e


def _from_arrow(batch: pa.RecordBatch, where: Callable[[int], str]) -> Rows:
    return Rows(pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch]))), where)


def _parquet_where(file: Path, first: int, row: int) -> str:
    return f"{file}, row {first + row + 1}"


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:200]


def _check_names(spec: TableSource, file: Path, names: tuple[str, ...]) -> None:
    uses = [("label", spec.label), *((("time", spec.time),) if spec.time else ())]
    uses += [(f"field {name!r}", raw) for name, raw in spec.raw.items()]
    uses += [(f"field {c.name!r}: weights", c.bag.weights) for c in spec.columns if c.bag is not None and c.bag.weights]
    for use, column in uses:
        if column not in names:
            raise UserError(f"{spec.path}: {use}: {file.name} has no column {column!r}. {nearest(column, names)}")


class _Clock:
    """Reads the time column as float64; the first rows decide how, so that all files are read alike.

    Dates become microseconds (exact in a float64); of numbers beyond 2^53 (nanoseconds since 1970) the
    last bits go, and rows that then tie keep their order in the file.
    """

    def __init__(self, column: str, first: Rows) -> None:
        self.column = column
        raw = first.frame[column].head(1)
        number = not raw.cast(pl.Float64, strict=False).null_count() if raw.dtype == pl.String else True
        self.how = "number" if number else "date"

    def read(self, rows: Rows) -> pl.Series:
        raw = rows.frame[self.column]
        if raw.dtype.is_temporal():
            time = raw.cast(pl.Datetime("us"), strict=False).cast(pl.Int64)
        else:
            time = self._date(raw) if self.how == "date" else raw.cast(pl.Float64, strict=False)
        time = time.cast(pl.Float64).fill_nan(None)
        if time.null_count():
            row = int(time.is_null().arg_max() or 0)
            wanted = "a number" if self.how == "number" else "a date like 2014-10-21 13:00:00"
            value = "blank" if raw[row] in (None, "") else repr(raw[row])
            raise UserError(f"{rows.where(row)}, column {self.column!r}: the time is {value}. Write {wanted}")
        return time.alias(TIME)

    @staticmethod
    def _date(raw: pl.Series) -> pl.Series:
        tidy = raw.str.replace("T", " ", literal=True).str.strip_suffix("Z")
        tidy = pl.select(pl.when(tidy.str.len_chars() == 10).then(tidy + " 00:00:00").otherwise(tidy)).to_series()
        return tidy.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="us").cast(pl.Int64)


class _NoDuplicates(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; a field named twice is a mistake to hear of."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(k) for k, _ in node.value]
        for i, (key_node, _) in enumerate(node.value):
            if (key := keys[i]) in keys[:i]:
                line = key_node.start_mark.line + 1
                raise UserError(f"{self.name}, line {line}: key {key!r} is there twice. Remove one")
        return super().construct_mapping(node, deep)


def read_source_file(path: Path) -> TableSource:
    """Read and check a YAML source file (not the data it names).

    Raises:
        UserError: names the file and the key, and the nearest known one for an unknown key.
    """
    body = _load(path)
    for key in body:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}. {nearest(str(key), KEYS)}")
    for key in ("files", "label", "fields"):
        if not body.get(key):
            raise UserError(f"{path}: key {key!r} is missing. configs/sources/example.yaml shows a whole source file")
    files = body["files"]
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(f, str) for f in files):
        raise UserError(f"{path}: files must be a list of paths, got {files!r}")
    file_format = body.get("format") or _guess(path, files[0])
    if file_format not in ("csv", "tsv", "parquet"):
        raise UserError(f"{path}: format {file_format!r} is none of csv, tsv, parquet. Write one of them")
    delimiter = body.get("delimiter") or ("\t" if file_format == "tsv" else ",")
    if not isinstance(delimiter, str) or len(delimiter.encode()) != 1 or delimiter in '"\n\r':
        raise UserError(f"{path}: delimiter must be one ASCII character other than a quote, got {delimiter!r}")
    encoding = str(body.get("encoding", "utf-8")).lower()
    encoding = {"utf8": "utf-8", "latin1": "latin-1", "iso-8859-1": "latin-1"}.get(encoding, encoding)
    if encoding not in ("utf-8", "latin-1"):
        raise UserError(f"{path}: encoding {encoding!r} is neither utf-8 nor latin-1. Convert the file to UTF-8")
    label, threshold = _label(path, body["label"])
    time = body.get("time")
    if time is not None and not isinstance(time, str):
        raise UserError(f"{path}: time must be a column name, got {time!r}")
    min_count = body.get("min_count", 1)
    if not isinstance(min_count, int) or isinstance(min_count, bool) or min_count < 1:
        raise UserError(f"{path}: min_count must be a whole number of at least 1, got {min_count!r}")
    columns, raw = _fields(path, body["fields"], label)
    return TableSource(
        path=path,
        name=str(body.get("name") or path.stem),
        files=tuple(path.parent / f for f in files),
        format=file_format,
        delimiter=delimiter,
        encoding=encoding,
        label=label,
        threshold=threshold,
        time=time,
        columns=columns,
        raw=raw,
        min_count=min_count,
    )


def _load(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file. --format table takes a YAML source file as --input") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a YAML source file ({e}). Check --input") from e
    loader = _NoDuplicates(text)
    loader.name = str(path)
    try:
        body = loader.get_single_data()
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(e, 'problem', e)})") from e
    finally:
        loader.dispose()
    if not isinstance(body, dict):
        raise UserError(f"{path}: not a source file: expected `key: value` lines. See configs/sources/example.yaml")
    return body


def _guess(path: Path, first: str) -> str:
    suffix = Path(first.removesuffix(".gz")).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot tell the format of {first!r}. Add `format: csv`, tsv or parquet")
    return SUFFIXES[suffix]


def _label(path: Path, body: object) -> tuple[str, float | None]:
    if isinstance(body, str):
        return body, None
    if not isinstance(body, dict):
        raise UserError(f"{path}: label must be a column name or {{column: ..., threshold: ...}}, got {body!r}")
    for key in body:
        if key not in LABEL_KEYS:
            raise UserError(f"{path}: label: unknown key {key!r}. {nearest(str(key), LABEL_KEYS)}")
    column, threshold = body.get("column"), body.get("threshold")
    if not isinstance(column, str):
        raise UserError(f"{path}: label: key 'column' is missing or no name, got {column!r}")
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise UserError(f"{path}: label: threshold must be a number, got {threshold!r}")
    if threshold is not None and not np.isfinite(threshold):
        raise UserError(f"{path}: label: threshold must be finite, got {threshold!r}")
    return column, None if threshold is None else float(threshold)


def _fields(path: Path, body: object, label: str) -> tuple[tuple[Column, ...], dict[str, str]]:
    if not isinstance(body, dict):
        raise UserError(f"{path}: fields must be `name: kind` lines (kind: {', '.join(KINDS)}), got {body!r}")
    columns, raw = [], {}
    for key, value in body.items():
        name, spec = str(key), value if isinstance(value, dict) else {"kind": value}
        for k in spec:
            if k not in FIELD_KEYS:
                raise UserError(f"{path}: field {name!r}: unknown key {k!r}. {nearest(str(k), FIELD_KEYS)}")
        kind = spec.get("kind", "categorical")
        if kind not in KINDS:
            raise UserError(f"{path}: field {name!r}: unknown kind {kind!r}. {nearest(str(kind), KINDS)}")
        if not NAME.fullmatch(name) or name == "label" or name in (LABEL, TIME):
            raise UserError(
                f"{path}: {name!r} cannot name a field (letters, digits, _ and -; not 'label'). "
                f"Rename it: `new_name: {{column: {name!r}, kind: {kind}}}`"
            )
        raw[name] = str(spec.get("column", name))
        if raw[name] == label:
            raise UserError(f"{path}: field {name!r} is the label column {label!r} itself. Remove it from fields")
        columns.append(Column(name, kind, _bag(f"{path}: field {name!r}", spec, label)))
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
    bag = Bag(**given)
    most = bag.max_length
    if not isinstance(most, int) or isinstance(most, bool) or not 1 <= most <= LONGEST:
        raise UserError(f"{where}: max_length must be a whole number from 1 to {LONGEST}, got {most!r}")
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
