"""Files: JSON that is whole or absent, with a checksum of its own where it matters; digests; temporary names."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from embsearch_dist import written
from embsearch_dist.errors import UserError, naming

CHUNK = 4 << 20


def digest(path: Path) -> dict[str, object]:
    """Size and SHA-256 of a file."""
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            found.update(data)
            size += len(data)
    return {"bytes": size, "sha256": found.hexdigest()}


def is_whole(path: Path, expected: dict[str, object]) -> bool:
    """Whether a file is there with the size and SHA-256 it should have."""
    try:
        return path.stat().st_size == expected["bytes"] and digest(path)["sha256"] == expected["sha256"]
    except OSError:
        return False


def states(files: Iterable[Path]) -> dict[str, list[int]]:
    """Bytes and time of the last change (ns) of each file, by its path: whether files are still what they were.

    Raises:
        OSError: one is gone; names it.
    """
    return {str(f.resolve()): [(told := f.stat()).st_size, told.st_mtime_ns] for f in files}


def ends_whole(path: Path) -> bool:
    """Whether the last line of a file has its end; a kill or a full disk may have cut it. One without any has."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def temporary(path: Path) -> Path:
    """Where to write what is renamed to ``path`` once it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_json(path: Path, body: object) -> None:
    """Write JSON through a temporary file and a rename: whole or absent. What is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        temporary.write_text(json.dumps(_finite(body), indent=2, allow_nan=False) + "\n")
        temporary.replace(path)


def _finite(body: object) -> object:
    """The same with None for numbers that JSON has no word for: an undefined metric."""
    if isinstance(body, float):
        return body if math.isfinite(body) else None
    if isinstance(body, dict):
        return {key: _finite(value) for key, value in body.items()}
    return [_finite(value) for value in body] if isinstance(body, list | tuple) else body


def sealed(body: dict) -> str:
    """SHA-256 of a JSON object without its key ``sha256``, as it will be read again."""
    plain = json.dumps(_finite({k: v for k, v in body.items() if k != "sha256"}))
    return hashlib.sha256(json.dumps(json.loads(plain), sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, body: dict) -> None:
    """:func:`write_json` with a checksum of the rest in the file, which :func:`read_sealed` compares; inside a run
    directory it is listed there, too (:mod:`embsearch_dist.written`)."""
    checksum = sealed(body)
    with written.listed(path, checksum):
        write_json(path, {**body, "sha256": checksum})


def read_sealed(path: Path, cure: str = "Run search.py again") -> dict:
    """A JSON object that :func:`write_sealed` wrote, without its checksum; or one of an older version or of a person,
    which has none.

    Raises:
        UserError: it was changed since it was written, or is of another run; names the file and what to do.
    """
    try:
        body = read_json(path)
    except UserError as e:
        raise UserError(f"{e}. {cure}") from e
    if "sha256" in body:
        cure = f'{cure}, or, if you changed it on purpose, take its line "sha256" out'
        checksum = body.pop("sha256")
        if checksum != sealed(body):
            raise UserError(f"{path} was changed since it was written: it differs from its own checksum. {cure}")
        written.check(path, checksum, cure)
    return body


def copy_sealed(source: Path, target: Path) -> None:
    """Read a sealed file and write it elsewhere."""
    write_sealed(target, read_sealed(source))


def read_json(path: Path) -> dict:
    """Read a JSON object; a broken file is a ``UserError`` that names it."""
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not valid JSON ({e.msg})") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file ({e.reason} at byte {e.start})") from e
    except OSError as e:  # a directory, a loop of links, no permission
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, or endless brackets
        raise UserError(f"{path}: not valid JSON ({' '.join(str(e).split())[:80]})") from e
    if not isinstance(body, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(body).__name__}")
    return body
