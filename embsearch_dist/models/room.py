"""Whether the dense part of a model can be made at all, before the memory for it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from embsearch_dist.errors import UserError

COPIES = 4  # weights, gradients and the two moments of Adam
BYTES = 4


def check_room(key: str, inputs: int, layers: Sequence[int]) -> None:
    """Refuse an MLP whose weights, gradients and optimizer state are larger than this machine's main memory.

    Every rank finds the same, wherever it puts the model: a GPU holds less than that.

    Args:
        key: of the config, for the message.
        inputs: width of what goes in.
        layers: widths of the layers in order.

    Raises:
        UserError: says how much it would take and how much there is.
    """
    widths = [inputs, *layers]
    weights = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    need, room = weights * BYTES * COPIES, psutil.virtual_memory().total
    if need > room:
        raise UserError(
            f"config key {key}: layers of {', '.join(f'{w:,}' for w in layers)} units behind {inputs:,} inputs have "
            f"{weights:,} weights; training them takes {need / 2**30:,.1f} GiB, this machine has "
            f"{room / 2**30:,.1f} GiB. Lower it",
            everywhere=True,
        )
