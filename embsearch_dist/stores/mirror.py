"""A run directory goes up to an object store while training goes on: see :mod:`embsearch_dist.stores.states`.

A push takes links of all files as they are at that moment, which takes milliseconds, and a thread sends what the mirror
lacks. When pushes come faster than they can be sent, the newest counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from embsearch_dist import written
from embsearch_dist.errors import UserError
from embsearch_dist.rundir import OURS
from embsearch_dist.stores.states import CHECKPOINT, RECORD, STATE, File, State, note_tokens, read_state, tokens_of
from embsearch_dist.stores.urls import Store

LINKS = "mirror.tmp"
AT_ONCE = 4
RESULTS = re.compile(r"report/.+|(evaluation(-\w+)*|allocation|architecture|groups|final[\w-]*|choice)\.json")
UNFINISHED = (".tmp", ".partial", ".old", ".damaged", ".replaced")
TRAININGS = "retrain"
CHUNK = 4 << 20
_active: list[Mirror] = []


@dataclass(frozen=True)
class Snapshot:
    """Links to the files of a run directory in a folder of their own, and how long each was."""

    folder: Path
    sizes: dict[str, int]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Mirror:
    """The mirror of one run directory; used by one process of a job.

    Args:
        home: the run directory.
        url: of the mirror.
        overwrite: the run starts anew, whatever the mirror holds.

    Raises:
        UserError: the store fails, or the mirror holds a state that is not of this run directory.
    """

    def __init__(self, home: Path, url: str, overwrite: bool = False) -> None:
        self.home, self.url, self.store = home, url, Store(url)
        self.failure = ""
        """Why the newest push has not come up; empty when it has."""
        state = read_state(self.store)
        known = tokens_of(home, url)
        if state is not None and state.token not in known and not overwrite:
            raise UserError(
                f"run.mirror {self.store.at('')} holds a state that {state.writer} has written, and {home} is not what "
                f"it was made from. Move {home} away, and that state is fetched; or give another run.mirror, or "
                "--run.overwrite true to begin anew"
            )
        self._state = state
        self._next: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._count = 0
        self._swept, self._anew, self._ending = False, overwrite, False
        shutil.rmtree(home / LINKS, ignore_errors=True)

    def push(self) -> None:
        """Bring the mirror to what the run directory is now, beside what this process does next. Never raises."""
        try:
            snapshot = self._take()
        except (OSError, UserError) as e:
            self._fail(f"its files could not be linked ({e})")
            return
        with self._lock:
            late, self._next = self._next, snapshot
            if late is not None:
                late.remove()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all pushes are done; whether they are."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    def finish(self) -> None:
        """Push once more and wait for it.

        Raises:
            UserError: it has not come up.
        """
        self.wait()
        self._ending = True
        self.push()
        self.wait()
        self._ending = False
        if self.failure:
            raise UserError(
                f"run.mirror {self.store.at('')} lacks the end of this run: {self.failure}. All of it is in "
                f"{self.home}: give the same command again, and it is sent"
            )

    def _take(self) -> Snapshot:
        self._count += 1
        folder, sizes = self.home / LINKS / str(self._count), {}
        with written.still(self.home):
            for name in names_of(self.home, self.url):
                source, target = self.home / name, folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # another process has replaced it
                    _link(source, target)
                    sizes[name] = target.stat().st_size
        return Snapshot(folder, sizes)

    def _work(self) -> None:
        while True:
            with self._lock:
                snapshot, self._next = self._next, None
                if snapshot is None:
                    self._thread = None
                    return
            try:
                self._send(snapshot)
                self.failure = ""
            except (UserError, OSError) as e:
                self._fail(str(e))
            except Exception as e:  # what it would be a mistake of ours: training must not end for it
                self._fail(repr(e))
            finally:
                snapshot.remove()

    def _fail(self, text: str) -> None:
        self.failure = " ".join(text.split())
        if self._ending:  # told by finish()
            return
        print(
            f"run.mirror {self.store.at('')}: not up to date: {self.failure}. The run goes on; the next checkpoint "
            "tries again",
            file=sys.stderr,
            flush=True,
        )

    def _send(self, snapshot: Snapshot) -> None:
        """Send what the mirror lacks, then the list of all, then remove what no list names any more."""
        self._look()
        files = _describe(snapshot)
        there = {f.object for f in self._state.files} if self._state is not None else set()
        missing = [f for f in files if f.object not in there]
        # Of a checkpoint the manifest goes last, and what tells of checkpoints after all of them.
        data = [f for f in missing if CHECKPOINT.fullmatch(f.name) and not f.name.endswith("/manifest.json")]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mirror") as pool:
            for future in [pool.submit(self._send_one, snapshot, f) for f in data]:
                future.result()
        rest = [f for f in missing if f not in data]
        for file in sorted(rest, key=lambda f: (not f.name.endswith("/manifest.json"), f.name)):
            self._send_one(snapshot, file)
        self._write(State(tuple(files), f"process {os.getpid()} on {socket.gethostname()}"))
        if self._anew:  # the trainings of the run before went from the disk, too
            for entry in sorted(self.store.list(TRAININGS), key=lambda e: not e.name.endswith(f"/{STATE}")):
                self.store.delete(f"{TRAININGS}/{entry.name}")
            self._anew = False
        for file in missing:
            if RESULTS.fullmatch(file.name):
                self.store.send(f"results/{file.name}", snapshot.folder / file.name, file.bytes)
        if not self._swept:  # what earlier uploads that were cut have left
            there |= {f"files/{entry.name}" for entry in self.store.list("files")}
            self._swept = True
        for name in sorted(there - {f.object for f in files}):
            self.store.delete(name)

    def _send_one(self, snapshot: Snapshot, file: File) -> None:
        self.store.send(file.object, snapshot.folder / file.name, file.bytes)

    def _look(self) -> None:
        """Read the list that is there. It may be a newer one than we know of: a write that succeeded, and whose answer
        was lost."""
        now = read_state(self.store)
        own = [*tokens_of(self.home, self.url), *([] if self._state is None else [self._state.token])]
        if now is not None and now.token not in own:
            raise UserError(f"{now.writer} has written there meanwhile: two runs must not have one mirror")
        self._state = now

    def _write(self, state: State) -> None:
        self._look()  # sending may have taken long
        before = [] if self._state is None else [self._state.token]
        note_tokens(self.home, self.url, *before, state.token)
        state.save(self.store)
        note_tokens(self.home, self.url, state.token)
        self._state = state


def names_of(home: Path, url: str = "") -> Iterator[str]:
    """Paths inside a run directory of all files that are ours and finished, but for trainings below ``retrain``: those
    have mirrors of their own, unless their config names ``url``, as results do that need no training."""
    for entry in sorted(home.iterdir()):
        ours = OURS.fullmatch(entry.name) and entry.name not in (written.LOCK, RECORD)
        if not ours or entry.is_symlink() or entry.name.endswith(UNFINISHED):
            continue
        places = [entry]
        if entry.name == TRAININGS and entry.is_dir():
            places = [p for p in sorted(entry.iterdir()) if p.is_dir() and url and mirror_of(p) == url]
        for path in (f for place in places for f in (sorted(place.rglob("*")) if place.is_dir() else [place])):
            name = path.relative_to(home)
            if path.is_symlink() or not path.is_file() or path.name == written.LOCK:
                continue
            if not any(part.endswith(UNFINISHED) for part in name.parts):
                yield name.as_posix()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _describe(snapshot: Snapshot) -> list[File]:
    """The files with their SHA-256: those of checkpoints from their manifests; checkpoints without one, or without all
    that it names, are left out."""
    known: dict[str, str] = {}
    whole: set[str] = set()
    for name in snapshot.sizes:
        if CHECKPOINT.fullmatch(name) and name.endswith("/manifest.json"):
            folder = name.rpartition("/")[0]
            body = json.loads((snapshot.folder / name).read_text())
            inside = {f"{folder}/{inner}": entry["sha256"] for inner, entry in body["files"].items()}
            if inside.keys() <= snapshot.sizes.keys():  # else it was being pruned
                whole.add(folder)
                known |= inside
    found = []
    for name, size in snapshot.sizes.items():
        match = CHECKPOINT.fullmatch(name)
        if match is None or f"{match['root']}{match['step']}" in whole:
            found.append(File(name, size, known.get(name) or _digest(snapshot.folder / name, size)))
    return found


def _digest(path: Path, size: int) -> str:
    """SHA-256 of the first bytes of a file, which may be growing."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while size and (data := file.read(min(size, CHUNK))):
            found.update(data)
            size -= len(data)
    return found.hexdigest()


