"""Who holds a lock file: written into it by the holder, read by whoever comes second."""

from __future__ import annotations

import json
import os
import socket


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
