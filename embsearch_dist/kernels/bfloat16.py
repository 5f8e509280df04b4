"""Which devices multiply in bfloat16 at least as fast as in float32."""

from __future__ import annotations

import warnings

import torch

INSTRUCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu; older versions lack the second


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays there: on GPUs, and on processors with instructions for it (AVX512-BF16, AMX).

    Others convert every number to float32 and back: products take several times as long as in float32.
    """
    if device.type != "cpu":
        return True
    return any(getattr(torch.cpu, name, lambda: False)() for name in INSTRUCTIONS)


def warn_if_slow(device: torch.device) -> None:
    """Say that a model whose products are to be in bfloat16 is slower for it on this device, where that is so."""
    if not multiplies_bfloat16(device):
        text = "model.precision: this processor has no instructions for bfloat16; float32 is several times faster on it"
        warnings.warn(text, stacklevel=2)
