"""A run directory is ours: a mark says so, a lock says who is at work in it, and only what we made is ever deleted."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from pathlib import Path

from embsearch_dist import lockfile, written
from embsearch_dist.errors import UserError, naming
from embsearch_dist.files import read_sealed, write_sealed
from embsearch_dist.job import job, may_be_restart
from embsearch_dist.written import LOCK

EDITED = "# edited"
HEAD = "# Written by a run. The last line is a checksum; to change the file by hand, put '# edited' in its place.\n"
SEAL = "# sha256 of the lines above: "
# Everything that a search, a retraining, an evaluation or a report leaves at the top of a directory.
OURS = re.compile(
    r"run\.lock|config\.yaml|schema\.json|truth\.json|unreadable\.json|(metrics|heatmaps)\.jsonl|allocation\.json|"
    r"architecture\.json|groups\.json|(evolution|pareto|latency|prefilter|training|start|choice)\.json|"
    r"(written|mirror|emptied)\.json|evaluation(-[a-z]+)*\.json|difference-to-.+\.json|final(-seed\d+)?\.json|"
    r"allocations|architectures|stages|checkpoints(\.partial)?|widest(-.+)?|groups|group-\d+|search|tb|report|retrain|"
    r".*\.tmp"
)
RETRAIN = "retrain"  # a folder of directories of the same kind
ALIKE = re.compile(r"widest(-.+)?|group-\d+")  # such directories
EMPTIED = "emptied.json"  # which job has emptied a directory
_CHECKPOINTS = r"[\w-]+/(best\.json|step-\d+(\.(partial|old|damaged))*/(data/[^/]+|(state|manifest)\.json))"
_SHARDS = r"group-\d+(\.(partial|replaced))?/((schema|manifest|job)\.json|PREPARING|\w+/part-\d+\.parquet)"
# And what their folders hold, by paths inside them.
INSIDE = {
    "stages": r"[\w-]+\.json",
    "search": r"pareto\.json",
    "allocations": r"[^/]+\.json",
    "architectures": r"rank-\d+\.json",
    "report": r"index\.html|[\w-]+\.png",
    "tb": r"[\w-]+/events\.out\.tfevents\.[^/]+",
    "checkpoints": _CHECKPOINTS,
    "checkpoints.partial": _CHECKPOINTS,
    "groups": rf"[\w-]+\.json|field_router-\d+\.npy|assignment/\w+\.npy|{_SHARDS}",
}
LISTED = ("allocations", "architectures")  # a person may put a file of that form there; written.json tells whose it is
_held: dict[Path, int] = {}
_anew: set[Path] = set()  # what this process or an earlier start of its job has emptied


def plain_word(name: str, where: str) -> str:
    """A name that becomes a folder or a file: no path, nothing hidden, and short enough.

    Raises:
        UserError: naming ``where`` it was given.
    """
    bad = not name or name.startswith(".") or any(c in "/\\" or not c.isprintable() for c in name)
    if bad or len(os.fsencode(name)) > 150:
        raise UserError(
            f"{where}: {name[:60]!r} cannot name a folder. Give a plain word: no slash, no dot in front, 150 bytes"
        )
    return name


def foreign(directory: Path) -> Path | None:
    """The first file in a run directory that is none of ours, also below ``retrain``; None where all are."""
    for path in sorted(directory.iterdir()):
        if not OURS.fullmatch(path.name) or path.is_symlink():
            return path
        if path.name in INSIDE and (inner_file := _foreign_inside(path, directory)) is not None:
            return inner_file
        if path.name == RETRAIN and path.is_dir():
            inner = sorted(path.iterdir())
            lying = [p for p in inner if not p.is_dir()]
            for one in (*lying[:1], *(f for d in inner if d.is_dir() and (f := foreign(d)) is not None)):
                return one
        if ALIKE.fullmatch(path.name) and path.is_dir() and (other := foreign(path)) is not None:
            return other
    return None


def _foreign_inside(folder: Path, directory: Path) -> Path | None:
    """The first file in one of the folders of :data:`INSIDE` that is none of ours."""
    if not folder.is_dir():
        return folder
    listed = folder.name in LISTED and (directory / written.LIST).is_file()
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        ours = re.fullmatch(rf"({INSIDE[folder.name]})(\.(\d+\.)?tmp)?", name) and not path.is_symlink()
        if not ours or (listed and not path.name.endswith(".tmp") and not written.knows(path)):
            return path
    return None


def clear(directory: Path, given: Path | None = None) -> None:
    """Delete what a run directory holds, but for its lock. The directory must be :func:`hold` already, and not
    :func:`emptied_by_this_job`.

    Args:
        given: the config file of the command line, which must not go.

    Raises:
        UserError: the directory is not a run directory, or holds something that we have not made; nothing was deleted.
    """
    stays = f"Nothing was deleted. Move it away, or give another --run.dir than {directory}"
    entries = [p for p in directory.iterdir() if p.name != LOCK]
    if not entries:
        return
    if not is_ours(directory):
        raise UserError(f"{directory} is not a run directory (no config.yaml of ours in it); it is not deleted")
    other = foreign(directory)
    if other is not None:
        raise UserError(f"{other} was not made by a run, and --run.overwrite true would delete it. {stays}")
    if given is not None and given.resolve().is_relative_to(directory.resolve()) and given.name != "config.yaml":
        raise UserError(f"--config {given} lies in the run directory that --run.overwrite true deletes. {stays}")
    for lock in (*directory.glob(f"{RETRAIN}/*/{LOCK}"), *directory.glob(f"widest*/{LOCK}")):
        hold(lock.parent, "a start with --run.overwrite true")
    # The config goes last: while it is there, the same command takes the directory for a run's, also after a kill.
    for path in sorted(entries, key=lambda p: p.name == "config.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def note_emptied(directory: Path) -> None:
    """Note in a directory that is new, or was emptied, by which job; no file where the job has no name."""
    _anew.add(directory)
    if name := job():
        write_sealed(directory / EMPTIED, {"by": name})


def emptied_by_this_job(directory: Path) -> bool:
    """Whether this job emptied the directory before it was started again: what is there now is its own work."""
    file = directory / EMPTIED
    if not may_be_restart() or not file.is_file():
        return False
    try:
        own = bool(read_sealed(file)["by"] == job())
    except UserError:  # damaged: nobody knows
        return False
    _anew.update([directory] if own else [])
    return own


def warned_of_anew(text: str) -> str:
    """``text``, which tells a person to give the same command again, with what that would do to a directory that the
    command has emptied."""
    if not _anew:
        return text
    return f"{text}, but without --run.overwrite true (or run.overwrite in its config), which would begin anew"


def is_ours(directory: Path) -> bool:
    """Whether a config.yaml there is one that a run wrote (of an older version too), not a person. Without one, whether
    a start was killed before it had written it: there is its lock, and nothing that is not ours."""
    path = directory / "config.yaml"
    if not path.is_file():
        return (directory / LOCK).exists() and foreign(directory) is None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return (directory / LOCK).exists()
    return (_is_record(text) and (directory / "schema.json").exists()) or (directory / LOCK).exists()


def _is_record(text: str) -> bool:
    """Whether a config has every section, as those that runs write and those of persons have not."""
    sections = ("method", "run", "data", "model", "optim", "train", "dist", "search")
    return all(re.search(rf"^{key}:", text, re.MULTILINE) for key in sections) and "\n  overwrite:" in text


def write_text(path: Path, text: str) -> None:
    """Replace a run directory's config.yaml in one step; its checksum is the last line."""
    text = HEAD + text
    checksum, temporary = hashlib.sha256(text.encode()).hexdigest(), path.with_name(f"{path.name}.tmp")
    with written.listed(path, checksum), naming(path):
        temporary.write_text(f"{text}{SEAL}{checksum}\n", encoding="utf-8")
        temporary.replace(path)


