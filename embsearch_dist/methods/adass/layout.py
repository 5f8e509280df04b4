"""How a scorer cuts its sample up, and where it works metrics out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SLAB_BYTES = 64 << 20  # terms that are made at a time, when not all are kept


@dataclass(frozen=True)
class Layout:
    """How the sample is cut up, and where metrics are worked out.

    Args:
        chunk_rows: rows whose terms lie together; a pass takes one chunk after another.
        together: metrics of all candidates of a pass at once, where the logits lie; else one by one on the CPU.
    """

    chunk_rows: int
    together: bool


# A CPU keeps the terms of a small chunk in its caches while all candidates of a pass use them. On a GPU each chunk
# costs a number of launches, and it waits at every candidate whose metrics are worked out elsewhere.
CPU = Layout(chunk_rows=128, together=False)
ACCELERATOR = Layout(chunk_rows=8192, together=True)


def layout_for(device: torch.device, rows: int, row_bytes: int = 1) -> Layout:
    """The layout of ``rows`` rows whose terms take ``row_bytes`` each.

    Large chunks are of one size, so that the last need not be filled up. With many fields a chunk is smaller, so
    that its terms are at most :data:`SLAB_BYTES` (on a GPU 16 times as much).
    """
    layout, bound = (CPU, SLAB_BYTES) if device.type == "cpu" else (ACCELERATOR, 16 * SLAB_BYTES)
    size = max(1, min(layout.chunk_rows, bound // row_bytes, rows))
    if device.type != "cpu":
        chunks = -(-rows // size)
        size = -(-rows // chunks)
    return replace(layout, chunk_rows=size)
