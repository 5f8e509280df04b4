"""A script whose output goes into a pipe that is closed, as by ``| head``: it ends quietly, as a shell expects it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

CLOSED = 141  # 128 + SIGPIPE


def quietly(main: Callable[[], int | None]) -> int:
    """Run ``main`` and write out what it has printed; its exit code, or :data:`CLOSED` where nobody reads any more."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer must go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    return code
