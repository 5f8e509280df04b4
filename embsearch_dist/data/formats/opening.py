"""Opening raw files: what a file is, by its first bytes and not by its name, and its text as a stream.

Gzip and zstd are unpacked, UTF-16 with a byte order mark becomes UTF-8, and that of UTF-8 counts more than what the
source file says. What holds no delimited text is refused
with what it is: the advice to try another encoding would lead astray.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from embsearch_dist.errors import UserError

UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
GZIP, ZSTD, PARQUET = "gzip", "zstd", "parquet"
READ = ((b"\x1f\x8b", GZIP), (b"\x28\xb5\x2f\xfd", ZSTD), (b"PAR1", PARQUET))
PDF = b"%PDF-"  # the only kind that goes on as text
UNPACK = "Unpack it and name the files in it"
EXPORT = "Export it as CSV or Parquet"
REFUSED = (
    (b"PK\x03\x04", "a ZIP archive (or an Excel workbook)", UNPACK),
    (b"PK\x05\x06", "an empty ZIP archive", "Fetch it again"),
    (b"BZh", "a bzip2 file", "Unpack it, or pack it with gzip or zstd"),
    (b"\xfd7zXZ\x00", "an xz file", "Unpack it, or pack it with gzip or zstd"),
    (b"\x04\x22\x4d\x18", "an LZ4 file", "Unpack it, or pack it with gzip or zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", EXPORT),
    (b"SQLite format 3", "an SQLite database", EXPORT),
    (b"ARROW1", "an Arrow (Feather) file", "Write it as Parquet"),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"ORC", "an ORC file", EXPORT),
    (b"\x89HDF", "an HDF5 file", EXPORT),
    (PDF, "a PDF", EXPORT),
)
HEAD = 512


def packing(path: Path) -> str:
    """``gzip``, ``zstd`` or ``parquet`` by the first bytes of a file; empty: none of them, so text.

    Raises:
        UserError: it cannot be opened, or is of a kind that is not read (an archive, a workbook, ...).
    """
    with _open(path) as file:
        return _packing(path, file.read(HEAD))


def _packing(path: Path, head: bytes) -> str:
    for magic, what, cure in REFUSED:
        if _begins(head, magic):
            raise UserError(f"{path}: this is {what}. {cure}")
    if head[257:262] == b"ustar" and not _printable(head):
        raise UserError(f"{path}: this is a tar archive. {UNPACK}")
    return next((name for magic, name in READ if _begins(head, magic)), "")


def _begins(head: bytes, magic: bytes) -> bool:
    """Whether a file is of a kind: letters such as ORC and PAR1 may begin a column name, too, but then text follows."""
    return head.startswith(magic) and (magic == PDF or not _printable(head[:16]))


def _printable(head: bytes) -> bool:
    return all(b >= 32 or b in b"\t\r\n" for b in head)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file. Check the path") from e
    except IsADirectoryError as e:
        raise UserError(f"{path}: this is a folder. Give a file") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be opened ({e.strerror}). Check its permissions") from e


class Stream:
    """The bytes of a text file in pieces, unpacked; close it after use.

    Attributes:
        file: the file on disk.
        plain: whether the bytes are those on disk, so that offsets are places in the file.
        encoding: of the bytes that :meth:`read` gives: the given one, or ``utf-8`` for a file with a byte order mark.

    Raises:
        UserError: no such file, or one that holds no text.
    """

    def __init__(self, path: Path, encoding: str = "utf-8") -> None:
        self.path, self.encoding = path, encoding
        self.file = _open(path)
        try:
            kind = _packing(path, self.file.read(HEAD))
            self.file.seek(0)
            if kind == PARQUET:
                raise UserError(f"{path}: this is a Parquet file, not text. Write `format: parquet` for it")
            self._source = self._unpacked(kind)
            self._head = self._piece(HEAD)
            if kind and (inner := _packing(path, self._head)):
                raise UserError(f"{path}: this is a packed {inner} file. Unpack it once")
            self._decoder = self._utf16()
        except BaseException:
            self.file.close()
            raise
        self.plain = not kind and self._decoder is None

    def _unpacked(self, kind: str) -> BinaryIO:
        if kind == GZIP:
            return gzip.GzipFile(fileobj=self.file)  # type: ignore[return-value]
        if kind == ZSTD:
            return pa.CompressedInputStream(pa.PythonFile(self.file, "r"), "zstd")
        return self.file

    def _utf16(self) -> codecs.IncrementalDecoder | None:
        head = self._head
        if head.startswith(UTF32_MARKS) and not head.startswith(UTF16_MARKS[0] + b"\0\0\0\0"):
            raise UserError(f"{self.path}: this is UTF-32 text. Save it as UTF-8")
        if head.startswith(UTF16_MARKS):
            self.encoding = "utf-8"
            return codecs.getincrementaldecoder("utf-16")()
        if head.startswith(UTF8_MARK):
            self.encoding = "utf-8"
        elif self.encoding == "utf-16" and head and b"\0" not in head:
            raise UserError(
                f"{self.path}: this is not UTF-16: it has neither a byte order mark nor zero bytes. If it is UTF-8, "
                "remove `encoding: utf-16` from the source file, or save it with a byte order mark"
            )
        elif (self.encoding == "utf-16" and head) or head.count(b"\0") * 4 > len(head):
            raise UserError(f"{self.path}: UTF-16 without a byte order mark, or no text at all. Save it as UTF-8")
        return None

    def read(self, size: int) -> bytes:
        """At most about ``size`` bytes; empty only at the end of the file."""
        if self._decoder is None:
            return self._next(size)
        while True:
            raw = self._next(size)
            try:
                text = self._decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as e:
                raise UserError(f"{self.path}: not whole UTF-16 text ({e.reason}). Save it as UTF-8") from e
            if text or not raw:
                return text.encode()

    def _next(self, size: int) -> bytes:
        head, self._head = self._head, b""
        if not head:
            return self._piece(size)
        if len(head) < size:
            return head + self._piece(size - len(head))
        self._head = head[size:]
        return head[:size]

    def _piece(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{self.path}: not a whole gzip file ({e}). Fetch it again") from e
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{self.path}: cannot be read ({' '.join(str(e).split())}). Fetch it again") from e

    @property
    def consumed(self) -> int:
        """Bytes on disk read so far."""
        return self.file.tell()

    def close(self) -> None:
        self._source.close()
        self.file.close()
