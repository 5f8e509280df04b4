"""Delimited text as blocks of whole records, checked so that every complaint can name its line.

A CSV engine alone tells neither the line of a short row nor notices one in the middle of a file, so
each block is checked for its column count (a few numpy passes over the bytes) when it is parsed.
Cutting a file into blocks costs little: where no quotes are possible, only the surroundings of the cuts
are looked at, else line ends are sought.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import polars as pl

from embsearch_dist.errors import UserError

T = TypeVar("T")
BLOCK_BYTES = 32 << 20
LONGEST_RECORD = 64 << 20
# MovieLens separates by two characters; CSV engines take one, so it is replaced by one that text never has.
UNIT_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Layout:
    """How a text file is cut into records.

    Attributes:
        columns: names of all columns, in file order.
        separator: one character, or ``::``.
        header: whether the first record names the columns (it is skipped).
        quoted: whether ``"`` protects separators and line ends (doubled inside: RFC 4180).
        encoding: ``utf-8`` or ``latin-1``.
    """

    columns: tuple[str, ...]
    separator: str
    header: bool = False
    quoted: bool = False
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Block:
    """Whole records of one file, perhaps not read from it yet.

    Attributes:
        path: the file.
        load: gives the bytes as in the file, ending in a line end.
        find_line: gives the line number (from 1) of the first record.
        consumed: bytes of the file since the previous block, for progress.
        quoted: see :class:`Layout`.
    """

    path: Path
    load: Callable[[], bytes]
    find_line: Callable[[], int]
    consumed: int
    quoted: bool

    @cached_property
    def data(self) -> bytes:
        return self.load()

    @cached_property
    def ends(self) -> np.ndarray:
        """Offsets in ``data`` of the line ends that end a record."""
        return _record_ends(self.data, self.quoted)

    @cached_property
    def first_line(self) -> int:
        return self.find_line()

    def line(self, record: int) -> int:
        """Line number in the file at which a record of this block begins."""
        start = 0 if record == 0 else int(self.ends[record - 1]) + 1
        return self.first_line + self.data.count(b"\n", 0, start)

    def where(self, record: int) -> str:
        """Where a record is, for a message."""
        return f"{self.path}, line {self.line(record)}"

    def text(self, record: int) -> str:
        """A record as text, shortened for a message."""
        start = 0 if record == 0 else int(self.ends[record - 1]) + 1
        whole = self.data[start : int(self.ends[record])].decode(errors="replace").rstrip("\r")
        return whole if len(whole) <= 60 else whole[:57] + "..."


class _Stream:
    """A plain or gzip file read in pieces; ``consumed`` counts bytes on disk in both cases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
        except FileNotFoundError as e:
            raise UserError(f"{path}: no such file. Check the path") from e
        except OSError as e:
            raise UserError(f"{path}: cannot be opened ({e.strerror}). Check its permissions") from e
        self._source = gzip.GzipFile(fileobj=self.file) if path.suffix == ".gz" else self.file

    def read(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{self.path}: not a whole gzip file ({e}). Fetch it again") from e

    @property
    def consumed(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self._source.close()
        self.file.close()


def read_header(path: Path, separator: str, encoding: str) -> tuple[str, ...]:
    """Column names in the first line of a delimited file.

    Raises:
        UserError: no file, nothing in it, undecodable, or a name that is there twice.
    """
    stream = _Stream(path)
    try:
        start = stream.read(1 << 20)
    finally:
        stream.close()
    if not start.strip():
        raise UserError(f"{path}: the file is empty. Give a file with a header line and rows")
    first = start.split(b"\n", 1)[0]
    try:
        text = first.removeprefix(b"\xef\xbb\xbf").decode(encoding)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line 1: not {encoding} text. {_ENCODING_HINT}") from e
    try:
        names = tuple(next(csv.reader([text.rstrip("\r")], delimiter=separator, strict=True)))
    except csv.Error as e:
        raise UserError(f"{path}, line 1: the header cannot be read ({e}). Put all column names on one line") from e
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{path}, line 1: column {twice[0]!r} is named twice in the header. Rename one of them")
    return names


_ENCODING_HINT = "Save it as UTF-8, or write `encoding: latin-1` in the source file"


def read_blocks(path: Path, layout: Layout, block_bytes: int | None = None) -> Iterator[Block]:
    """Blocks of whole records of one file, in file order; blank lines at its end are dropped.

    They depend on the file and ``block_bytes`` alone. What is inside them, :func:`parse` checks.

    Raises:
        UserError: missing or empty file, broken gzip, a quote that is never closed (with the line number).
    """
    size = block_bytes or BLOCK_BYTES
    if not layout.quoted and path.suffix != ".gz":
        yield from _seek_blocks(path, layout, size)
        return
    stream = _Stream(path)
    try:
        yield from _read_blocks(stream, layout, size)
    finally:
        stream.close()


def _seek_blocks(path: Path, layout: Layout, block_bytes: int) -> Iterator[Block]:
    """Blocks of a file in which every line end ends a record: found by looking around the cuts alone."""
    stream = _Stream(path)
    try:
        file = stream.file
        size = file.seek(0, os.SEEK_END)
        start = 3 if _at(file, 0, 3) == b"\xef\xbb\xbf" else 0
        stop = size
        while stop > start and _at(file, stop - 1, 1) in (b"\r", b"\n"):
            stop -= 1
        if layout.header:
            start = min(_behind_line_end(path, file, start, stop), stop)
        if start == stop:
            raise UserError(f"{path}: the file has no rows. Give a file with at least one")
        while start < stop:
            end = _behind_line_end(path, file, start + block_bytes, stop)
            yield Block(path, partial(_load, path, start, end), partial(_line_at, path, start), end - start, False)
            start = end
    finally:
        stream.close()


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _behind_line_end(path: Path, file: BinaryIO, offset: int, stop: int) -> int:
    """The first offset behind a line end at ``offset`` or later; ``stop`` when there is none before it."""
    begin = offset
    while offset < stop:
        data = _at(file, offset, min(1 << 16, stop - offset))
        found = data.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(data)
        if offset - begin > LONGEST_RECORD:
            raise UserError(
                f"{path}, line {_line_at(path, begin)}: no end of the row within {LONGEST_RECORD >> 20} MiB. "
                "Look for a file that is not text"
            )
    return stop


def _load(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        data = _at(file, start, stop - start)
    if len(data) < stop - start:
        raise UserError(f"{path}: it became shorter while it was read. Start again when it is whole")
    return data if data.endswith(b"\n") else data + b"\n"


def _line_at(path: Path, offset: int) -> int:
    """Line number at an offset. It goes through all that is before, so only a complaint asks for it."""
    line = 1
    with path.open("rb") as file:
        while offset > 0 and (data := file.read(min(offset, 4 << 20))):
            line, offset = line + data.count(b"\n"), offset - len(data)
    return line


def _read_blocks(stream: _Stream, layout: Layout, block_bytes: int) -> Iterator[Block]:
    path = stream.path
    carry, line, consumed, empty = b"", 1, 0, True
    skip_header, start_of_file, end_of_file = layout.header, True, False
    while not end_of_file:
        piece = stream.read(block_bytes)
        end_of_file = not piece
        data = carry + piece
        if start_of_file:
            data, start_of_file = data.removeprefix(b"\xef\xbb\xbf"), False
        if end_of_file:
            data = data.rstrip(b"\r\n")
            if not data:
                break
            data += b"\n"
        # Without a quote in sight every line end ends a record, and the bytes need not be gone through.
        ends = _record_ends(data, True) if layout.quoted and b'"' in data else None
        last_end = data.rfind(b"\n") if ends is None else int(ends[-1]) if len(ends) else -1
        if last_end < 0 or (end_of_file and last_end != len(data) - 1):
            last = line + data.count(b"\n", 0, last_end + 1)
            if end_of_file:
                raise UserError(f'{path}, line {last}: a quote (") opens here and is never closed. Close or double it')
            if len(data) > LONGEST_RECORD:
                raise UserError(
                    f"{path}, line {last}: no end of the row within {len(data) >> 20} MiB. "
                    "Look for a quote that is not closed, or for a file that is not text"
                )
            carry = data
            continue
        if not end_of_file:
            # Blank lines may be the end of the file: they wait until something follows them.
            solid = len(data.rstrip(b"\r\n"))
            if solid == 0:
                carry = data
                continue
            if ends is None:
                behind = data.find(b"\n", solid)
            else:
                place = int(np.searchsorted(ends, solid))
                behind = int(ends[place]) if place < len(ends) else -1
            last_end = behind if behind >= 0 else last_end
        cut = last_end + 1
        carry, data = data[cut:], data[:cut]
        next_line = line + data.count(b"\n")
        if skip_header:
            skip_header = False
            first = (data.find(b"\n") if ends is None else int(ends[0])) + 1
            line += data.count(b"\n", 0, first)
            data = data[first:]
        if data:
            yield Block(path, partial(_same, data), partial(_same, line), stream.consumed - consumed, layout.quoted)
            consumed = stream.consumed
            empty = False
        line = next_line
    if empty:
        raise UserError(f"{path}: the file has no rows. Give a file with at least one")


def _same(x: T) -> T:
    return x


def _record_ends(data: bytes, quoted: bool) -> np.ndarray:
    """Offsets of line ends outside quotes; ``data`` begins at a record."""
    view = np.frombuffer(data, dtype=np.uint8)
    ends = view == ord("\n")
    if quoted and b'"' in data:
        ends &= ~np.logical_xor.accumulate(view == ord('"'))
    return np.flatnonzero(ends)


def _as_utf8(block: Block, encoding: str) -> bytes:
    data = block.data
    if data.isascii():
        return data
    if encoding == "latin-1":
        return data.decode("latin-1").encode()
    try:
        data.decode()
    except UnicodeDecodeError as e:
        line, byte = block.first_line + data.count(b"\n", 0, e.start), data[e.start]
        raise UserError(f"{block.path}, line {line}: byte 0x{byte:02x} is not UTF-8 text. {_ENCODING_HINT}") from e
    return data


def _check_columns(block: Block, data: bytes, ends: np.ndarray, layout: Layout) -> None:
    """Every record of ``data`` (the block in UTF-8 with one-byte separators) has all columns and no more."""
    separator = layout.separator if len(layout.separator) == 1 else UNIT_SEPARATOR
    view = np.frombuffer(data, dtype=np.uint8)
    separators = view == ord(separator)
    if layout.quoted and b'"' in data:
        separators &= ~np.logical_xor.accumulate(view == ord('"'))
    places, wanted = np.flatnonzero(separators), len(layout.columns) - 1
    if len(places) == wanted * len(ends):
        # Right when the first and the last separator that a record should have lie inside it.
        if wanted == 0:
            return
        first, last = places[::wanted], places[wanted - 1 :: wanted]
        if (last < ends).all() and (first[1:] > ends[:-1]).all():
            return
    # Separators before each record's end; their differences are the separators of each record.
    before = np.searchsorted(places, ends)
    found = np.diff(before, prepend=0) + 1
    record = int((found != len(layout.columns)).argmax())
    where = block.where(record)
    if not block.text(record).strip():
        raise UserError(f"{where}: the line is blank. Remove it")
    shown = {"\t": "tab", ",": "comma"}.get(layout.separator, repr(layout.separator))
    raise UserError(
        f"{where}: {found[record]} columns (separator: {shown}), expected {len(layout.columns)}. "
        f"Fix or remove that line; it begins: {block.text(record)!r}"
    )


def parse(block: Block, layout: Layout, wanted: tuple[str, ...] | None = None) -> pl.DataFrame:
    """The block as string columns (an empty cell is null), in file order; only ``wanted`` ones if given.

    Raises:
        UserError: a record with the wrong number of columns, bytes that are not text in
            ``layout.encoding``, quoting that cannot be read; all with the line number.
    """
    separator = layout.separator if len(layout.separator) == 1 else UNIT_SEPARATOR
    data = _as_utf8(block, layout.encoding)
    if separator != layout.separator:
        data = data.replace(layout.separator.encode(), separator.encode())
    ends = block.ends if data is block.data else _record_ends(data, layout.quoted)
    _check_columns(block, data, ends, layout)
    try:
        frame = pl.read_csv(
            io.BytesIO(data),
            has_header=False,
            separator=separator,
            quote_char='"' if layout.quoted else None,
            schema=dict.fromkeys(layout.columns, pl.String),
            columns=[layout.columns.index(n) for n in wanted] if wanted else None,
            infer_schema=False,
        )
    except pl.exceptions.PolarsError as e:
        raise UserError(f"{_lines(block)}: cannot be read as delimited text ({e}). Check the quotes there") from e
    if frame.height != len(ends):
        raise UserError(f"{_lines(block)}: the quotes can be read in two ways. Double every quote inside a quoted cell")
    return frame


def _lines(block: Block) -> str:
    return f"{block.path}, lines {block.first_line} to {block.line(len(block.ends) - 1)}"
