"""Delimited text as blocks of whole records, checked so that every complaint can name its line.

A CSV engine alone tells neither the line of a short row nor notices one in the middle of a file, so
each block is checked for its column count (a few numpy passes over the bytes) when it is parsed.
Cutting a file into blocks costs little: where no quotes are possible, only the surroundings of the cuts
are looked at, else line ends are sought.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import polars as pl

from embsearch_dist.data.formats.opening import UTF8_MARK, Stream
from embsearch_dist.data.formats.quotes import LINE_END, Records, count, last_end
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
        encoding: of the bytes.
    """

    path: Path
    load: Callable[[], bytes]
    find_line: Callable[[], int]
    consumed: int
    quoted: bool
    encoding: str

    @cached_property
    def data(self) -> bytes:
        return self.load()

    @cached_property
    def records(self) -> Records:
        return Records(self.data, self.quoted)

    @property
    def ends(self) -> np.ndarray:
        """Offsets in ``data`` of the line ends that end a record."""
        return self.records.ends

    @cached_property
    def first_line(self) -> int:
        return self.find_line()

    def line(self, record: int) -> int:
        """Line number in the file at which a record of this block begins."""
        return self.line_at(0 if record == 0 else int(self.ends[record - 1]) + 1)

    def line_at(self, offset: int) -> int:
        """Line number in the file at an offset in ``data``."""
        return self.first_line + count(self.data, LINE_END, offset)

    def where(self, record: int) -> str:
        """Where a record is, for a message."""
        return f"{self.path}, line {self.line(record)}"

    def text(self, record: int) -> str:
        """A record as text, shortened for a message."""
        start = 0 if record == 0 else int(self.ends[record - 1]) + 1
        whole = self.data[start : int(self.ends[record])].decode(errors="replace").rstrip("\r")
        return whole if len(whole) <= 60 else whole[:57] + "..."


def read_header(path: Path, separator: str, encoding: str, quoted: bool = True, trim: bool = False) -> tuple[str, ...]:
    """Column names in the first line of a delimited file; ``trim``: without the blanks around them.

    Raises:
        UserError: no file, nothing in it, undecodable, or a name that is there twice.
    """
    start, encoding = read_start(path, encoding)
    if not start.strip():
        raise UserError(f"{path}: the file is empty. Give a file with a header line and rows")
    first = start.split(b"\n", 1)[0].removesuffix(b"\r")
    try:
        text = first.decode(encoding)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line 1: not {encoding} text. {_ENCODING_HINT}") from e
    if b"\r" in first and (not quoted or Records(first, quoted).lone_return() is not None):
        raise UserError(f"{path}, line 1: {_LONE_RETURN}")
    if quoted and (offence := Records(first, quoted).offence(separator)):
        raise UserError(f"{path}, line 1: {offence[1]}. {_QUOTES_HINT}")
    try:
        names = tuple(next(csv.reader([text], delimiter=separator, strict=True)) if quoted else text.split(separator))
    except csv.Error as e:
        raise UserError(f"{path}, line 1: the header cannot be read ({e}). Put all column names on one line") from e
    names = tuple(n.strip() for n in names) if trim else names
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{path}, line 1: column {twice[0]!r} is named twice in the header. Rename one of them")
    return names


def read_start(path: Path, encoding: str) -> tuple[bytes, str]:
    """The first MiB of a text file without a byte order mark, and the encoding that it has."""
    stream = Stream(path, encoding)
    try:
        return stream.read(1 << 20).removeprefix(UTF8_MARK), stream.encoding
    finally:
        stream.close()


def has_rows(path: Path, encoding: str, separator: str) -> bool:
    """Whether anything but line ends follows the header; blanks and tabs may be cells, and of one column line ends."""
    start, _ = read_start(path, encoding)
    header, _, rest = start.lstrip(b"\r\n").partition(b"\n")
    cells = rest if separator.encode() not in header else rest.strip(b"\r\n")
    return bool(cells) or len(start) > 1 << 19


_ENCODING_HINT = "Save it as UTF-8, or write `encoding: latin-1` in the source file"
_QUOTES_HINT = 'Double the quotes inside a quoted cell (""), or write `quotes: none` where they are plain text'
_LONE_RETURN = "a carriage return without a line feed. End lines by LF or CR LF, or quote the cell that holds it"


def read_blocks(path: Path, layout: Layout, block_bytes: int | None = None) -> Iterator[Block]:
    """Blocks of whole records of one file, in file order; blank lines at its end are dropped.

    They depend on the file and ``block_bytes`` alone. What is inside them, :func:`parse` checks.

    Raises:
        UserError: missing or empty file, broken gzip, a quote that is never closed (with the line number).
    """
    size = block_bytes or BLOCK_BYTES
    stream = Stream(path, layout.encoding)
    try:
        if stream.plain and not layout.quoted:
            yield from _seek_blocks(stream, layout, size)
        else:
            yield from _read_blocks(stream, layout, size)
    finally:
        stream.close()


def _seek_blocks(stream: Stream, layout: Layout, block_bytes: int) -> Iterator[Block]:
    """Blocks of a file in which every line end ends a record: found by looking around the cuts alone."""
    path, file = stream.path, stream.file
    size = file.seek(0, os.SEEK_END)
    start = 3 if _at(file, 0, 3) == UTF8_MARK else 0
    stop = size
    while stop > start and _at(file, stop - 1, 1) in (b"\r", b"\n"):
        stop -= 1
    _check_end(path, layout, _at(file, stop, size - stop), 1)
    if layout.header:
        start = min(_behind_line_end(path, file, start, stop), stop)
    if start == stop:
        raise UserError(f"{path}: the file has no rows. Give a file with at least one")
    while start < stop:
        end = _behind_line_end(path, file, start + block_bytes, stop)
        load, line = partial(_load, path, start, end), partial(_line_at, path, start)
        yield Block(path, load, line, end - start, False, stream.encoding)
        start = end


