"""Signs of life of ranks: who is lost, who has failed, and who only works for long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from embsearch_dist.ranks import peers
from embsearch_dist.ranks.peers import FAILED, LEFT, Ending, Peers, of_the_network

BEAT_S = 0.03
FOREVER_S = 1000


class Others:
    """Ranks 1 and 2, who say what they are told to."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.words = store, {1: "alive", 2: "alive"}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def start(self) -> None:
        for rank in self.words:
            self._say(rank, "0")
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _talk(self) -> None:
        beat = 0
        while not self._over.wait(BEAT_S / 4):
            beat += 1
            for rank, word in self.words.items():
                if word != "dead":
                    self._say(rank, str(beat) if word == "alive" else word)

    def _say(self, rank: int, word: str) -> None:
        self.store.set(f"beat/0/{rank}", f"{word} host-{rank}")


@pytest.fixture
def others() -> Iterator[Others]:
    found = Others(dist.HashStore())
    found.start()
    yield found
    found.stop()


@pytest.fixture
def rank0(others: Others) -> Iterator[Callable[[float], Peers]]:
    made: list[Peers] = []

    def make(limit_s: float) -> Peers:
        made.append(Peers(0, 3, others.store, limit_s, BEAT_S))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.leave()


def test_ranks_that_are_alive_are_not_lost(rank0: Callable[[float], Peers]) -> None:
    assert rank0(FOREVER_S).gone() is None


@pytest.mark.parametrize("word", ["dead", LEFT])
def test_the_one_that_is_silent_or_has_left_is_named(
    others: Others, rank0: Callable[[float], Peers], word: str
) -> None:
    own = rank0(FOREVER_S)
    assert own.gone() is None
    others.words[2] = word
    ending = own.gone()
    assert ending is not None and ending.code == 75
    assert ending.text.startswith("lost rank 2 on host-2 after ")
    assert ending.text.endswith(" s; start the same command again to continue")


def test_one_that_has_failed_by_itself_is_not_worth_a_new_start(
    others: Others, rank0: Callable[[float], Peers]
) -> None:
    others.words[1] = FAILED
    ending = rank0(FOREVER_S).gone()
    assert ending == Ending("rank 1 on host-1 has failed and so ends this one; the lines above say why", 1)


def test_a_rank_that_waits_ends_when_others_are_silent_for_too_long(
    others: Others, rank0: Callable[[float], Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Ending] = []
    ended = threading.Event()
    monkeypatch.setattr(peers, "end", lambda ending, hopeless: (told.append(ending), ended.set()))
    others.words[1] = LEFT  # in order: it is done. Rank 2 is alive, though it calls no collective
    rank0(30 * BEAT_S)
    assert not ended.wait(50 * BEAT_S)
    others.words[2] = "dead"
    assert ended.wait(60)
    assert told[0].code == 75 and "rank 2 on host-2" in told[0].text


def test_a_store_that_answers_no_more_was_on_the_host_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    told: list[Ending] = []
    monkeypatch.setattr(peers, "end", lambda ending, hopeless: (told.append(ending), ended.set()))

    class Dying(dist.Store):
        def set(self, key: str, value: str) -> None:
            pass

        def multi_get(self, keys: list[str]) -> list[bytes]:
            if ended.is_set() or own._beat == 3:
                raise dist.DistNetworkError("closed")
            return [b"%d %s" % (own._beat, host) for host in (b"a", b"a", b"b", b"b")]

    own = Peers(2, 4, Dying(), 10 * BEAT_S, BEAT_S)
    own.start()
    assert ended.wait(60)
    own.leave()
    assert told[0].text.startswith("lost ranks 0, 1 on a after ")


def test_errors_of_the_network_are_told_from_others() -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.77.0.2]:43210")
    assert of_the_network(closed)
    told = ValueError("while saving")
    told.__cause__ = closed
    assert of_the_network(told)
    assert not of_the_network(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert not of_the_network(None) and not of_the_network(KeyboardInterrupt())
