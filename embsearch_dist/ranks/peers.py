"""Signs of life of all ranks: who is lost is told in one line by every rank that is left, and nobody waits for it.

A collective knows that it waits, not for whom, nor whether that rank still works. So each rank counts up a number in
the store that the ranks have met in, and reads those of the others. A rank whose number stands still for
``dist.timeout_s`` is lost: the others end, wherever they wait. Where a collective fails earlier, because a connection
broke, the numbers tell whose (:func:`explain`). A rank that works for long, without a collective, is not lost.

Beats are counted, not seconds, so ranks that are all stopped for a while do not take each other for lost.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from embsearch_dist.ranks.environment import attempt, is_torchrun
from embsearch_dist.ranks.torchrun import AGAIN, BUG
from embsearch_dist.rundir import warned_of_anew

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_S = 0.5
SILENT_BEATS = 5
"""After an error of the network: so many beats without one of another rank's, and it was that one."""
LAUNCHER_S = 10
"""So long a launcher may take to end after its ranks, seconds. One that asks a host that is gone would never."""
LEFT, FAILED = "left", "failed"
NETWORK = re.compile(r"gloo|NCCL|nccl|TCPStore|[Cc]onnection (closed|reset|refused|was)|[Bb]roken pipe|socket")

_opened = False


def note_opened() -> None:
    """This process has joined its group."""
    global _opened
    _opened = True


def group_was_opened() -> bool:
    """Whether this process has joined its group yet; what fails before that fails on all ranks alike."""
    return _opened


@dataclass(frozen=True)
class Ending:
    """What a rank says and ends with."""

    text: str
    code: int


class Peers:
    """Beats for this rank and listens to the others from :meth:`start` to :meth:`leave`."""

    def __init__(self, rank: int, size: int, store: Store, limit_s: float, beat_s: float = BEAT_S) -> None:
        """
        Args:
            store: a connection of its own, because a question to a host that is gone is never answered.
            limit_s: silence after which a rank is lost, seconds.
        """
        self._rank, self._size, self._store, self._limit = rank, size, store, limit_s
        self._pause = beat_s
        self._beat = 0
        self._heard = dict.fromkeys(range(size), 0)  # own beat at which a rank's number was last a new one
        self._words = dict.fromkeys(range(size), ("", ""))  # what it said then: (number or LEFT or FAILED, host)
        self._stuck = 0  # beats since the store has answered
        self._own_word = ""
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def leave(self, word: str = LEFT) -> None:
        """Beat no more; the others read why."""
        self._own_word = word
        self._over.set()
        self._threads[0].join(timeout=2)  # it hangs where the store's host is gone

    def gone(self) -> Ending | None:
        """Who is lost, or has failed, after an error of the network; None where all give signs of life."""
        # A number written just before the end may still be a new one to an answer that was under way, or to the next.
        begin, ticks = self._beat + 2, 0
        others = [r for r in range(self._size) if r != self._rank]
        while missing := [r for r in others if self._heard[r] <= begin or self._ended(r)]:
            if self._beat >= begin + SILENT_BEATS - 2 or ticks >= 2 * SILENT_BEATS:
                break
            time.sleep(self._pause)
            ticks += 1
        if not missing:
            return None
        if self._beat <= begin:
            return self._lost(self._beside_store())
        failed = [r for r in others if self._words[r][0] == FAILED]
        if failed:
            verb = "has" if len(failed) == 1 else "have"
            return Ending(f"{self._named(failed)} {verb} failed and so ends this one; the lines above say why", BUG)
        return self._lost(missing)

    def _talk(self) -> None:
        """Ask the store every beat; ends where it answers no more."""
        keys = [f"beat/{attempt()}/{r}" for r in range(self._size)]
        host = socket.gethostname()
        try:
            while not self._over.is_set():
                self._store.set(keys[self._rank], f"{self._beat} {host}")
                self._hear([bytes(word).decode() for word in self._store.multi_get(keys)])
                self._over.wait(self._pause)
            self._store.set(keys[self._rank], f"{self._own_word} {host}")
        except RuntimeError:
            return

    def _hear(self, told: list[str]) -> None:
        self._beat += 1
        for rank, text in enumerate(told):
            word, _, host = text.partition(" ")
            if (word, host) != self._words[rank]:
                self._words[rank], self._heard[rank] = (word, host), self._beat

    def _watch(self) -> None:
        """End this process where a rank has been silent for too long."""
        limit, before = max(1, round(self._limit / self._pause)), 0
        while not self._over.wait(self._pause):
            self._stuck = self._stuck + 1 if self._beat == before else 0
            before = self._beat
            silent = [r for r, beat in self._heard.items() if before - beat >= limit and not self._ended(r)]
            if self._stuck >= limit or silent:
                end(self._lost(silent or self._beside_store()), hopeless=True)

    def _ended(self, rank: int) -> bool:
        return self._words[rank][0] in (LEFT, FAILED)

    def _beside_store(self) -> list[int]:
        """The ranks of the host that serves the store, which rank 0 is on; those of this host are not lost."""
        hosts = {r: host for r, (_, host) in self._words.items()}
        if unheard := [r for r, host in hosts.items() if not host and r != self._rank]:
            return unheard
        return [r for r, host in hosts.items() if r == 0 or (host == hosts[0] != hosts[self._rank])]

    def _lost(self, ranks: list[int]) -> Ending:
        beats = self._stuck + self._beat - min(self._heard[r] for r in ranks)
        seconds = max(1, round(beats * self._pause))
        return Ending(f"lost {self._named(ranks)} after {seconds} s; start the same command again to continue", AGAIN)

    def _named(self, ranks: list[int]) -> str:
        hosts = sorted({self._words[r][1] or "an unknown host" for r in ranks})
        many = "rank" if len(ranks) == 1 else "ranks"
        return f"{many} {', '.join(map(str, ranks))} on {', '.join(hosts)}"


