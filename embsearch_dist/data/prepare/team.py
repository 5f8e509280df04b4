"""The processes that prepare one data set together.

They meet in the key-value store of the launcher (torchrun's, over TCP): it hands out tasks, adds up
progress and carries bad news. Data never pass through it; those lie in the shared ``.partial`` directory.
No process ever waits in the store itself. It looks, sleeps and looks again, so it hears within a second
when another has failed, and within half a minute when another was killed. One process alone needs no store,
and torch is not even imported.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from embsearch_dist.data.prepare.heartbeat import Heartbeat
from embsearch_dist.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
PATIENCE_S = 20.0
LOOK_S = 0.2
MEET_S = 300.0
"""So long the processes wait for each other at the start."""


class Stopped(UserError):
    """Work ended by something other than its input: what is done is kept."""


class Team:
    """This process's place in the team; the default is a team of one.

    Args:
        rank, size: which process of how many this is.
        store: a ``torch.distributed`` store that all of them share, used for this one job.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        if size > 1 and store is None:
            raise ValueError(f"{size} processes need a store to meet in")
        self.rank, self.size, self._store = rank, size, store if size > 1 else None
        self._lock = threading.Lock()
        self._counters: dict[str, int] = {}
        self._looked = 0.0
        self._told = self._heard = False

    def look(self) -> None:
        """Raise :class:`Stopped` if another process has failed; call it now and then from long work."""
        now = time.monotonic()
        if self._store is None or self._told or now - self._looked < LOOK_S:
            return
        self._looked = now
        if not self._ask(lambda store: store.check(["failed"])):
            return
        self._heard = True
        news = json.loads(self._ask(lambda store: store.get("failed")))
        error = Stopped(news["text"]) if news["keep"] else UserError(news["text"])
        error.everywhere = news.get("silent") != 0  # all but rank 0 stay quiet, where there is a rank 0
        raise error

    def add(self, name: str, n: int) -> int:
        """Add to a counter that all share; gives its new value."""
        if self._store is not None:
            return int(self._ask(lambda store: store.add(f"count/{name}", n)))
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + n
            return self._counters[name]

    def claim(self, name: str, tasks: Sequence[T]) -> Iterator[T]:
        """Tasks that no other process or thread has got under this name, from the first on."""
        while (i := self.add(f"claim/{name}", 1) - 1) < len(tasks):
            yield tasks[i]

    def barrier(self, name: str) -> None:
        """Wait until every process has come here."""
        here = self.add(f"barrier/{name}", 1)
        while here < self.size:
            time.sleep(LOOK_S / 4)
            self.look()
            here = self.add(f"barrier/{name}", 0)

    def share(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives (JSON-able) on rank 0, on every process."""
        if self._store is None:
            return make()
        key = f"share/{name}"
        if self.rank == 0:
            text = json.dumps(make())
            self._ask(lambda store: store.set(key, text))
            return json.loads(text)
        while not self._ask(lambda store: store.check([key])):
            self.look()
            time.sleep(LOOK_S / 4)
        return json.loads(self._ask(lambda store: store.get(key)))

    def tell(self, error: BaseException) -> None:
        """Let the others know that this process gives up, and wait (rank 0 alone) until they have stopped.

        The first to tell is the one that all report. Rank 0 may then clean up: nobody writes any more.
        """
        if self._told:
            return
        self._told = True
        if self._store is None:
            return
        is_input = isinstance(error, UserError) and not isinstance(error, Stopped)
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if not isinstance(error, UserError | KeyboardInterrupt):
            text = f"rank {self.rank} failed: {error!r}"
        try:
            self._store.compare_set("failed", "", json.dumps({"text": text, "keep": not is_input}))
            self._store.add("count/stopped", 1)
            if isinstance(error, UserError) and not self._heard:
                error.everywhere = True
            self._until(lambda: self.rank > 0 or self.add("stopped", 0) >= self.size)
        except (RuntimeError, Stopped):  # the store is gone, so there is nobody to tell
            pass

    @contextmanager
    def together(self) -> Iterator[None]:
        """The whole work of this process: all end it, well or with the same error, and none before rank 0.

        A launcher ends the other processes as soon as one has failed, hence the waiting for rank 0,
        which cleans up; and rank 0 may hold the store, so it is the last to leave.
        """
        heart = None if self._store is None else Heartbeat(self.rank, self.size, self._store)
        try:
            if heart is not None:
                heart.start()
            yield
        except BaseException as e:
            self.tell(e)
            raise
        finally:
            if heart is not None:
                self._leave()
                heart.stop()

    def _leave(self) -> None:
        try:
            if self.rank == 0:
                self.add("cleaned", 1)
                self._until(lambda: self.add("left", 0) >= self.size - 1)
            else:
                self._until(lambda: self.add("cleaned", 0) > 0)
                self.add("left", 1)
        except Stopped:  # the store went with rank 0
            pass

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(LOOK_S / 4)

    def _ask(self, question: Callable[[Store], Any]) -> Any:
        assert self._store is not None
        try:
            return question(self._store)
        except RuntimeError as e:
            raise Stopped(
                f"rank {self.rank} has lost the other processes. Start the same command again to continue"
            ) from e


def from_environment() -> Team:
    """The team that torchrun or TorchX describes in the environment; alone without one.

    Raises:
        UserError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Team()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # pages of frames when rank 0, which holds the store, is gone
    import torch.distributed as dist

    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=MEET_S))))
    except (RuntimeError, ValueError) as e:
        raise UserError(f"the {size} processes cannot meet ({e}). Start them with torchrun or torchx") from e
    return Team(rank, size, dist.PrefixStore("prepare", store))