def check_text(path: Path) -> None:
    """Compare a run directory's config.yaml with the checksum in its last line.

    One without a checksum is of an older version, or was edited by a person, who says so in its last line. One that
    begins as those of this version do, or lacks a section, was cut short.

    Raises:
        UserError: it was changed or cut.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file ({e.reason} at byte {e.start}). Copy it back") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    lines = text.rstrip("\n").split("\n")
    if lines[-1].strip() == EDITED:
        return
    mend = f"Copy it back, or, if you changed it on purpose, let its last line be {EDITED!r}"
    if not lines[-1].startswith(SEAL):
        if text.startswith(HEAD) or not _is_record(text):
            raise UserError(f"{path} was cut short: the line with its checksum is missing. {mend}")
        return
    body = "".join(f"{line}\n" for line in lines[:-1])
    checksum = hashlib.sha256(body.encode()).hexdigest()
    if lines[-1] != f"{SEAL}{checksum}":
        raise UserError(f"{path} was changed since it was written: it differs from its checksum. {mend}")
    written.check(path, checksum, mend)


def hold(directory: Path, doing: str) -> None:
    """Make the directory and lock it for this process, until it ends or :func:`release`; again is harmless.

    The kernel drops the lock of whoever dies. Rank 0 calls this for all ranks.

    Raises:
        UserError: another process is at work there; says which one.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory.resolve() / LOCK
        if path in _held and path.exists() and os.fstat(_held[path]).st_ino == path.stat().st_ino:
            return
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as e:
        place = e.filename or directory
        raise UserError(f"{place}: cannot be written ({e.strerror}). Give another --run.dir") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        who = lockfile.holder(file)
        os.close(file)
        raise UserError(f"{directory}: {who} is at work there. Wait for it, or give another --run.dir or --name") from e
    except OSError:
        pass  # a file system without locks
    lockfile.sign(file, doing)
    _held[path] = file


def release() -> None:
    """Unlock everything this process holds."""
    while _held:
        os.close(_held.popitem()[1])
