"""Times on a device: the host's clock is read only once the device has done its work."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tools.bench import clock


class Card:
    """Work that is started at once and done later, as on a GPU: the host's time stands still while it is started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.queued = 100.0, 0.0
        self.device_time = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.wait())
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self, enable_timing))

    def work(self) -> None:
        self.queued += 2.0

    def wait(self) -> None:
        self.host, self.device_time, self.queued = self.host + self.queued, self.device_time + self.queued, 0.0


class Event:
    """Knows the device's time at its place in the queue, but not before that place is reached."""

    def __init__(self, card: Card, enable_timing: bool) -> None:
        assert enable_timing
        self.card, self.at, self.waited = card, 0.0, False

    def record(self) -> None:
        self.at = self.card.device_time + self.card.queued

    def synchronize(self) -> None:
        self.card.wait()

    def elapsed_time(self, later: Any) -> float:
        assert not self.card.queued, "asked before the device was done"
        return 1000 * (later.at - self.at)


def test_now_waits_for_a_gpu_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    card.work()
    assert clock.now("cpu") == clock.now() == 100.0
    assert clock.now("cuda") == clock.now(torch.device("cuda", 0)) == 102.0


def test_marks_on_a_gpu_are_events_in_its_own_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    assert clock.timed(card.work, "cuda", repeats=3, warmup=2) == [2.0, 2.0, 2.0]
    assert card.host == 110.0  # waited once, at the end


def test_marks_on_the_cpu_are_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    marks = clock.Marks("cpu")
    for _ in range(3):
        marks.mark()
    assert marks.seconds() == [0.5, 2.5]
    assert clock.Marks("cuda").seconds() == []


def test_a_benchmarks_parts_hold_the_work_that_was_started_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench.steps import Clock

    card = Card(monkeypatch)
    parts = Clock("cuda")
    for name, pieces in (("forward", 1), ("backward", 2), ("forward", 1)):
        for _ in range(pieces):
            card.work()
        parts.note(name)
    assert parts.parts == {"forward": 4.0, "backward": 4.0}
    parts.start()
    assert parts.parts == {}
