"""Files by which processes know of each other: who holds a lock, and whether all see one directory."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

PATIENCE_S = 20.0  # a network disk may show a new file to other hosts only after some seconds


def sign(file: int, doing: str) -> None:
    """Write this process and what it does into an open lock file that it holds."""
    body = {"host": socket.gethostname(), "pid": os.getpid(), "doing": doing}
    os.ftruncate(file, 0)
    os.pwrite(file, (json.dumps(body) + "\n").encode(), 0)


def holder(file: int) -> str:
    """What :func:`sign` wrote into an open lock file, in words."""
    try:
        body = json.loads(os.pread(file, 4096, 0))
        return f"{body['doing']} (process {body['pid']} on {body['host']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def appears(path: Path, text: str, patience_s: float) -> bool:
    """Whether a file that another process has written is seen here, with that text, within so many seconds."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            if path.read_text() == text:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