_peers: Peers | None = None


def watch(rank: int, size: int, limit_s: float) -> None:
    """Begin, where ranks meet in a store that can be reached by its address: those that a launcher has started."""
    global _peers
    if size < 2 or "MASTER_ADDR" not in os.environ:
        return
    from datetime import timedelta

    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=2 * limit_s)  # else its warning comes beside our line
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
    _peers = Peers(rank, size, store, limit_s)
    _peers.start()


def leave(error: BaseException | None = None) -> None:
    """This rank leaves its group: in order, by its own error, or by one of the network, which is to be explained."""
    if _peers is not None and not of_the_network(error):
        _peers.leave(FAILED if isinstance(error, Exception) else LEFT)


def of_the_network(error: BaseException | None) -> bool:
    """Whether an error may come from a rank that is gone."""
    while isinstance(error, Exception):
        if isinstance(error, RuntimeError) and NETWORK.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain(error: BaseException) -> Ending | None:
    """What an error of the network comes from; None for another error, or where no rank is gone. Takes seconds."""
    if _peers is None or not of_the_network(error):
        return None
    ending = _peers.gone()
    _peers.leave(FAILED if ending is None else LEFT)
    return ending


def end(ending: Ending, hopeless: bool = False) -> None:
    """Say it and end this process at once, and its launcher where that hangs.

    Args:
        hopeless: the lost host was silent for so long that ranks are not to be started again without it.
    """
    print(warned_of_anew(ending.text) if ending.code == AGAIN else ending.text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if ending.code == AGAIN:
        _end_launcher(hopeless)
    os._exit(ending.code)


_WAIT = """
import os, sys, time
launcher, rank, again, seconds = sys.argv[1].split("/"), sys.argv[2].split("/"), sys.argv[3] == "1", float(sys.argv[4])
def is_there(process):
    try:
        return open(f"/proc/{process[0]}/stat").read().rpartition(")")[2].split()[19] == process[1]
    except OSError:
        return False
end = time.monotonic() + seconds
while is_there(launcher) and time.monotonic() < end:
    time.sleep(0.2)
if is_there(launcher) and (is_there(rank) or not again):
    os.kill(int(launcher[0]), 9)
"""


def _end_launcher(hopeless: bool) -> None:
    """Leave a process that ends torchrun if it hangs: if it has not ended after ``LAUNCHER_S``, or, where it may start
    ranks again, has not even noticed that this one ended. ``hopeless``: it is told to start none again."""
    parent = os.getppid()
    if os.environ.get("LOCAL_RANK") != "0" or not is_torchrun(parent):
        return
    again = not hopeless and attempt() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    # A number alone may be another process's by then.
    words = [
        f"{pid}/{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}" for pid in (parent, os.getpid())
    ]
    words += [str(int(again)), str(LAUNCHER_S)]
    # Of a session of its own: torchrun ends those of its ranks.
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WAIT, *words],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if hopeless:
        os.kill(parent, signal.SIGTERM)
