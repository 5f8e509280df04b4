"""Chance of a step: numbers for the rows of its global batch, from (seed, step) alone."""

from __future__ import annotations

import numpy as np
import torch


def stream_seed(seed: int, step: int, first: int) -> int:
    """A rank's seed for a step; generators take 64 bits, which a seed like 20261129 would overflow."""
    return ((seed * 1_000_003 + step) * 1_000_033 + first) % 2**64


def uniform_noise(seed: int, step: int, first: int, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Numbers in (0, 1) for rows ``first, first + 1, ...`` of a global batch: the same for any number of ranks on CPU.

    Philox is counter-based: a rank jumps to its rows. ``shape [B, C]``, C even. On a GPU each rank has a stream of
    its own (making the numbers on the host would cost more than the rest of the step).
    """
    rows, columns = shape
    if device.type == "cuda":
        generator = torch.Generator(device).manual_seed(stream_seed(seed, step, first))
        return torch.rand(shape, generator=generator, device=device).clamp_(1e-7, 1 - 1e-7)
    # 64 random bits make two numbers, and a step of the counter is four times 64 bits.
    bits = np.random.Philox(key=np.array([seed, step], np.uint64))
    start = first * columns // 2
    bits.advance(start // 4)
    words = bits.random_raw(start % 4 + (rows * columns + 1) // 2)[start % 4 :]
    # Halves of a signed number: torch has no kernels for unsigned ones.
    halves = torch.from_numpy(words.view(np.int32))[: rows * columns].reshape(shape)
    return halves.float().mul_(2**-32).add_(0.5).clamp_(1e-7, 1 - 1e-7)
