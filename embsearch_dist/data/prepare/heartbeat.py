"""A sign of life of every process that prepares, and who looks for it: nobody waits for a process that was killed.

A launcher ends the others when one dies. Where none does (ranks started by hand, or a launcher that was killed), each
process counts up a number in the store and watches that of the next one, in a ring: one question a second per process,
however many there are.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_S = 1.0
SILENT_BEATS = 30
"""So many beats without one of the other's: it is gone. Beats are counted, not seconds, so that processes that are all
stopped for a while (SIGSTOP, a sleeping machine) do not take each other for dead."""


class Heartbeat:
    """A thread that beats and watches from :meth:`start` to :meth:`stop`.

    When the next process falls silent, the store's key ``failed`` tells it to all that are left, and what the silent
    one would have counted up at its end is counted for it: so nobody waits for that either.
    """

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self._rank, self._next, self._store = rank, (rank + 1) % size, store
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        heard, missed = 0, 0
        while missed < SILENT_BEATS:
            try:
                self._store.add(f"beat/{self._rank}", 1)
                now = int(self._store.add(f"beat/{self._next}", 0))
            except RuntimeError:  # the store is gone; the process hears it when it asks for something
                return
            heard, missed = now, 0 if now != heard else missed + 1
            if self._over.wait(BEAT_S):
                return
        self._report()

    def _report(self) -> None:
        text = f"rank {self._next} gives no sign of life any more. Start the same command again to continue"
        body = {"text": text, "keep": True, "silent": self._next}
        try:
            self._store.compare_set("failed", "", json.dumps(body))
            self._store.add("count/stopped", 1)
            self._store.add("count/left" if self._next else "count/cleaned", 1)
        except RuntimeError:
            return
