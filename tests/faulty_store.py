"""A store on a folder that fails as it is told: for tests of what is left when an upload or a download is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, LocalFileSystem, PyFileSystem, SubTreeFileSystem

from embsearch_dist.stores import urls


class Faulty(FileSystemHandler):
    """Passes everything on to a folder, and asks ``on`` first: (what, path) -> an error to raise, or None.

    Attributes:
        read: path -> bytes that were read of it so far.
        cut: so many bytes of a file come, or go, before the connection breaks; once for each file that is named.
        old: path -> what a listing says of its size, whatever it is.
    """

    def __init__(self, folder: Path) -> None:
        self.inner: Any = SubTreeFileSystem(str(folder), LocalFileSystem())
        self.on: Callable[[str, str], Exception | None] = lambda what, path: None
        self.read: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.old: dict[str, int] = {}

    def __eq__(self, other: object) -> bool:
        return self is other

    def _ask(self, what: str, path: str) -> None:
        if (error := self.on(what, path)) is not None:
            raise error

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self.inner.get_file_info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        found = self.inner.get_file_info(selector)
        return [FileInfo(i.path, i.type, size=self.old.get(i.path, i.size), mtime_ns=i.mtime_ns) for i in found]

    def create_dir(self, path: str, recursive: bool) -> None:
        self.inner.create_dir(path, recursive=recursive)

    def delete_file(self, path: str) -> None:
        self._ask("delete", path)
        self.inner.delete_file(path)

    def open_input_file(self, path: str) -> pa.PythonFile:
        self._ask("read", path)
        return pa.PythonFile(_Reading(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: object) -> pa.PythonFile:
        self._ask("write", path)
        self.inner.create_dir(path.rpartition("/")[0], recursive=True)  # stores have no folders to make first
        return pa.PythonFile(_Writing(self, path), mode="w")

    def _unused(self, *args: object) -> Any:
        raise NotImplementedError

    copy_file = move = delete_dir = delete_dir_contents = delete_root_dir_contents = _unused
    open_append_stream = open_input_stream = _unused


class _Reading:
    def __init__(self, store: Faulty, path: str) -> None:
        self.store, self.path, self.file = store, path, store.inner.open_input_file(path)
        self.closed = False

    def read(self, n: int = -1) -> bytes:
        data = self.file.read(n)
        if self.path in self.store.cut and len(data) > 0:
            data = data[: self.store.cut.pop(self.path)]
            if not data:
                raise OSError("connection reset (injected)")
            self.store.cut[self.path] = 0
        self.store.read[self.path] = self.store.read.get(self.path, 0) + len(data)
        return data

    def seek(self, place: int, whence: int = 0) -> int:
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()

    def size(self) -> int:
        return self.file.size()

    def close(self) -> None:
        self.closed = True
        self.file.close()


class _Writing:
    def __init__(self, store: Faulty, path: str) -> None:
        self.store, self.path, self.file = store, path, store.inner.open_output_stream(path)
        self.closed = False

    def write(self, data: bytes) -> int:
        if self.path in self.store.cut:
            self.file.write(bytes(data)[: self.store.cut.pop(self.path)])
            raise OSError("connection reset (injected)")
        return self.file.write(bytes(data))

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True
        self.file.close()


def faulty_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """Let every URL lead into a folder: ``s3://bucket/key`` is ``FOLDER/bucket/key``. Tries follow without a pause."""
    handler = Faulty(folder)
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(urls, "_system", lambda scheme, bucket, query: PyFileSystem(handler))
    monkeypatch.setattr(urls, "PAUSES", [0.0, 0.0])
    monkeypatch.setenv("EMBSEARCH_CACHE", str(folder / "cache"))
    return handler
