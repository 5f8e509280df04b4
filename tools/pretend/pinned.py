"""Which CPU tensors are page-locked. A torch without CUDA cannot lock pages, so storages are only written down."""

from __future__ import annotations

import weakref

import torch

_pinned: dict[int, weakref.ref[torch.UntypedStorage]] = {}


def pin(tensor: torch.Tensor) -> None:
    """Mark the memory of a CPU tensor, and so of all its views, as page-locked for as long as it lives."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()

    def forget(dead: weakref.ref[torch.UntypedStorage]) -> None:
        if _pinned.get(address) is dead:
            del _pinned[address]

    if address:
        _pinned[address] = weakref.ref(storage, forget)


def is_pinned(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True  # nothing is copied
    kept = _pinned.get(tensor.untyped_storage().data_ptr())
    return kept is not None and kept() is not None


def pin_memory(self: torch.Tensor, device: object = None) -> torch.Tensor:
    """``torch.Tensor.pin_memory``."""
    if is_pinned(self) and self.numel():
        return self
    copy = self.detach().clone(memory_format=torch.contiguous_format)
    pin(copy)
    return copy
