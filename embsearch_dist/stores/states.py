"""A mirrored run directory: objects that are named by what is in them, and a list of those that make its state.

    PREFIX/state.json            every file of the run directory with bytes and SHA-256; written last, in one piece
    PREFIX/files/NAME@SHA256     the files; what the list does not name does not count
    PREFIX/results/NAME          results and reports once more, under their own names, for people

So a state is whole at every moment: an upload that is cut leaves the list, and all that it names, as they were.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json, sealed, write_json
from embsearch_dist.job import job, may_be_restart
from embsearch_dist.rundir import EMPTIED
from embsearch_dist.stores.cache import WrongBytes, alone, bring, check_room
from embsearch_dist.stores.urls import Missing, Store

STATE, RECORD = "state.json", "mirror.json"
FORMAT = 1
CHECKPOINT = re.compile(r"(?P<root>(.+/)?)(?P<step>step-\d+)/(data/[^/]+|(state|manifest)\.json)")
READS = 3  # of a state whose files are being replaced meanwhile


@dataclass(frozen=True)
class File:
    """A file of a run directory: its path there, bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str

    @property
    def object(self) -> str:
        """Where its bytes lie below the mirror's URL."""
        return f"files/{self.name}@{self.sha256[:16]}"


@dataclass(frozen=True)
class State:
    """All files of a run directory at one moment.

    Attributes:
        files: what it holds.
        writer: who wrote it, for people.
        token: tells it from every other one.
    """

    files: tuple[File, ...]
    writer: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def save(self, store: Store) -> None:
        body = {"format": FORMAT, "token": self.token, "writer": self.writer, "files": [asdict(f) for f in self.files]}
        store.write(STATE, json.dumps({**body, "sha256": sealed(body)}, indent=1).encode())


def emptied_there(url: str) -> bool:
    """Whether a mirror holds what this job has begun anew before it was started again, perhaps on another machine.

    Raises:
        UserError: the store fails, or the list is damaged.
    """
    store = Store(url)
    state = read_state(store) if may_be_restart() else None
    mark = next((f for f in state.files if f.name == EMPTIED), None) if state is not None else None
    try:
        return mark is not None and bool(json.loads(store.read(mark.object))["by"] == job())
    except (Missing, ValueError, KeyError, TypeError):  # replaced or damaged meanwhile: nobody knows
        return False


def read_state(store: Store) -> State | None:
    """The state that a mirror holds; None where there is none yet.

    Raises:
        UserError: the store fails, or the list is damaged.
    """
    try:
        text = store.read(STATE)
    except Missing:
        return None
    where = store.at(STATE)
    cure = "Give another run.mirror, or delete that object: then the mirror counts as empty"
    try:
        body = json.loads(text)
        if body["sha256"] != sealed(body) or body["format"] != FORMAT:
            raise ValueError("it differs from its own checksum")
        files = tuple(File(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in body["files"])
        return State(files, str(body["writer"]), str(body["token"]))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where}: not the list of a mirror ({' '.join(str(e).split())[:80]}). {cure}") from e


def tokens_of(home: Path, url: str) -> list[str]:
    """The states of a mirror that this run directory has written, or was fetched from: the last, and one that may have
    been under way."""
    try:
        body = read_json(home / RECORD)
        return [str(t) for t in body["tokens"]] if body["url"] == url.partition("?")[0] else []
    except (UserError, KeyError, TypeError):
        return []


def note_tokens(home: Path, url: str, *tokens: str) -> None:
    """Remember what :func:`tokens_of` gives; before a state is written and after."""
    write_json(home / RECORD, {"url": url.partition("?")[0], "tokens": list(tokens)})


