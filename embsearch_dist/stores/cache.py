"""The folder of fetched files on this machine: where it is, who may write there, and files that come in pieces."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embsearch_dist import lockfile
from embsearch_dist.errors import UserError
from embsearch_dist.files import digest
from embsearch_dist.stores.urls import Store

VARIABLE = "EMBSEARCH_CACHE"
SPARE = 1.02  # of the bytes to come, that must be free


def cache_home() -> Path:
    """``$EMBSEARCH_CACHE``, else ``embsearch_dist`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    told = os.environ.get(VARIABLE)
    if told:
        return Path(told).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embsearch_dist"


@contextmanager
def alone(path: Path, doing: str) -> Iterator[None]:
    """Hold a lock file for the block; who comes later waits, and finds what the block has made.

    The kernel drops the lock of whoever dies. Where the file system knows no locks nobody waits.

    Raises:
        UserError: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as e:
        raise UserError(
            f"{e.filename or path}: cannot be written ({e.strerror}). Set {VARIABLE} to a folder that can"
        ) from e
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        lockfile.sign(file, doing)
        yield
    finally:
        os.close(file)


def check_room(folder: Path, need: int, have: int = 0) -> None:
    """Raise ``UserError`` where the disk has no room for what is to come: ``need`` bytes, of which some are there."""
    free = shutil.disk_usage(folder).free
    if (need - have) * SPARE > free:
        raise UserError(
            f"{folder}: {need - have:,} bytes are to come, {free:,} are free there. Free some, or set {VARIABLE} to a "
            "larger disk"
        )


def bring(store: Store, name: str, target: Path, size: int, sha256: str = "") -> None:
    """Fetch an object into a file that appears whole: of that size and, where it is told, that SHA-256.

    A cut one is continued by the next call. Bytes that are wrong are fetched once more from the beginning, since the
    beginning may be of another file.

    Raises:
        StoreError: the store fails, or (``OtherSize``) has an object of another size.
        UserError: the bytes are not those that were told; names the object.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    found = ""
    for _ in range(2):
        try:
            store.fetch(name, part, size)
            found = str(digest(part)["sha256"])
        except OSError as e:  # of this machine's disk; the store's are told by itself
            raise UserError(f"{part}: cannot be written ({e.strerror or e}). Check the disk and its room") from e
        if not sha256 or found == sha256:
            part.replace(target)
            return
        part.unlink()
    raise WrongBytes(f"{store.at(name)}: SHA-256 {found[:16]}..., expected {sha256[:16]}...")


class WrongBytes(UserError):
    """An object is not the one that a list of files describes."""
