"""Which device this process pretends to have."""

from __future__ import annotations

import os
from typing import Any

import torch

DEVICES = "EMBSEARCH_PRETEND_DEVICES"
"""How many devices this machine pretends to have; default: as many as ranks."""

_current = 0


def current() -> int:
    return _current


def set_current(index: int) -> None:
    global _current
    _current = index


def count() -> int:
    return int(os.environ.get(DEVICES) or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def device() -> torch.device:
    return torch.device("cuda", _current)


def is_cuda(device: Any) -> bool:
    """Whether what stands for a device (a name, a number, None) means this one."""
    if device is None or isinstance(device, bool):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"
