"""Copies of a save: on a GPU into pinned memory that is used again, on the CPU into memory of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from embsearch_dist.train.tensors import HostMemory, copies


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is pinned and waited for, in order."""
    found: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: found.append(("pin", t.shape)) or t)
    monkeypatch.setattr(HostMemory, "wait", lambda self, device: found.append(("wait", device.index)))
    return found


def tree(seed: int, rows: int = 6) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {"tables": {"a": torch.randn(rows, 4), "b": torch.randn(3)}, "step": torch.tensor(float(seed))}


def on_gpu(tensors: Any) -> Any:
    if isinstance(tensors, dict):
        return {k: on_gpu(v) for k, v in tensors.items()}
    return tensors.as_subclass(OnGpu)


def flat(tensors: Any) -> list[torch.Tensor]:
    return [t for v in tensors.values() for t in (flat(v) if isinstance(v, dict) else [v])]


def test_a_gpus_copies_are_pinned_once_and_complete_when_training_goes_on(told: list[Any]) -> None:
    memory, places = HostMemory(), []
    for seed in range(3):
        copied = flat(copies(on_gpu(tree(seed)), None, memory))
        assert all(type(t) is torch.Tensor for t in copied)
        assert all(torch.equal(one, other) for one, other in zip(copied, flat(tree(seed)), strict=True))
        places.append([t.data_ptr() for t in copied])
        assert told.pop() == ("wait", 0)  # the last thing that is done, once for all tensors
    assert places[0] == places[1] == places[2]
    assert told == [("pin", (6, 4)), ("pin", (3,)), ("pin", ())]
    assert memory.bytes == 4 * (24 + 3 + 1)


def test_a_tensor_of_another_shape_gets_memory_of_its_own(told: list[Any]) -> None:
    memory = HostMemory()
    copies(on_gpu(tree(0)), None, memory)
    copied = flat(copies(on_gpu(tree(1, rows=9)), None, memory))
    assert all(torch.equal(one, other) for one, other in zip(copied, flat(tree(1, rows=9)), strict=True))
    assert [what for what in told if what[0] == "pin"][3:] == [("pin", (9, 4))]
    assert memory.bytes == 4 * (36 + 3 + 1)


def test_on_the_cpu_nothing_is_kept_or_pinned(told: list[Any]) -> None:
    memory, live = HostMemory(), tree(0)
    copied = flat(copies(live, None, memory))
    for tensor in flat(live):
        tensor.zero_()
    assert all(torch.equal(one, other) for one, other in zip(copied, flat(tree(0)), strict=True))
    assert memory.bytes == 0
    assert told == []
