"""All ranks wait for long work of some of them, however long it takes: no collective waits longer than a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable

from embsearch_dist.ranks.context import Context

MOMENT_S = 1.0


def wait_for_all(context: Context, doing: str, work: Callable[[], None]) -> None:
    """Run ``work`` on every rank, and go on when it is done on all; fails on all ranks if it fails on one.

    A rank that waited in one collective for another's download would give up after ``dist.timeout_s``. Here each works
    in a thread, and all ask each other every moment who is still at it. ``work`` must not call collectives.

    Raises:
        UserError: what ``work`` raised, on whatever rank.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:  # raised again below, in the thread that waits for this one
            failure.append(e)

    thread = threading.Thread(target=run, name=doing, daemon=True)
    thread.start()
    while True:
        thread.join(MOMENT_S)
        if not any(context.every(thread.is_alive())):
            break
    with context.together(doing):
        if failure:
            raise failure[0]
