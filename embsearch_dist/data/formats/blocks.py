"""Delimited text as checked blocks of whole records, so that every complaint can name its line.

A CSV engine alone tells neither the line of a short row nor notices one in the middle of a file, so
each block is checked for its column count (a few numpy passes over the bytes) before it is parsed.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from embsearch_dist.errors import UserError

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
    """Whole records of one file.

    Attributes:
        path: the file.
        data: UTF-8 bytes, one-byte separators, ending in a line end.
        ends: offsets in ``data`` of the line ends that end a record.
        first_line: line number (from 1) of the first record.
        consumed: bytes of the file read since the previous block, for progress.
    """

    path: Path
    data: bytes
    ends: np.ndarray
    first_line: int
    consumed: int

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
            self._file = path.open("rb")
        except FileNotFoundError as e:
            raise UserError(f"{path}: no such file. Check the path") from e
        except OSError as e:
            raise UserError(f"{path}: cannot be opened ({e.strerror}). Check its permissions") from e
        self._source = gzip.GzipFile(fileobj=self._file) if path.suffix == ".gz" else self._file

    def read(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{self.path}: not a whole gzip file ({e}). Fetch it again") from e

    @property
    def consumed(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._source.close()
        self._file.close()


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


def read_blocks(path: Path, layout: Layout, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Blocks of whole, checked records of one file, in file order; blank lines at its end are dropped.

    Raises:
        UserError: missing or empty file, broken gzip, a record with the wrong number of columns, a quote
            that is never closed, bytes that are not text in ``layout.encoding``; all with the line number.
    """
    stream = _Stream(path)
    try:
        yield from _read_blocks(stream, layout, block_bytes)
    finally:
        stream.close()


def _read_blocks(stream: _Stream, layout: Layout, block_bytes: int) -> Iterator[Block]:
    path = stream.path
    carry, line, consumed, records = b"", 1, 0, 0
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
        ends = _record_ends(data, layout.quoted)
        if len(ends) == 0 or (end_of_file and ends[-1] != len(data) - 1):
            last = line if len(ends) == 0 else line + data.count(b"\n", 0, int(ends[-1]) + 1)
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
            ends = ends[: int(np.searchsorted(ends, solid)) + 1] if solid else ends[:0]
            if len(ends) == 0:
                carry = data
                continue
        cut = int(ends[-1]) + 1
        carry, data = data[cut:], data[:cut]
        next_line = line + data.count(b"\n")
        if skip_header:
            skip_header = False
            first = int(ends[0]) + 1
            line += data.count(b"\n", 0, first)
            data, ends = data[first:], ends[1:] - first
        if len(ends):
            text = _as_utf8(path, data, layout.encoding, line)
            if text is not data or len(layout.separator) > 1:
                if len(layout.separator) > 1:
                    text = text.replace(layout.separator.encode(), UNIT_SEPARATOR.encode())
                ends = _record_ends(text, layout.quoted)
            block = Block(path, text, ends, line, stream.consumed - consumed)
            _check_columns(block, layout)
            consumed = stream.consumed
            records += len(ends)
            yield block
        line = next_line
    if records == 0:
        raise UserError(f"{path}: the file has no rows. Give a file with at least one")


def _record_ends(data: bytes, quoted: bool) -> np.ndarray:
    """Offsets of line ends outside quotes; ``data`` begins at a record."""
    view = np.frombuffer(data, dtype=np.uint8)
    ends = view == ord("\n")
    if quoted and b'"' in data:
        ends &= ~np.logical_xor.accumulate(view == ord('"'))
    return np.flatnonzero(ends)


def _as_utf8(path: Path, data: bytes, encoding: str, first_line: int) -> bytes:
    if data.isascii():
        return data
    if encoding == "latin-1":
        return data.decode("latin-1").encode()
    try:
        data.decode()
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise UserError(f"{path}, line {line}: byte 0x{data[e.start]:02x} is not UTF-8 text. {_ENCODING_HINT}") from e
    return data


def _check_columns(block: Block, layout: Layout) -> None:
    separator = layout.separator if len(layout.separator) == 1 else UNIT_SEPARATOR
    view = np.frombuffer(block.data, dtype=np.uint8)
    separators = view == ord(separator)
    if layout.quoted and b'"' in block.data:
        separators &= ~np.logical_xor.accumulate(view == ord('"'))
    # Separators before each record's end; their differences are the separators of each record.
    before = np.searchsorted(np.flatnonzero(separators), block.ends)
    found = np.diff(before, prepend=0) + 1
    wrong = np.flatnonzero(found != len(layout.columns))
    if len(wrong) == 0:
        return
    record = int(wrong[0])
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
        UserError: the quoting of the block cannot be read.
    """
    separator = layout.separator if len(layout.separator) == 1 else UNIT_SEPARATOR
    lines = f"{block.path}, lines {block.first_line} to {block.line(len(block.ends) - 1)}"
    try:
        frame = pl.read_csv(
            io.BytesIO(block.data),
            has_header=False,
            separator=separator,
            quote_char='"' if layout.quoted else None,
            schema=dict.fromkeys(layout.columns, pl.String),
            columns=[layout.columns.index(n) for n in wanted] if wanted else None,
            infer_schema=False,
        )
    except pl.exceptions.PolarsError as e:
        raise UserError(f"{lines}: cannot be read as delimited text ({e}). Check the quotes there") from e
    if frame.height != len(block.ends):
        raise UserError(f"{lines}: the quotes can be read in two ways. Double every quote inside a quoted cell")
    return frame
