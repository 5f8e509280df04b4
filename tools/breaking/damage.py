"""Ways in which a file comes to harm, and which files of a run may."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

KINDS = ("flip", "cut", "empty", "remove", "swap", "stale", "directory", "loop", "append")
WEIGHTS = (5, 2, 1, 2, 3, 8, 1, 1, 1)
ORDER = ("fresh", "searching", "searched", "retraining", "retrained")  # states of a run, in time
NEVER_READ = ("tb", "report")  # written for people, read by nothing of ours


def files_of(folder: Path) -> list[Path]:
    """All files under ``data`` and ``run`` that a command may read, relative to ``folder``, in order."""
    found = [p.relative_to(folder) for top in ("data", "run") for p in sorted((folder / top).rglob("*")) if p.is_file()]
    return [p for p in found if not set(p.parts) & set(NEVER_READ)]


def strike(file: Path, kind: str, rng: random.Random, partners: Sequence[Path]) -> bool:
    """Damage ``file`` in place; False where this kind is not possible here.

    Args:
        partners: for ``swap`` and ``stale``: files of that name to take the place, best first.
    """
    data = file.read_bytes()
    if kind in ("swap", "stale"):
        other = next((p for p in partners if p.is_file() and p.read_bytes() != data), None)
        if other is None:
            return False
        shutil.copy(other, file)
        return True
    if kind in ("flip", "cut") and not data:
        return False
    if kind == "flip":
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :])
    elif kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "empty":
        file.write_bytes(b"")
        return bool(data)
    elif kind == "append":
        file.write_bytes(data + rng.randbytes(rng.randrange(1, 40)))
    else:
        file.unlink()
        if kind == "directory":
            file.mkdir()
        elif kind == "loop":
            os.symlink(file.name, file)
    return True


def fingerprint(file: Path) -> object:
    """What is at a path now, to see whether anybody has touched it since."""
    if file.is_symlink():
        return ("link", os.readlink(file))
    if file.is_dir():
        return ("directory", sorted(os.listdir(file)))
    return file.read_bytes() if file.exists() else None
