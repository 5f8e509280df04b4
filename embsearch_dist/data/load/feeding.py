"""Batches on their way to a GPU: one piece of pinned memory and one copy each, one batch ahead of training.

The thread that reads ahead packs a batch into a free pinned buffer. All talk with the device is left to the thread
that trains: a thread of its own would begin on the first GPU, whatever its rank. The copy runs on a stream of its own
while the batch before is trained on.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.making import BatchMaker, keyed

T = TypeVar("T")
S = TypeVar("S")
ALIGN = 32  # words of 4 bytes: every part begins at a multiple of 128 bytes, as a CUDA allocation would
FLYING = 4  # copies whose end has not been seen; past this the oldest is waited for


@dataclass(frozen=True)
class Packed:
    """A batch in one piece of host memory.

    Attributes:
        buffer: int32 words; it may be longer than the batch.
        pinned: it is one of the ring's.
        spans: first and last word of each part.
        shape: rows and dense columns.
        counts: ids of each key where fields are lists; None: one for each key and row.
    """

    buffer: torch.Tensor
    pinned: bool
    spans: dict[str, tuple[int, int]]
    shape: tuple[int, int]
    counts: list[int] | None
    position: Position

    @property
    def words(self) -> torch.Tensor:
        return self.buffer[: max(stop for _, stop in self.spans.values())]


class Lane:
    """Copies to one CUDA device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def pin(self, words: torch.Tensor) -> torch.Tensor:
        """A copy in pinned memory."""
        return words.pin_memory()

    def copy(self, words: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin to copy pinned words; there they are once the event that comes with them has passed."""
        with torch.cuda.stream(self.stream):
            there = words.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return there, event

    def passed(self, event: Any) -> bool:
        return bool(event.query())

    def wait(self, event: Any) -> None:
        """Make the host wait."""
        event.synchronize()

    def follow(self, there: torch.Tensor, event: Any) -> None:
        """Make the device's ordinary work wait. The allocator must know of it, too: the memory belongs to the copy's
        stream, which would take it for the next batch as soon as Python has let go of this one."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        there.record_stream(stream)


class Feeder:
    """Packs batches, sends them and unpacks them over there, out of a ring of pinned buffers.

    A buffer is free again when its copy has passed. Where none is free the batch is packed into ordinary memory, and
    what sends it pins that: so the ring grows to as many buffers as are in use at a time, about as many as batches
    are read ahead.
    """

    def __init__(self, maker: BatchMaker, lane: Lane) -> None:
        """``maker``: of the thread that trains; it keeps lengths and offsets on the device."""
        self.maker, self.lane = maker, lane
        self._free: collections.deque[torch.Tensor] = collections.deque()  # of both threads; its ends are atomic
        self._flying: collections.deque[tuple[torch.Tensor, Any]] = collections.deque()

    def pack(self, batch: Batch) -> Packed:
        """For the thread that reads ahead; a batch on the CPU."""
        sparse, lists = batch.sparse, any(f.is_list for f in self.maker.fields)
        parts = {"dense": batch.dense, "label": batch.label, "ids": sparse.values()}
        if sparse.weights_or_none() is not None:
            parts["weights"] = sparse.weights()
        if lists:
            parts |= {"lengths": sparse.lengths(), "offsets": sparse.offsets()}
        spans, stop = {}, 0
        for name, part in parts.items():
            start = -(-stop // ALIGN) * ALIGN
            stop = start + part.numel()
            spans[name] = (start, stop)
        buffer = self._take(stop)
        pinned = buffer is not None
        if buffer is None:
            buffer = torch.empty(stop + (stop // 4 if lists else 0), dtype=torch.int32)  # lists: the next has more ids
        for name, part in parts.items():
            buffer[slice(*spans[name])].copy_(part.reshape(-1).view(torch.int32))
        counts = sparse.length_per_key() if lists else None
        return Packed(buffer, pinned, spans, (batch.size, batch.dense.shape[1]), counts, batch.position)

    def _take(self, words: int) -> torch.Tensor | None:
        while True:
            try:  # not by its length: another epoch of the stream may take the last one meanwhile
                buffer = self._free.popleft()
            except IndexError:
                return None
            if len(buffer) >= words:
                return buffer  # one that is too small is forgotten: the larger one takes its place

    def send(self, packed: Packed) -> tuple[Packed, torch.Tensor, Any]:
        """Begin the batch's copy."""
        if not packed.pinned:
            packed = Packed(**{**vars(packed), "buffer": self.lane.pin(packed.buffer), "pinned": True})
        there, event = self.lane.copy(packed.words)
        self._flying.append((packed.buffer, event))
        while self._flying:
            buffer, first = self._flying[0]
            if not self.lane.passed(first):
                if len(self._flying) <= FLYING:
                    break
                self.lane.wait(first)
            self._flying.popleft()
            self._free.append(buffer)
        return packed, there, event

    def receive(self, sent: tuple[Packed, torch.Tensor, Any]) -> Batch:
        """The batch on the device; what the caller starts there from now on begins after the copy."""
        packed, there, event = sent
        self.lane.follow(there, event)
        part = {name: there[slice(*span)] for name, span in packed.spans.items()}
        rows, columns = packed.shape
        if packed.counts is None and "weights" not in part:
            sparse = self.maker.sparse(part["ids"].view(-1, rows))
        else:
            weights = part["weights"].view(torch.float32) if "weights" in part else None
            counts = packed.counts
            assert counts is not None, "fields without lists have no weights"
            sparse = keyed(self.maker.keys, part["ids"], weights, part["lengths"], part["offsets"], rows, counts)
        dense, label = (part[name].view(torch.float32) for name in ("dense", "label"))
        return Batch(dense.view(rows, columns), sparse, label, packed.position)


def one_ahead(items: Iterable[T], begin: Callable[[T], S], end: Callable[[S], Batch]) -> Iterator[Batch]:
    """``end(begin(item))`` of each; the next one is begun before one is handed out."""
    for begun, _ in with_next(map(begin, items)):
        yield end(begun)


def with_next(items: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each item and the one after it, None after the last. If there is none because reading fails, that is raised
    when it is asked for, not before."""
    source, failure = iter(items), None
    item = next(source, None)
    while item is not None:
        try:
            following = next(source, None)
        except Exception as e:
            following, failure = None, e
        yield item, following
        item = following
    if failure is not None:
        raise failure
