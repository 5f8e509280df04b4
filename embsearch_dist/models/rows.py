"""Whole blocks of rows at inference: so that what a row is answered does not depend on the rows beside it.

The libraries behind matrix products take other paths, with other last digits, for batches whose number of rows is small
or odd. Rows of zeros fill every batch up to a multiple of :data:`BLOCK`; then a row has the same logit in the tail of
an evaluation, on any number of ranks, and alone.
"""

from __future__ import annotations

import torch
from torch.nn import functional

BLOCK = 64


def fill_rows(x: torch.Tensor) -> torch.Tensor:
    """``x [B, ...]`` and rows of zeros behind it; ``x`` itself where B is a multiple of the block.

    Programs that are exported do without: a server puts batches together as it likes.
    """
    if torch.compiler.is_exporting():
        return x
    fill = -x.shape[0] % BLOCK
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, fill)) if fill else x
