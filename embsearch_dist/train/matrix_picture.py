"""The picture of a heat map for TensorBoard."""

from __future__ import annotations

from typing import Any

import numpy as np

LABELS = 64  # names on an axis at most; of more, every second, third ... is written


def draw_matrix(values: np.ndarray, rows: list[str], columns: list[str], title: str) -> Any:
    """A matrix as an image with its labels. Figure without pyplot: no global state, no display needed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        return _matrix(Figure, values, rows, columns, title)


def _matrix(figure: Any, values: np.ndarray, rows: list[str], columns: list[str], title: str) -> Any:
    tall, wide = values.shape
    fig = figure(figsize=(min(2.5 + 0.35 * wide, 16), min(1.2 + 0.22 * tall, 14)), dpi=90, layout="constrained")
    axes = fig.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis", interpolation="nearest")
    down, right = (-(-n // LABELS) for n in (tall, wide))  # a label takes longer to draw than a thousand cells
    names = [r if len(r) <= 24 else r[:22] + ".." for r in rows[::down]]
    axes.set_yticks(range(0, tall, down), names, fontsize=7)
    long = max(map(len, columns), default=0) > 4
    axes.set_xticks(range(0, wide, right), columns[::right], fontsize=7, rotation=90 if long else 0)
    axes.set_title(title, fontsize=9, loc="left")
    fig.colorbar(image, ax=axes)
    return fig
