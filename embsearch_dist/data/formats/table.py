"""A user's own CSV, TSV or Parquet files, described by a YAML source file; see configs/sources/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from embsearch_dist.data.formats import inputs, parquet
from embsearch_dist.data.formats.blocks import Block, Layout, has_rows, parse, read_blocks, read_header
from embsearch_dist.data.formats.columns import Chunk, Reading, Rows, Source
from embsearch_dist.data.formats.source_file import TableSource, read_source_file
from embsearch_dist.data.formats.times import Clock
from embsearch_dist.errors import UserError, nearest_or_all

DELIMITERS = {"csv": ",", "tsv": "\t"}
OTHERS = (",", ";", "\t", "|")
# Bytes of a file, and the rows of them when asked for; of at most so many bytes, if that is given.
_Cut = tuple[int, Callable[[], Rows]]
_Cutter = Callable[[Path, int | None], Iterator[_Cut]]


def table(path: Path) -> Source:
    """Open the data that a YAML source file describes.

    Raises:
        UserError: no or unreadable YAML, unknown or missing key, missing file, unknown column, types that differ
            between files; while reading also bad cells and rows.
    """
    spec = read_source_file(path)
    kept, cut, notes, narrow = _opened(spec, ())

    def read(clock: Clock | None, rows: Callable[[], Rows]) -> pl.DataFrame:
        found = rows()
        assert spec.label is not None
        series = [found.label_of(spec.label)]
        if clock is not None:
            series.append(clock.read(found))
        series += [found.convert(c, spec.raw[c.name]) for c in spec.columns]
        return pl.DataFrame(series)

    def chunks() -> Iterator[Chunk]:
        # A small first block: whoever reads any chunk knows how the first rows of all write their time.
        clock = Clock(spec.time, next(cut(kept[0], 1 << 16))[1]()) if spec.time else None
        for file in kept:
            for consumed, rows in cut(file, None):
                yield Chunk(consumed, partial(read, clock, rows))

    no_time = None if spec.time else f"{path} names no time column; add `time: COLUMN` or use --split random"
    if spec.label is not None and spec.label.threshold is not None:
        notes += (f"label is {spec.label.column} > {spec.label.threshold:g}",)
    recipe = path.read_text(encoding="utf-8")
    fields = [c.name for c in spec.columns if c.kind in ("categorical", "list")]
    coarse = {name: narrow[spec.raw[name]] for name in fields if spec.raw[name] in narrow}
    source = Source(spec.name, spec.columns, kept, chunks, spec.min_count, no_time, notes, recipe, spec.describe())
    return replace(source, coarse=coarse, spelling=spec.spelling)


def unlabelled(spec: TableSource, reading: Reading) -> Source:
    """Open rows that are to be predicted: ``spec`` has neither label nor time.

    Raises:
        UserError: as :func:`table` does.
    """
    spec = replace(spec, columns=tuple(c for c in spec.columns if reading.wants(c)))
    files, cut, notes, _ = _opened(spec, reading.kept)

    def read(rows: Callable[[], Rows]) -> pl.DataFrame:
        found = rows()
        return pl.DataFrame([*(found.convert(c, spec.raw[c.name]) for c in spec.columns), *found.kept(reading.kept)])

    def chunks() -> Iterator[Chunk]:
        for file in files:
            for consumed, rows in cut(file, None):
                yield Chunk(consumed, partial(read, rows))

    return Source(spec.name, spec.columns, files, chunks, notes=notes)


def _opened(
    spec: TableSource, passed: Sequence[str]
) -> tuple[tuple[Path, ...], _Cutter, tuple[str, ...], Mapping[str, float]]:
    """The files that have rows, how each is cut, notes, and columns of floats, see :class:`parquet.Agreed`.

    ``passed``: columns that are read and left as they are.
    """
    files, notes = inputs.expand(spec.path, spec.files, any_name=bool(spec.format or spec.likely))
    kind = spec.format or inputs.format_of(spec.path, files, spec.likely)
    wanted = tuple(dict.fromkeys([*spec.wanted, *passed]))
    uses = (*spec.uses, *((f"--keep {name}", name, "kept") for name in passed))
    coarse: Mapping[str, float] = {}
    if kind == "parquet":
        kept, cut, coarse = _open_parquet(spec, files, uses)
    else:
        kept, cut = _open_text(spec, files, uses, wanted, kind)
    if not kept:
        raise UserError(f"{files[0]}: the file has no rows. Give a file with at least one")
    return kept, cut, notes + tuple(f"{file.name} has no rows" for file in files if file not in kept), coarse


_Uses = Sequence[tuple[str, str, str]]


def _open_parquet(
    spec: TableSource, files: Sequence[Path], uses: _Uses
) -> tuple[tuple[Path, ...], _Cutter, Mapping[str, float]]:
    agreed = parquet.agree(files, uses, partial(_check_names, spec, uses))
    return agreed.files, lambda file, size: parquet.rows_of(agreed, file, spec.spelling), agreed.coarse


def _open_text(
    spec: TableSource, files: Sequence[Path], uses: _Uses, wanted: tuple[str, ...], kind: str
) -> tuple[tuple[Path, ...], _Cutter]:
    delimiter = spec.delimiter or DELIMITERS[kind]
    layouts = {}
    for file in files:
        if len(files) > 1 and not has_rows(file, spec.encoding, delimiter):
            continue
        header = read_header(file, delimiter, spec.encoding, spec.quoted, spec.spelling.trim)
        _check_names(spec, uses, file, header, delimiter)
        layouts[file] = Layout(header, delimiter, header=True, quoted=spec.quoted, encoding=spec.encoding)
    return tuple(layouts), lambda file, size: _text_rows(spec, wanted, file, layouts[file], size)


def _text_rows(
    spec: TableSource, wanted: tuple[str, ...], file: Path, layout: Layout, block_bytes: int | None
) -> Iterator[_Cut]:
    def rows(block: Block) -> Rows:
        return Rows(parse(block, layout, wanted), block.where, spec.spelling)

    for block in read_blocks(file, layout, block_bytes):
        yield block.consumed, partial(rows, block)


def _check_names(spec: TableSource, uses: _Uses, file: Path, names: tuple[str, ...], delimiter: str = "") -> None:
    """Every wanted column is there; else the nearest one, or the delimiter under which it would be."""
    for key, column, _ in uses:
        if column not in names:
            advice = nearest_or_all(column, names)
            if column in (name.strip() for name in names) and delimiter:
                advice = "There are blanks around its name. Write `spaces: trim`"
            better = [d for d in OTHERS if delimiter not in ("", d) and column in _names_by(spec, file, d)]
            folder = next((part for part in file.parts[:-1] if part.startswith(f"{column}=")), "")
            if folder:
                advice = f"Names of folders, as {folder}, are not read as columns. Write it into the files"
            if better:
                shown = "tab" if better[0] == "\t" else better[0]
                advice = f"Its first line is cut by {delimiter!r}. Try `delimiter: {shown!r}`"
            raise UserError(f"{spec.path}: {key}: {file.name} has no column {column!r}. {advice}")


def _names_by(spec: TableSource, file: Path, delimiter: str) -> tuple[str, ...]:
    try:
        return read_header(file, delimiter, spec.encoding, spec.quoted, spec.spelling.trim)
    except UserError:
        return ()
