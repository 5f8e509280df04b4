"""``manifest.json`` of a prepared data set: every file with its rows, size and SHA-256, and how it was made.

The same input and options give the same manifest, byte for byte: nothing in it tells a time, a folder, a
machine or how many processes were at work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from embsearch_dist.data.scratch import digest
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Schema, read_json, write_json

MANIFEST = "manifest.json"
FORMAT = 1
AGAIN = "Prepare the data again"


def write(directory: Path, schema: Schema, files: dict[str, dict], options: dict[str, object]) -> None:
    """Write the manifest. ``files``: path inside ``directory`` -> rows, bytes, sha256."""
    body = {
        "format": FORMAT,
        "dataset": schema.dataset,
        "fingerprint": schema.fingerprint,
        "options": options,
        "sources": schema.provenance["files"],
        "rows": schema.rows,
        "files": [{"name": name, **_entry(files[name])} for name in sorted(files)],
    }
    write_json(directory / MANIFEST, body)


def _entry(record: dict) -> dict:
    return {key: record[key] for key in ("rows", "bytes", "sha256")}


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
    body = read_json(path)
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
        return sum(entry["bytes"] for entry in read_json(directory / MANIFEST)["files"])
    except (UserError, KeyError, TypeError):
        return 0


def shards_of(directory: Path | str, split: str) -> tuple[dict[str, dict], int]:
    """What the manifest says of the shards of a split: file name -> rows, bytes, sha256; and rows of a row group.

    Nothing and 0 when there is no manifest, or none that can be read.
    """
    try:
        body = read_json(Path(directory) / MANIFEST)
        files = {entry["name"]: _entry(entry) for entry in body["files"]}
        inside = {name.split("/")[1]: entry for name, entry in files.items() if name.split("/")[0] == split}
        return inside, int(body["options"]["row_group_rows"])
    except (UserError, OSError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return {}, 0
