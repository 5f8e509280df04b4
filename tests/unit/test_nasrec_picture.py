"""The picture of an architecture: lines that do not touch, text that fits, what is dead left without lines."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.sampling import SCHEMES
from embsearch_dist.networks.sampling import draw as draw_architecture
from embsearch_dist.networks.space import SPACES, Space, full
from embsearch_dist.report.network_picture import BOX, draw, lay_lines, save
from embsearch_dist.report.style import DARK, LIGHT, WIDTH, Theme

FULL = SPACES["full"]
FIRST = Block(("dot_product",), 1024, ("attention",), 64, (0,), (0,), (), (), True, True)
DEAD = Block(("sum",), 32, ("efc",), 48, (1,), (1,), (1,), (0,), True, True)
LAST = Block(("gating",), 768, ("efc",), 16, (), (1,), (1,), (0,), False, False)
THREE = Architecture((FIRST, DEAD, LAST))
BOX_TEXTS = ("Dense input", "Embeddings", "Dot product", "Attention", "1024 columns", "64 + 8 tokens")


def architectures() -> list[Architecture]:
    generator = np.random.default_rng(0)
    return [draw_architecture(FULL, SCHEMES[k % 3], generator) for k in range(30)] + [full(FULL), THREE]


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.axes[0].texts]


def test_every_read_has_a_dot_and_no_two_lines_touch() -> None:
    for a in architectures():
        blocks = prune(a)
        for branch, keys in (("dense", ("dense_sources", "left", "right")), ("sparse", ("sparse_sources",))):
            lines = lay_lines(blocks, branch)
            reads = [s for block in blocks if block for key in keys for s in getattr(block, key)]
            assert sum(len(line.taps) for line in lines) == len(reads)
            assert len(lines) == len(set(reads))
            for k, line in enumerate(lines):
                assert line.start < line.taps[0]  # from left to right
                for other in lines[:k]:
                    apart = line.taps[-1] < other.start or other.taps[-1] < line.start
                    assert line.track != other.track or apart


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_stays_in_the_picture_and_in_its_box(theme: Theme) -> None:
    for a in (THREE, full(FULL), architectures()[0]):
        with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
            figure = draw(theme, a, FULL, 13, 26, "A title")
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        width, height = figure.get_size_inches() * figure.dpi
        for text in figure.axes[0].texts:
            box = text.get_window_extent(canvas.get_renderer())
            assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height or not text.get_text()
            if text.get_text() in BOX_TEXTS:
                assert box.width < BOX * figure.dpi


def test_the_picture_names_operators_widths_and_mergers() -> None:
    found = texts(draw(LIGHT, THREE, FULL, 13, 26, "Found"))
    for text in ("Found", "Dot product", "1024 columns", "Attention", "64 + 8 tokens", "+8", "FM", "Gating", "L", "R",
                 "16 tokens", "13 columns", "26 fields", "Linear", "unused"):  # fmt: skip
        assert text in found, text
    assert found.count("+8") == found.count("FM") == 1  # those of the dead block are left out
    assert "grey: does not enter the prediction" in "".join(found)
    alone = texts(draw(LIGHT, Architecture((FIRST,)), FULL, 1, 1))
    assert "1 column" in alone
    assert "unused" not in alone
    assert "grey" not in "".join(alone)


def test_saving_writes_a_png(tmp_path: Path) -> None:
    seven = architectures()[0]
    path = save(tmp_path / "new" / "architecture", seven, FULL, 13, 26)
    assert path == tmp_path / "new" / "architecture.png"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] == round(WIDTH * 150)
    assert len(np.unique(pixels[..., 0])) > 20
    small = Space(1, ("fc",), ("efc",), (16,), (16,))
    block = Block(("fc",), 16, ("efc",), 16, (0,), (0,), (), (), False, False)
    assert save(tmp_path / "one.png", Architecture((block,)), small, 0, 3).exists()
