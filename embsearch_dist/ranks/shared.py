"""A directory that all ranks write into must be one and the same to all of them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from embsearch_dist.errors import UserError
from embsearch_dist.lockfile import PATIENCE_S, appears
from embsearch_dist.ranks.context import Context


def open_shared(context: Context, directory: Path, doing: str, make: Callable[[], None]) -> None:
    """Make a directory on rank 0, and see to it that all ranks see the same one; see :func:`check_shared`."""
    context.first(doing, make)
    check_shared(context, directory)


def check_shared(context: Context, directory: Path, patience_s: float = PATIENCE_S) -> None:
    """Refuse, on all ranks, a directory in which one of them does not find what rank 0 has just written there.

    On a disk of its own a rank's part of a checkpoint would lie where nobody looks for it.

    Raises:
        UserError: naming the rank and its host.
    """
    if context.world_size == 1:
        return
    told = context.share([secrets.token_hex(8), socket.gethostname()])
    token, host = str(told[0]), str(told[1])
    mark = directory / f"shared-{token}.tmp"
    context.first("marking the run directory", lambda: mark.write_text(token))
    try:
        with context.together("looking for the run directory"):
            if not appears(mark, token, patience_s):
                raise UserError(
                    f"{directory} of rank {context.rank} on {socket.gethostname()} is not the one of rank 0 on {host}: "
                    "what one writes there the other does not see. Give a --run.dir on a disk that all hosts share"
                )
    finally:
        if context.rank == 0:
            mark.unlink(missing_ok=True)