@contextlib.contextmanager
def watched(mirror: Mirror) -> Iterator[None]:
    """For the block, :func:`changed` brings changes of the run directory to its mirror."""
    _active.append(mirror)
    try:
        yield
    finally:
        _active.remove(mirror)


def changed(path: Path) -> None:
    """Tell that something in a run directory is finished: a checkpoint, a stage. Nothing happens where no mirror is
    watched, so whoever writes need not know."""
    for mirror in _active:
        home, place = mirror.home.absolute(), path.absolute()
        if place.is_relative_to(home) and TRAININGS not in place.relative_to(home).parts[:1]:
            mirror.push()


def wait_for_pushes(seconds: float) -> None:
    """Give the pushes of all watched mirrors so much time to come up."""
    for mirror in _active:
        mirror.wait(seconds)


def mirror_of(directory: Path) -> str:
    """The mirror that the config.yaml of a run directory names; empty where it names none, or there is no config."""
    import yaml

    try:
        body = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        return str(body["run"].get("mirror", ""))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return ""


def push_once(directory: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Bring the mirror of a run directory up to date, where its config names one; for scripts that are not training.

    Raises:
        UserError: what :class:`Mirror` raises.
    """
    if url := mirror_of(directory):
        Mirror(directory, url).finish()
        say(f"mirrored to {url.partition('?')[0]}")


def below(url: str, home: Path, directory: Path) -> str:
    """The mirror of ``HOME/retrain/NAME``, or of something else below a run directory with a mirror; empty without."""
    from embsearch_dist.stores.urls import join

    parts: Sequence[str] = directory.absolute().relative_to(home.absolute()).parts
    return join(url, *parts) if url else ""
