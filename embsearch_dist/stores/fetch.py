"""A prepared data set in an object store -> a folder of this machine, compared with its manifest.json.

The folder is named by the URL and by the manifest: when the data set is replaced, another one is fetched. It appears
whole; until then ``NAME.partial`` keeps what has come, and the next start continues.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from embsearch_dist.data.store.manifest import MANIFEST, ends
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.stores.cache import WrongBytes, alone, bring, cache_home, check_room
from embsearch_dist.stores.urls import Missing, OtherSize, Store, StoreError, local_folder

AT_ONCE = 4
SCHEMA = "schema.json"
BESIDE = ("truth.json", "populations")  # of made-up data: in no manifest, and nothing is trained on them
UPLOAD = "Upload the data set again, manifest.json last"
LINE_S = 10.0


def fetch_prepared(url: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of this machine that holds the prepared data set of a URL; fetched where it is not there yet.

    Processes of one machine may call this at once: one fetches, the others wait for it.

    Args:
        say: shows a line to the user.

    Raises:
        UserError: the store fails, there is no prepared data set, a file is missing, cut or another one than
            manifest.json says, or the disk is full. What has come stays for the next try.
    """
    store = Store(url)
    try:
        told = store.read(MANIFEST)
    except Missing as e:
        raise UserError(
            f"{url}: no {MANIFEST} there, so it is no prepared data set, or not a whole one. Check the URL. {UPLOAD}"
        ) from e
    key = hashlib.sha256(store.at("").encode() + b"\0" + told).hexdigest()[:16]
    folder = cache_home() / "data" / f"{Path(store.path).name}-{key}"
    with alone(folder.with_name(f"{folder.name}.lock"), "fetch"):
        if not _is_there(folder, told):
            _fetch(store, told, folder, say)
    return folder


def fetch_schema(url: str) -> Path:
    """A folder of this machine with nothing but the schema.json of a prepared data set, for who needs no rows.

    Raises:
        UserError: the store fails, or there is none.
    """
    if (here := local_folder(url)) is not None:
        return here
    store = Store(url)
    folder = cache_home() / "schema" / hashlib.sha256(store.at("").encode()).hexdigest()[:16]
    with alone(folder.with_name(f"{folder.name}.lock"), "plan"):
        folder.mkdir(parents=True, exist_ok=True)
        _bring_schema(store, folder)
    return folder


def _is_there(folder: Path, told: bytes) -> bool:
    """Whether the folder is whole: every file with the size and the ends that the manifest tells. One that is damaged
    goes back to being fetched, with all that is whole in it."""
    if not folder.exists():
        return False
    try:
        whole = (folder / MANIFEST).read_bytes() == told
        for entry in json.loads(told)["files"] if whole else ():
            file = folder / entry["name"]
            if file.stat().st_size != entry["bytes"] or ends(file) != entry.get("ends", ends(file)):
                file.unlink()
                whole = False
    except OSError:
        whole = False
    if not whole:
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
    return whole


def _fetch(store: Store, told: bytes, folder: Path, say: Callable[[str], None]) -> None:
    partial = _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / MANIFEST).write_bytes(told)
    files = _files(partial, store)
    _bring_schema(store, partial)
    missing = [f for f in files if not _has(partial / f["name"], f)]
    size = sum(f["bytes"] for f in missing)
    parts = (partial / f"{f['name']}.part" for f in missing)
    check_room(partial, size, sum(p.stat().st_size for p in parts if p.exists()))
    say(f"fetching {store.at('')}: {len(missing)} of {len(files)} files, {size / 1e6:,.1f} MB, into {folder}")
    _bring_all(store, partial, missing, say)
    for name in BESIDE:
        found = store.find(name)
        for entry in [found] if found else store.list(name):
            inner = name if found else f"{name}/{entry.name}"
            bring(store, inner, partial / inner, entry.size)
    partial.rename(folder)


def _files(partial: Path, store: Store) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of all files in the manifest.

    Raises:
        UserError: it is damaged, or names a place outside the folder.
    """
    where = store.at(MANIFEST)
    try:
        body = read_sealed(partial / MANIFEST)
        keys: dict[str, type] = {"name": str, "bytes": int, "sha256": str}
        files: list[dict[str, Any]] = [{key: kind(e[key]) for key, kind in keys.items()} for e in body["files"]]
    except UserError as e:
        raise UserError(f"{where}: damaged or cut ({str(e).split('. ')[0]}). {UPLOAD}") from e
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where}: not a manifest ({e!r}). {UPLOAD}") from e
    for entry in files:
        if not (partial / entry["name"]).resolve().is_relative_to(partial.resolve()):
            raise UserError(f"{where}: names {entry['name']!r}, which lies outside the data set. {UPLOAD}")
    return files


def _has(path: Path, entry: dict[str, Any]) -> bool:
    """A file has its name only once it was compared with its SHA-256."""
    return path.exists() and path.stat().st_size == entry["bytes"]


def _bring_schema(store: Store, partial: Path) -> None:
    """schema.json, which carries a checksum of its own; who reads it compares it with the manifest."""
    try:
        (partial / SCHEMA).write_bytes(store.read(SCHEMA))
        read_sealed(partial / SCHEMA)
    except Missing as e:
        raise UserError(f"{store.at(SCHEMA)}: missing, so the data set is not whole. {UPLOAD}") from e
    except StoreError:
        raise
    except UserError as e:
        raise UserError(f"{store.at(SCHEMA)}: damaged or cut ({str(e).split('. ')[0]}). {UPLOAD}") from e


def _bring_all(store: Store, partial: Path, files: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Several at once; the first error ends all."""
    done, started, shown = 0, time.monotonic(), time.monotonic()
    total = sum(f["bytes"] for f in files)

    def one(entry: dict[str, Any]) -> int:
        try:
            bring(store, entry["name"], partial / entry["name"], entry["bytes"], entry["sha256"])
        except Missing as e:
            raise UserError(f"{store.at(entry['name'])}: missing, {MANIFEST} names it. {UPLOAD}") from e
        except WrongBytes as e:
            raise UserError(f"{e} by {MANIFEST}: wrong bytes, or of another preparation. {UPLOAD}") from e
        except OtherSize as e:
            raise UserError(f"{e}; {MANIFEST} tells: a cut upload, or of another preparation. {UPLOAD}") from e
        return int(entry["bytes"])

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetch") as pool:
        futures = [pool.submit(one, entry) for entry in files]
        try:
            for future in futures:
                done += future.result()
                if time.monotonic() - shown > LINE_S:
                    shown = time.monotonic()
                    say(f"fetched {done / 1e6:,.0f} of {total / 1e6:,.0f} MB in {shown - started:,.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")
