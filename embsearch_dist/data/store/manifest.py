"""``manifest.json`` of a prepared data set: every file with its rows, size and SHA-256, and how it was made.

The same input and options give the same manifest, byte for byte: nothing in it tells a time, a folder, a
machine or how many processes were at work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from embsearch_dist.errors import UserError
from embsearch_dist.files import digest, read_sealed, write_sealed
from embsearch_dist.schema import Schema

MANIFEST = "manifest.json"
FORMAT = 1
AGAIN = "Prepare the data again"
END_BYTES = 1 << 16


def write(directory: Path, schema: Schema, files: dict[str, dict], options: dict[str, object]) -> None:
    """Write the manifest. ``files``: path inside ``directory`` -> rows, bytes, sha256."""
    body = {
        "format": FORMAT,
        "dataset": schema.dataset,
        "fingerprint": schema.fingerprint,
        "options": options,
        "sources": schema.provenance["files"],
        "rows": schema.rows,
        "files": [{"name": n, **_entry(files[n]), "ends": ends(directory / n)} for n in sorted(files)],
    }
    write_sealed(directory / MANIFEST, body)


def _entry(record: dict) -> dict:
    return {key: record[key] for key in ("rows", "bytes", "sha256")}


def ends(path: Path) -> str:
    """SHA-256 of the first and the last 64 KiB of a file, its footer among them: read when a shard is opened, where all
    of it would take too long."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        found.update(file.read(END_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(END_BYTES, size - END_BYTES))
        found.update(file.read(END_BYTES))
    return found.hexdigest()


def identity(directory: Path | str, schema: Schema) -> str:
    """Short hash of what the data are: rows, sizes and SHA-256 of all files as the manifest tells them, vocabulary
    included. It does not depend on where they lie. Without a manifest it is of sizes and :func:`ends` of the shards.

    Raises:
        UserError: a manifest that is not of this schema.json, or cannot be read.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        if path.exists():
            body = read_sealed(path, AGAIN)
            if body["fingerprint"] != schema.fingerprint or body["rows"] != schema.rows:
                raise UserError(f"{path}: of other data than schema.json beside it: other fields or rows. {AGAIN}")
            files = sorted([e["name"], int(e["rows"]), int(e["bytes"]), str(e["sha256"])] for e in body["files"])
        else:
            shards = sorted(directory.glob("*/part-*.parquet"))
            files = [[str(p.relative_to(directory)), p.stat().st_size, ends(p)] for p in shards]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: not a manifest of format {FORMAT} ({e!r}). {AGAIN}") from e
    except OSError as e:
        raise UserError(f"{directory}: cannot be read ({e.strerror}). {AGAIN}") from e
    return hashlib.sha256(json.dumps([schema.fingerprint, schema.rows, files]).encode()).hexdigest()[:16]


class OtherFile(UserError):
    """A file is not the one that the manifest describes."""

    def __init__(self, file: Path, text: str) -> None:
        super().__init__(f"{file}: {text}")
        self.file = file


def compare_ends(directory: Path | str, folder: str) -> None:
    """Compare the files of a split (or of the vocabulary) with the manifest by names, sizes and :func:`ends`.

    Data without a manifest pass; those of an older version, whose manifest has no ends, are compared by size.

    Raises:
        UserError: names the first file that is missing, unknown or another one.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.exists():
        return
    body = read_sealed(path, AGAIN)
    mend = "Copy the data again, or prepare them again"
    try:
        known = {e["name"]: e for e in body["files"] if e["name"].split("/")[0] == folder}
        for name, entry in known.items():
            file = directory / name
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise OtherFile(file, f"{size:,} bytes, {MANIFEST} says {entry['bytes']:,}: another file. {mend}")
            if "ends" in entry and ends(file) != entry["ends"]:
                raise OtherFile(file, f"not the file that {MANIFEST} describes, though as long. {mend}")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(f"{path}: not a manifest of format {FORMAT} ({e!r}). {AGAIN}") from e
    except FileNotFoundError as e:
        raise UserError(f"{e.filename}: missing. {mend}") from e
    except OSError as e:
        raise UserError(f"{e.filename or directory}: cannot be read ({e.strerror}). {mend}") from e
    for file in sorted((directory / folder).glob("part-*.parquet")):
        if f"{folder}/{file.name}" not in known:
            raise UserError(f"{file}: not in {MANIFEST}, so it is not of this data. Remove it")


def verify(directory: Path | str, tick: Callable[[int], None] | None = None) -> tuple[int, int]:
    """Read every file of a prepared data set and compare it with the manifest; gives files and bytes.

    ``tick`` is called with the bytes of each file that was found right.

    Raises:
        UserError: names the first file, in the order of the manifest, that is missing, damaged or
            unknown; or says what else is wrong.
    """
    directory = Path(directory)
    schema = Schema.load(directory)
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{path}: no such file, so nothing can be compared. {AGAIN}")
    body = read_sealed(path, AGAIN)
    try:
        if body["fingerprint"] != schema.fingerprint or body["rows"] != schema.rows:
            raise UserError(f"{directory / 'schema.json'}: its fields or rows are not those of {MANIFEST}. {AGAIN}")
        total = 0
        for entry in body["files"]:
            _compare(directory / entry["name"], entry)
            total += entry["bytes"]
            if tick is not None:
                tick(entry["bytes"])
        known = {entry["name"] for entry in body["files"]}
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: not a manifest of format {FORMAT} ({e!r}). {AGAIN}") from e
    for folder in {name.split("/")[0] for name in known}:
        for file in sorted((directory / folder).iterdir()):
            if f"{folder}/{file.name}" not in known:
                raise UserError(f"{file}: not in {MANIFEST}. Remove it")
    return len(known), total


def _compare(file: Path, entry: dict) -> None:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"{file}: damaged: {size:,} bytes, {MANIFEST} says {entry['bytes']:,}. {AGAIN}")
        found = digest(file)["sha256"]
    except FileNotFoundError as e:
        raise UserError(f"{file}: missing. {AGAIN}") from e
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}). {AGAIN}") from e
    if found != entry["sha256"]:
        raise UserError(f"{file}: damaged: SHA-256 {found}, {MANIFEST} says {entry['sha256']}. {AGAIN}")


def size_of(directory: Path) -> int:
    """Bytes to read for :func:`verify`, for the progress of it; 0 when the manifest cannot tell."""
    try:
        return sum(entry["bytes"] for entry in read_sealed(directory / MANIFEST, AGAIN)["files"])
    except (UserError, KeyError, TypeError):
        return 0


def shards_of(directory: Path | str, split: str) -> tuple[dict[str, dict], int]:
    """What the manifest says of the shards of a split: file name -> rows, bytes, sha256; and rows of a row group.

    Nothing and 0 when there is no manifest, or none that can be read.
    """
    try:
        body = read_sealed(Path(directory) / MANIFEST, AGAIN)
        files = {entry["name"]: _entry(entry) for entry in body["files"]}
        inside = {name.split("/")[1]: entry for name, entry in files.items() if name.split("/")[0] == split}
        return inside, int(body["options"]["row_group_rows"])
    except (UserError, OSError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return {}, 0