def _check_end(path: Path, layout: Layout, tail: bytes, own: int) -> None:
    """Refuse blank lines at the end of a file where they may be rows; ``own``: line ends of what is before them."""
    if len(layout.columns) == 1 and tail.count(b"\n") > own:
        told = "it has one column, so a blank line at its end may be a missing value or nothing"
        raise UserError(f'{path}: {told}. Remove the line, or write "" in it')


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


def _read_blocks(stream: Stream, layout: Layout, block_bytes: int) -> Iterator[Block]:
    path, quoted = stream.path, layout.quoted
    carry, line, consumed, empty = b"", 1, 0, True
    skip_header, start_of_file, end_of_file = layout.header, True, False
    while not end_of_file:
        piece = stream.read(block_bytes)
        end_of_file = not piece
        data = carry + piece
        if start_of_file:
            data, start_of_file = data.removeprefix(UTF8_MARK), False
        if end_of_file:
            whole, data = data, data.rstrip(b"\r\n")
            _check_end(path, layout, whole[len(data) :], 1 if data else 0)
            if not data:
                break
            data += b"\n"
        cut = _cut(data, quoted, end_of_file)
        if end_of_file and cut < len(data):
            raise _never_closed(path, data, line, layout)
        if cut == 0:
            if len(data) > LONGEST_RECORD:
                raise _too_long(path, data, line, layout)
            carry = data
            continue
        carry, data = data[cut:], data[:cut]
        next_line = line + count(data, LINE_END)
        if skip_header:
            skip_header = False
            data, line = data[data.find(b"\n") + 1 :], line + 1
        if data:
            load, find_line = partial(_same, data), partial(_same, line)
            yield Block(path, load, find_line, stream.consumed - consumed, quoted, stream.encoding)
            consumed = stream.consumed
            empty = False
        line = next_line
    if empty:
        raise UserError(f"{path}: the file has no rows. Give a file with at least one")


def _cut(data: bytes, quoted: bool, end_of_file: bool) -> int:
    """How many bytes are whole records. Blank lines may be the end of the file: they wait for what follows them."""
    if end_of_file:
        return last_end(data, quoted) + 1
    # The end alone is looked at first: stripping copies what it keeps.
    tail = data[-4096:].rstrip(b"\r\n")
    solid = max(len(data) - 4096, 0) + len(tail) if tail else len(data.rstrip(b"\r\n"))
    if solid == 0:
        return 0
    behind = data.find(b"\n", solid) + 1
    return last_end(data[:behind] if 0 < behind < len(data) else data, quoted) + 1


def _never_closed(path: Path, data: bytes, line: int, layout: Layout) -> UserError:
    records = Records(data, layout.quoted)
    _refuse_quotes(path, records, line, layout)
    line += count(data, LINE_END, int(records.starts[-1]))
    return UserError(f'{path}, line {line}: a quote (") opens here and is never closed. Close or double it')


def _too_long(path: Path, data: bytes, line: int, layout: Layout) -> UserError:
    _refuse_quotes(path, Records(data, layout.quoted), line, layout)
    return UserError(
        f"{path}, line {line}: no end of the row within {len(data) >> 20} MiB. "
        "Look for a quote that is not closed, or for a file that is not text"
    )


def _refuse_quotes(path: Path, records: Records, first_line: int, layout: Layout) -> None:
    """Complain about the first quote that is not allowed where it stands."""
    if records.quoted and (found := records.offence(layout.separator)):
        line = first_line + count(records.data, LINE_END, found[0])
        raise UserError(f"{path}, line {line}: {found[1]}. {_QUOTES_HINT}")


def _same(x: T) -> T:
    return x


def _as_utf8(block: Block) -> bytes:
    data = block.data
    if data.isascii():
        return data
    if block.encoding == "latin-1":
        return data.decode("latin-1").encode()
    try:
        data.decode()
    except UnicodeDecodeError as e:
        line, byte = block.first_line + data.count(b"\n", 0, e.start), data[e.start]
        raise UserError(f"{block.path}, line {line}: byte 0x{byte:02x} is not UTF-8 text. {_ENCODING_HINT}") from e
    return data


def _check_columns(block: Block, records: Records, layout: Layout) -> None:
    """Every one of ``records`` (the block in UTF-8 with one-byte separators) has all columns and no more."""
    separator = layout.separator if len(layout.separator) == 1 else UNIT_SEPARATOR
    places, ends, wanted = records.outside(ord(separator)), records.ends, len(layout.columns) - 1
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
    data = _as_utf8(block)
    if separator != layout.separator:
        data = data.replace(layout.separator.encode(), separator.encode())
    records = block.records if data is block.data else Records(data, layout.quoted)
    if layout.quoted:
        _refuse_quotes(block.path, records, block.first_line, layout)
        if (place := records.lone_return()) is not None:
            line = block.first_line + count(data, LINE_END, place)
            raise UserError(f"{block.path}, line {line}: {_LONE_RETURN}")
    _check_columns(block, records, layout)
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
    if frame.height != len(records.ends):
        raise UserError(f"{_lines(block)}: {len(records.ends)} rows, but {frame.height} were read. Check them")
    return frame


def _lines(block: Block) -> str:
    return f"{block.path}, lines {block.first_line} to {block.line(len(block.ends) - 1)}"
