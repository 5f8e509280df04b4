"""Random generators of the device: CPU ones that know they are not."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tools.pretend import state

CPUGenerator = torch.Generator
# By address: C++ hands operators another Python object for the same generator.
_known: weakref.WeakValueDictionary[int, PretendGenerator] = weakref.WeakValueDictionary()


class PretendGenerator(CPUGenerator):
    """``torch.Generator("cuda")``; its numbers are those of a CPU generator with the same seed, not those of a card."""

    @staticmethod
    def __new__(cls, device: Any = "cuda") -> PretendGenerator:
        made: PretendGenerator = CPUGenerator.__new__(cls, "cpu")  # type: ignore[assignment]
        _known[made._cdata] = made  # type: ignore[attr-defined]
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return state.device()


def on_device(generator: Any) -> bool:
    """Whether a generator, or what C++ made of it, is one of the device."""
    return generator._cdata in _known


class _Choose(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, CPUGenerator)


class Generator(metaclass=_Choose):
    """What stands in for ``torch.Generator``: makes one of the place that is asked for."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return PretendGenerator(device) if state.is_cuda(device) else CPUGenerator(device)
