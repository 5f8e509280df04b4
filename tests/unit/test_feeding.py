"""The way of batches to a GPU, over a lane that copies as late as a GPU may: the same batches, one copy each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embsearch_dist.data.load import dataset as module
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import BatchStream
from embsearch_dist.data.load.feeding import ALIGN, FLYING, Feeder, one_ahead
from embsearch_dist.schema import Schema
from tests.factories import prepared
from tests.raw_lists import prepared_lists

CUDA = torch.device("cuda", 0)


class LateLane:
    """Stands for :class:`embsearch_dist.data.load.feeding.Lane`: a copy is done when somebody waits for it, no sooner,
    and its event passes ``lag`` copies after that."""

    def __init__(self, device: torch.device = CUDA, lag: int = 1) -> None:
        self.thread, self.lag = threading.current_thread(), lag
        self.copies: list[SimpleNamespace] = []
        self.pinned: list[torch.Tensor] = []
        self.waited = 0

    def here(self) -> None:
        assert threading.current_thread() is self.thread, "only the thread that trains may talk to the device"

    def pin(self, words: torch.Tensor) -> torch.Tensor:
        self.here()
        self.pinned.append(words.clone())
        return self.pinned[-1]

    def copy(self, words: torch.Tensor) -> tuple[torch.Tensor, SimpleNamespace]:
        self.here()
        storage = words.untyped_storage().data_ptr()
        assert any(p.untyped_storage().data_ptr() == storage for p in self.pinned), "pageable memory"
        event = SimpleNamespace(words=words, there=torch.full_like(words, -7), done=None)
        self.copies.append(event)
        return event.there, event

    def finish(self, event: SimpleNamespace) -> None:
        self.here()
        if event.done is None:
            event.there.copy_(event.words)
            event.done = len(self.copies)

    def passed(self, event: SimpleNamespace) -> bool:
        return event.done is not None and len(self.copies) >= event.done + self.lag

    def wait(self, event: SimpleNamespace) -> None:
        self.waited += 1
        self.finish(event)

    def follow(self, there: torch.Tensor, event: SimpleNamespace) -> None:
        assert there is event.there
        self.finish(event)


@pytest.fixture(params=["one id each", "lists"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "lists":
        return prepared_lists(tmp_path_factory.getbasetemp() / "feeding lists", rows=1000)
    return prepared(tmp_path_factory)


def parts(batch: Batch) -> list[Any]:
    """All that a batch is made of, in memory of its own."""
    s = batch.sparse
    tensors = [batch.dense, batch.label, s.values(), s.weights_or_none(), s.lengths(), s.offsets()]
    return [*(None if t is None else t.clone() for t in tensors), s.length_per_key(), s.offset_per_key(), s.stride()]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def stream(data: Path, split: str = "train", device: torch.device | None = CUDA, **options: Any) -> BatchStream:
    return BatchStream(data, Schema.load(data), split, 96, device=device, **options)


@pytest.mark.parametrize("lag", [1, 1000])
@pytest.mark.parametrize("prefetch", [2, 0])
def test_the_batches_are_the_same_with_one_copy_each(
    data: Path, prefetch: int, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Lane", lambda device: LateLane(device, lag))
    for split, shuffle in (("train", True), ("validation", False)):
        plain = stream(data, split, None, shuffle=shuffle, prefetch=prefetch)
        fed = stream(data, split, shuffle=shuffle, prefetch=prefetch)
        lane: Any = fed._feeder.lane  # type: ignore[union-attr]
        count = 0
        for epoch in range(2):
            for k, (batch, expected) in enumerate(zip(fed.epoch(epoch), plain.epoch(epoch), strict=True)):
                assert same(parts(batch), parts(expected))
                assert batch.position == expected.position
                count += 1
                last = k + 1 == plain.batches_per_epoch
                assert len(lane.copies) == count + (0 if last else 1)  # the next one is on its way
        # Buffers: those read ahead, one being packed, two in hand, and those whose copies have not been seen to pass.
        # Of lists, a larger one takes the place of one that has become too small.
        if not any(f.is_list for f in fed.schema.fields):
            assert len(lane.pinned) <= prefetch + 3 + (1 if lag == 1 else FLYING)
        assert (lane.waited > 0) == (len(lane.copies) > FLYING and lag > 1)


def test_parts_begin_where_an_allocation_would(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Lane", LateLane)
    batch = next(iter(stream(data).epoch(0)))
    base = batch.dense.untyped_storage().data_ptr()
    for part in (batch.dense, batch.label, batch.sparse.values()):
        assert part.untyped_storage().data_ptr() == base  # views of one copy
        assert (part.data_ptr() - base) % (4 * ALIGN) == 0


def test_lengths_of_single_ids_are_made_once_for_a_batch_size(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Lane", LateLane)
    first, second, *_ = stream(prepared(tmp_path_factory)).epoch(0)
    assert first.sparse.lengths() is second.sparse.lengths()
    assert first.sparse.offsets() is second.sparse.offsets()


def test_a_buffer_in_use_is_never_packed_into(data: Path) -> None:
    schema = Schema.load(data)
    lane = LateLane(lag=0)
    feeder = Feeder(module.BatchMaker(schema), lane)  # type: ignore[arg-type]
    made = list(stream(data, device=None).epoch(0))[:4]
    sent = [feeder.send(feeder.pack(batch)) for batch in made]  # no copy has passed: each needs memory of its own
    assert len({packed.buffer.data_ptr() for packed, *_ in sent}) == len(made)
    for batch, one in zip(made, sent, strict=True):
        assert same(parts(feeder.receive(one)), parts(batch))
    feeder.send(feeder.pack(made[0]))  # sees that the copies have passed
    assert feeder.pack(made[1]).pinned


def test_what_fails_ahead_is_raised_after_the_batches_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("row group 3")

    begun: list[int] = []

    def begin(item: int) -> int:
        begun.append(item)
        return item

    ahead = one_ahead(source(), begin, lambda item: item)  # type: ignore[arg-type,return-value]
    assert next(ahead) == 1
    assert begun == [1, 2]
    assert next(ahead) == 2
    with pytest.raises(OSError, match="row group 3"):
        next(ahead)


def test_leaving_an_epoch_stops_its_thread_and_the_next_is_whole(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Lane", LateLane)
    before = threading.active_count()
    fed = stream(data)
    batches = fed.epoch(0)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert sum(1 for _ in fed.epoch(0)) == fed.batches_per_epoch
