"""Raw files in an object store -> files of this machine, for ``prepare.py``.

Nothing lists checksums of raw files, so the cache goes by size and time of change as the store tells them: what is the
same in both is not fetched again. Local copies have the store's time, so that an interrupted preparation goes on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from embsearch_dist.data.formats.clicks import by_path
from embsearch_dist.data.formats.inputs import shown
from embsearch_dist.data.formats.source_file import source_words
from embsearch_dist.data.prepare.scratch import load_record, save_record
from embsearch_dist.errors import UserError
from embsearch_dist.schema import SPLITS
from embsearch_dist.stores.cache import alone, bring, cache_home, check_room
from embsearch_dist.stores.urls import Entry, OtherSize, Store, is_url, join, local_folder

DESCRIBED = ("table", "ids")
"""Formats whose input is a YAML source file that names the data files."""
MAGIC = re.compile(r"[*\[]")
Say = Callable[[str], None]


def fetch_inputs(format: str, words: Sequence[Path | str], say: Say = lambda text: None) -> list[Path]:
    """Paths for ``--input``: URLs among the words, and those that a source file names, are fetched into the cache.

    A URL names an object, a folder of them, or several by ``*`` and ``[...]``. Processes of one machine may call this
    at once: one fetches, the others wait for it.

    Raises:
        UserError: the store fails, there is nothing, or an object is replaced while it is fetched.
    """
    if format in DESCRIBED:
        return [_source_file(word, say, format) for word in words]
    return [path for word in words for path in (_fetch(str(word), say) if is_url(word) else [Path(word)])]


def _source_file(word: Path | str, say: Say, format: str) -> Path:
    """A source file whose data files are all on this machine: the one that was named, or a copy that names others."""
    if is_url(word):
        found = _fetch(str(word), say)
        here = found[0]
    else:
        here = Path(word)
    if here.suffix.lower() not in (".yaml", ".yml") or not here.is_file():
        return here  # whoever reads it says what is wrong
    body = source_words(here)
    base = str(word).partition("?")[0].rpartition("/")[0] + _query(str(word)) if is_url(word) else ""
    if not base and not any(is_url(name) for name in _names(body)):
        return here

    def bring_here(name: str) -> list[str]:
        if not is_url(name) and not base:
            return [str(here.parent.absolute() / name)]
        return [str(p) for p in _fetch(name if is_url(name) else join(base, name), say)]

    body["name"] = body.get("name") or here.stem
    if format == "ids" and not {"splits", "files"} & set(body):
        body["splits"] = {split: split for split in SPLITS}
    for key in ("files", "splits"):
        if isinstance(body.get(key), dict):
            body[key] = {split: [p for n in _list(names) for p in bring_here(n)] for split, names in body[key].items()}
        elif key in body:
            body[key] = [p for n in _list(body[key]) for p in bring_here(n)]
    text = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
    copy = cache_home() / "input" / f"{here.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    with alone(copy.with_name(f"{copy.name}.lock"), "prepare"):
        if not copy.exists():
            copy.write_text(text, encoding="utf-8")
    return copy


def _names(body: dict[str, Any]) -> list[str]:
    splits = body.get("splits")
    inner = [n for names in splits.values() for n in _list(names)] if isinstance(splits, dict) else []
    return [*_list(body.get("files")), *inner]


def _list(names: Any) -> list[str]:
    return [] if names is None else [str(n) for n in names] if isinstance(names, list) else [str(names)]


def _query(url: str) -> str:
    return "".join(url.partition("?")[1:])


def _fetch(url: str, say: Say) -> list[Path]:
    """What a URL names, on this machine: a file, a folder, or the files of a pattern in the order of their names."""
    here = local_folder(url)
    if here is not None:
        return [here]
    plain, query = url.partition("?")[0], _query(url)
    found = MAGIC.search(plain)
    base = plain[: plain.rfind("/", 0, found.start())] if found else plain
    pattern = plain[len(base) + 1 :]
    folder = cache_home() / "input" / f"{Path(base).name}-{hashlib.sha256(base.encode()).hexdigest()[:16]}"
    store = Store(base + query)
    with alone(folder.with_name(f"{folder.name}.lock"), "prepare"):
        entries = _look(store, pattern)
        if not entries:
            raise UserError(f"{plain}: there is nothing in the store. Check the URL")
        single = entries[0].name == ""
        names = {e.name: Path(base).name if single else e.name for e in entries}
        _bring_all(store, entries, names, folder, say)
        if not pattern and not single:
            _forget_others(folder, set(names.values()))
    if single or pattern:
        return [folder / name for name in sorted(map(Path, names.values()), key=by_path)]
    return [folder]


def _look(store: Store, pattern: str) -> list[Entry]:
    """The objects that are wanted: all below a folder, those of a pattern, or the one (with an empty name).

    Raises:
        UserError: a folder fits the pattern, whose files would be left out.
    """
    if not pattern:
        one = store.find()
        return [one] if one is not None else store.list()
    wanted, every = pattern.split("/"), store.list()
    found = [e for e in every if shown(wanted, e.name.split("/"))]
    read = {folder for e in found for folder in Path(e.name).parents}
    for path in (Path(e.name) for e in every):
        folder = next((p for p in path.parents[:-1] if p not in read and shown(wanted, p.parts)), None)
        if folder is not None and not any(part[0] in "._" for part in path.relative_to(folder).parts):
            raise UserError(f"{store.at(str(folder))}: this folder fits the pattern, its files do not. Add /* to it")
    return found


def _bring_all(store: Store, entries: Sequence[Entry], names: dict[str, str], folder: Path, say: Say) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    book = folder.with_name(f"{folder.name}.json")
    record = load_record(book) or {}
    missing = [e for e in entries if not _is_here(folder / names[e.name], record.get(names[e.name]), e)]
    size = sum(e.size for e in missing)
    check_room(folder, size)
    if missing:
        say(f"fetching {store.at('')}: {len(missing)} of {len(entries)} files, {size / 1e6:,.1f} MB, into {folder}")
    for entry in missing:
        name = names[entry.name]
        target = folder / name
        if record.get(f"{name}.part") != [entry.size, entry.changed]:
            target.with_name(f"{target.name}.part").unlink(missing_ok=True)  # of another object
            record[f"{name}.part"] = [entry.size, entry.changed]
            save_record(book, record)
        try:
            bring(store, entry.name, target, entry.size)
        except OtherSize as e:
            raise UserError(f"{e}: it is being replaced, or the store's listing is old. Start again later") from e
        now = store.find(entry.name)
        if now is None or (now.size, now.changed) != (entry.size, entry.changed):
            raise UserError(f"{store.at(entry.name)}: was replaced while it was fetched. Start again")
        os.utime(target, ns=(entry.changed, entry.changed))
        record[name] = record.pop(f"{name}.part")
        save_record(book, record)


def _is_here(path: Path, noted: list[int] | None, entry: Entry) -> bool:
    return noted == [entry.size, entry.changed] and path.exists() and path.stat().st_size == entry.size


def _forget_others(folder: Path, wanted: set[str]) -> None:
    """Remove files that the folder in the store no longer has."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if str(path.relative_to(folder)) not in wanted:
            path.unlink()
