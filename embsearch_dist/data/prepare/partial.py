"""The directory ``OUT.partial``: where work goes on until it is whole, over as many starts as it takes."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from embsearch_dist import lockfile
from embsearch_dist.data.prepare.scratch import load_record, save_record
from embsearch_dist.data.prepare.team import Stopped, Team
from embsearch_dist.errors import UserError

PATIENCE_S = lockfile.PATIENCE_S
MARK, JOB = "PREPARING", "job.json"
MADE = {
    **dict.fromkeys(("train", "validation", "test"), r"part-\d+\.parquet"),
    "vocabulary": r".+\.parquet",
    "populations": r".+\.npy",
    "raw": r"clicks\.\w+|source\.yaml",
}
"""The folders of prepared data, and the files that are made in each."""
BESIDE = ("schema.json", "manifest.json", "truth.json")
"""The files of prepared data beside those folders."""


def foreign(out: Path) -> Path | None:
    """The first entry of a folder of prepared data that no preparation has made; None where there is none."""
    for path in sorted(out.iterdir()):
        if not path.is_dir():
            if path.name not in BESIDE:
                return path
        elif path.name not in MADE:
            return path
        else:
            other = (p for p in sorted(path.iterdir()) if p.is_dir() or not re.fullmatch(MADE[path.name], p.name))
            if (found := next(other, None)) is not None:
                return found
    return None


@contextmanager
def whole_directory(
    out: Path,
    overwrite: bool,
    job: dict | None = None,
    team: Team | None = None,
    quiet: bool = True,
    other: Callable[[Path], Path | None] = foreign,
) -> Iterator[Path]:
    """A directory ``<out>.partial`` to fill, which becomes ``out`` when the block ends without an error.

    With a ``job`` (JSON: all that decides the result) the block may find there what an earlier start of
    the same job left; the files of another job are removed first. It stays after an interruption and
    after anything else that is not the fault of the input; after bad input it is removed. Without a
    ``job`` the directory is empty at first and never stays. With a team, rank 0 makes and renames it.

    Args:
        other: gives an entry of ``out``, which is there and not empty, that may not be deleted; None where all may.

    Raises:
        UserError: ``out`` exists and may not or must not be replaced, another process is filling it, or a process does
            not see the directory of rank 0.
    """
    team = team or Team()
    out = Path(os.path.abspath(out))
    partial = out.with_name(out.name + ".partial")
    lock = -1
    try:
        if team.rank == 0:
            _check_target(out, overwrite, other)
            lock = _open(partial, job, quiet)
            if team.size > 1:
                # Shared by all ranks, so that a new start finds the last survivor of a killed one.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        signature = team.share("directory", lambda: (partial / MARK).read_text())
        if team.rank > 0:
            _check_shared(partial, signature, team.rank)
            lock = os.open(partial / MARK, os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield partial
        team.barrier("written")
        if team.rank == 0:
            _finish(partial, out)
    except BaseException as e:
        error: BaseException = e
        if isinstance(e, OSError):
            what = f"{e.filename or out}: {e.strerror or e}"
            error = Stopped(f"{what}. Check the disk, its free space and its permissions")
        team.tell(error)
        bad_input = isinstance(error, UserError) and not isinstance(error, Stopped)
        if team.rank == 0 and lock >= 0 and (job is None or bad_input):
            shutil.rmtree(partial, ignore_errors=True)
        if error is not e:
            raise error from e
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def _check_shared(partial: Path, signature: str, rank: int) -> None:
    """Refuse a directory that is not the one in which rank 0 has signed."""
    if not lockfile.appears(partial / MARK, signature, PATIENCE_S):
        raise Stopped(
            f"{partial} of process {rank} on {socket.gethostname()} is not the one of process 0: what one writes there "
            "the other does not see. Give an --out on a disk that all hosts share"
        )


def _check_target(out: Path, overwrite: bool, other: Callable[[Path], Path | None]) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{out} exists. Give another --out, or --overwrite to replace it")
    ours = out.is_dir() and not out.is_symlink() and ((out / "schema.json").exists() or not any(out.iterdir()))
    if not ours:
        raise UserError(f"{out} is not a prepared data set, so --overwrite leaves it alone. Give another --out")
    if (found := other(out)) is not None:
        raise UserError(
            f"{found} was not made by a preparation of data, and --overwrite would delete it. Give another --out, or "
            "move it away"
        )


def _open(partial: Path, job: dict | None, quiet: bool) -> int:
    """Make the directory ready and lock it. The kernel drops the lock of whoever dies."""
    if not partial.exists():
        partial.mkdir(parents=True)
    elif any(partial.iterdir()) and not any((partial / n).exists() for n in (MARK, JOB, "schema.json")):
        raise UserError(f"{partial} is in the way and not from an earlier prepare. Move it, or give another --out")
    lock = os.open(partial / MARK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lockfile.sign(lock, "prepare")
        before = _job_before(partial)
        if job is not None and before == job:
            for file in partial.rglob("*.tmp"):
                file.unlink()
            if not quiet:
                print(f"{partial}: continuing what an earlier start left", file=sys.stderr)
        else:
            if job is not None and before is not None and not quiet:
                changed = ", ".join(_changed(before, job))
                print(f"{partial}: left by other input or options ({changed}); starting over", file=sys.stderr)
            for path in partial.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != MARK:
                    path.unlink()
            if job is not None:
                save_record(partial / JOB, job)
    except BlockingIOError as e:
        who = lockfile.holder(lock)
        os.close(lock)
        raise UserError(f"{partial}: {who} is at work there. Wait for it, or give another --out") from e
    except BaseException:
        os.close(lock)
        raise
    return lock


def _job_before(partial: Path) -> dict | None:
    try:
        return load_record(partial / JOB)
    except UserError:
        return None


def _changed(before: dict, job: dict) -> list[str]:
    """What differs, in words of the user: options, file names, else the key."""
    names: list[str] = []
    for key in job:
        old, new = before.get(key), job[key]
        if isinstance(old, dict) and isinstance(new, dict):
            names += [k for k in {**old, **new} if old.get(k) != new.get(k)]
        elif old != new:
            names.append(key)
    return names


def _finish(partial: Path, out: Path) -> None:
    (partial / JOB).unlink(missing_ok=True)
    (partial / MARK).unlink()
    if not out.exists():
        partial.rename(out)
        return
    # Two renames: at no moment is a half-deleted directory called `out`.
    old = out.with_name(out.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)
