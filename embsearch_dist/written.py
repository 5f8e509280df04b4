"""What we have written into a run directory: ``written.json`` holds the checksum of every file that is read again.

A file's own checksum tells that it was changed; it does not tell that it was exchanged for that of another run or for
an older one. This list does. Each run directory (each folder with a ``run.lock``) has its own. A file is listed with
the checksum to come before it is replaced, and with that alone afterwards, so a kill at any moment leaves both right.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from embsearch_dist.errors import UserError, naming

LIST = "written.json"
LOCK = "run.lock"
"""The mark of a run directory, see :mod:`embsearch_dist.rundir`."""
_thread = threading.RLock()  # a checkpoint is sealed beside training
_log: list[Path] = []


def log() -> list[Path]:
    """Every file that this process has listed so far, in order."""
    return _log


@contextmanager
def listed(path: Path, checksum: str) -> Iterator[None]:
    """Around the replacing of a file; does nothing outside run directories.

    Raises:
        UserError: the list is damaged.
    """
    home = _above(path, LOCK)
    if home is None:
        yield
        return
    key = str(path.absolute().relative_to(home))
    with _locked(home):
        known = _read(home)
        _write(home, {**known, key: [*known.get(key, [])[-1:], checksum]})
        yield
        _write(home, {**known, key: [checksum]})
        _log.append(path)


@contextmanager
def still(home: Path) -> Iterator[None]:
    """Within, no file of a run directory that is listed is replaced, so that all can be taken as they are together."""
    with _locked(home):
        yield


def check(path: Path, checksum: str, cure: str) -> None:
    """Compare a file's checksum with the list of its run directory, where there is one that knows the file.

    Raises:
        UserError: another file than was written there; names both.
    """
    home = _above(path, LIST)
    if home is None:
        return
    known = _read(home).get(str(path.absolute().relative_to(home)))
    if known and checksum not in known:
        raise UserError(
            f"{path} is not the file that was written there (by {LIST}): it is of another run, or an older one. {cure}"
        )


def knows(path: Path) -> bool:
    """Whether a file is one that was written there."""
    home = _above(path, LIST)
    return home is not None and str(path.absolute().relative_to(home)) in _read(home)


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, for those that carry none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_file(path: Path, cure: str) -> None:
    """:func:`check` of a file that carries no checksum."""
    check(path, file_checksum(path), cure)


def adopt(path: Path, checksum: str) -> None:
    """List a file that lies there already: a copy."""
    with listed(path, checksum):
        pass


def _above(path: Path, name: str) -> Path | None:
    """The nearest folder above ``path`` with an entry of that name."""
    return next((p for p in path.absolute().parents if (p / name).is_file()), None)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Two processes may list files of one run: a training in ``retrain`` leaves ``final.json`` above it."""
    with _thread:
        file = os.open(home, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _read(home: Path) -> dict[str, list[str]]:
    path = home / LIST
    mend = "Delete it: then nothing is compared with it"
    try:
        body = json.loads(path.read_text())
        files = body["files"]
        if body["sha256"] != _seal(files) or not all(isinstance(v, list) for v in files.values()):
            raise UserError(f"{path} was changed since it was written: it differs from its own checksum. {mend}")
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}). {mend}") from e
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({' '.join(str(e).split())[:80]}). {mend}") from e
    return dict(files)


def _write(home: Path, files: dict[str, list[str]]) -> None:
    temporary = home / f"{LIST}.tmp"
    with naming(home / LIST):
        temporary.write_text(json.dumps({"files": files, "sha256": _seal(files)}, indent=1) + "\n")
        temporary.replace(home / LIST)


def _seal(files: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