def restore(home: Path, url: str, say: Callable[[str], None] = lambda text: None) -> bool:
    """Fetch a run directory from its mirror, where nothing of it is here; whether that was done.

    It appears whole; what comes before a cut stays beside it and is not fetched again. Of a checkpoint with wrong bytes
    the others are kept, as a run does that finds a damaged one on its disk. Processes that call this at once wait for
    the first.

    Raises:
        UserError: the store fails, or an object is missing or has wrong bytes; names it.
    """
    if _has_files(home):
        return False
    store = Store(url)
    if read_state(store) is None:
        return False
    lock = home.with_name(f"{home.name}.fetch")
    with alone(lock, "fetch"):
        if _has_files(home):
            return False
        partial = home.with_name(f"{home.name}.partial")
        state = _bring_state(store, partial, say)
        note_tokens(partial, url, state.token)
        if home.exists():
            home.rmdir()
        partial.rename(home)
        lock.unlink(missing_ok=True)
    return True


def _has_files(home: Path) -> bool:
    return home.exists() and any(home.iterdir())


def _bring_state(store: Store, partial: Path, say: Callable[[str], None]) -> State:
    """The newest state in a folder; read again where another machine has replaced it meanwhile."""
    for attempt in range(READS):
        state = read_state(store)
        if state is None:
            raise UserError(f"{store.at(STATE)}: gone while it was read. Look at the bucket, and start again")
        partial.mkdir(parents=True, exist_ok=True)
        size = sum(f.bytes for f in state.files)
        check_room(partial, size, sum(p.stat().st_size for p in partial.rglob("*") if p.is_file()))
        say(f"fetching the run from {store.at('')}: {len(state.files)} files, {size / 1e6:,.1f} MB")
        try:
            _bring_files(store, state, partial, say)
            return state
        except Missing:
            now = read_state(store)
            if attempt + 1 == READS or now is None or now.token == state.token:
                raise
    raise AssertionError("unreachable")


def _bring_files(store: Store, state: State, partial: Path, say: Callable[[str], None]) -> None:
    for path in sorted(p for p in partial.rglob("*") if p.is_file() and not p.name.endswith(".part")):
        if str(path.relative_to(partial)) not in {f.name for f in state.files}:
            path.unlink()  # of an older state
    wrong: dict[str, str] = {}
    for file in state.files:
        target = partial / file.name
        if not target.resolve().is_relative_to(partial.resolve()):
            raise UserError(
                f"{store.at(STATE)}: names {file.name!r}, outside the run directory. Give another run.mirror"
            )
        if target.exists() and target.stat().st_size == file.bytes and _same(target, file):
            continue
        try:
            bring(store, file.object, target, file.bytes, file.sha256)
        except WrongBytes as e:
            found = CHECKPOINT.fullmatch(file.name)
            if found is None:
                raise UserError(
                    f"{e} by {STATE}: wrong bytes. Restore that object from a version or copy, or give another "
                    "run.mirror to begin anew"
                ) from e
            wrong[f"{found['root']}{found['step']}"] = str(e)
    for folder, text in wrong.items():
        _leave_out(state, partial, folder, text, set(wrong), say)


def _same(path: Path, file: File) -> bool:
    from embsearch_dist.files import digest

    return digest(path)["sha256"] == file.sha256


def _leave_out(
    state: State, partial: Path, folder: str, text: str, wrong: Sequence[str] | set[str], say: Callable[[str], None]
) -> None:
    """Go on without a checkpoint, if there is another one of the same training."""
    found = [CHECKPOINT.fullmatch(f.name) for f in state.files]
    steps = {f"{m['root']}{m['step']}" for m in found if m is not None}
    root = folder.rpartition("/")[0]
    others = sorted(s for s in steps - set(wrong) if s.rpartition("/")[0] == root)
    if not others:
        raise UserError(
            f"{text} by {STATE}: wrong bytes, and there is no other checkpoint of {root}. Restore that object from a "
            "version or copy, or give another run.mirror to begin anew"
        )
    say(f"{text}: wrong bytes; going on without {folder}")
    shutil.rmtree(partial / folder, ignore_errors=True)
