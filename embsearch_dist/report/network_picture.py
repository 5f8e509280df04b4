"""A picture of an architecture: blocks from left to right, the dense branch above the sparse one.

Every output that is read runs along a line of its own, over the blocks (dense) or under them (sparse); a dot on the
line is a reader. What the prediction does not depend on is grey and has no lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from embsearch_dist.networks.architecture import Architecture, Block
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.cost import Cost, network_cost
from embsearch_dist.networks.space import Space
from embsearch_dist.report.style import WIDTH, Theme, figure, render, si

NAMES = {
    "fc": "FC", "dot_product": "Dot product", "gating": "Gating", "sum": "Sum", "efc": "EFC", "attention": "Attention",
}  # fmt: skip
# Inches. One unit of the axes is an inch, so that text and boxes fit each other at any number of blocks.
COLUMN = WIDTH / 9  # seven blocks, input and head fill the page
BOX, LINE, MIDDLE, MARGIN = 0.89, 0.14, 0.55, 0.12
HEADER, LEGEND = 0.7, 0.15  # height of the title and numbers; of a line of the legend
NEAR = 0.24  # from a box to the nearest track
OUT = 0.33  # where a line leaves a box, from the middle of its column
READ = (-0.33, -0.19, -0.05)  # where lines enter a box


@dataclass(frozen=True)
class Line:
    """An output that is read.

    Attributes:
        start: x where it leaves its block, inches.
        taps: x where it is read, ascending.
        track: how far from the boxes it runs, 0 = nearest.
    """

    start: float
    taps: tuple[float, ...]
    track: int


def draw(theme: Theme, architecture: Architecture, space: Space, n_dense: int, fields: int, title: str = "") -> Figure:
    """The blocks of an architecture, and what each costs on data of ``n_dense`` dense columns and ``fields`` fields.

    To be called by :func:`embsearch_dist.report.style.render`, or within its settings.
    """
    blocks = prune(architecture)
    lines = {branch: lay_lines(blocks, branch) for branch in ("dense", "sparse")}
    width = max(COLUMN * (len(blocks) + 2), 0.45 * WIDTH)
    legend = _wrapped(_legend(blocks, space), int(width * 15.5))
    graph = _Graph(theme, _place(architecture, lines, len(legend)), space)
    top = graph.top
    fig = figure(top + HEADER, width)
    fig.set_layout_engine("none")
    graph.axes = fig.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(0, top + HEADER))
    graph.axes.axis("off")
    for branch, of_branch in lines.items():
        graph.lines(of_branch, branch)
    read = {branch: any(line.start == _center(0) + OUT for line in lines[branch]) for branch in lines}
    graph.box(0, "dense", ["Dense input"], _count(n_dense, "column"), not read["dense"])
    graph.box(0, "sparse", ["Embeddings"], _count(fields, "field"), not read["sparse"])
    for number, (block, live) in enumerate(zip(architecture.blocks, blocks), 1):
        graph.block(number, block, live)
    graph.head(len(blocks) + 1)
    cost = network_cost(architecture, space, n_dense, fields)
    graph.number(0, "Input")
    for number, own in enumerate(cost.blocks, 1):
        graph.number(number, str(number), None if blocks[number - 1] is None else own)
    graph.number(len(blocks) + 1, "Head", cost.head)
    total = f"{si(cost.total.parameters)} parameters · {si(cost.total.flops)} FLOPs"
    graph.text(MARGIN, top + HEADER - 0.16, title or "Architecture", 9.5, ha="left", fontweight="bold")
    graph.text(width - MARGIN, top + HEADER - 0.16, total, 8.5, ha="right", color=theme.muted)
    for k, text in enumerate(reversed(legend)):
        graph.text(MARGIN, MARGIN + LEGEND * (k + 0.5), text, 7, ha="left", color=theme.muted)
    return fig


def save(
    path: Path | str, architecture: Architecture, space: Space, n_dense: int, fields: int, title: str = ""
) -> Path:
    """Write the picture, in the light theme, to ``path`` with the ending ``.png``; returns where it is."""
    path = Path(path).with_suffix(".png")
    render(path.stem, lambda theme: draw(theme, architecture, space, n_dense, fields, title), path.parent)
    return path


def lay_lines(blocks: Sequence[Block | None], branch: str) -> list[Line]:
    """The lines of a branch of pruned blocks. Short ones run next to the boxes; none that share a track touch."""
    taps: dict[int, list[float]] = {}
    for number, block in enumerate(blocks, 1):
        for key, x in _reads(block, branch, number):
            for source in getattr(block, key):
                taps.setdefault(source, []).append(x)
    tracks: list[list[tuple[float, float]]] = []
    lines = []
    for _, source in sorted((max(xs) - _center(source), source) for source, xs in taps.items()):
        start, end = _center(source) + OUT, max(taps[source])
        free = (k for k, used in enumerate(tracks) if all(end < a - 0.05 or start > b + 0.05 for a, b in used))
        track = next(free, len(tracks))
        if track == len(tracks):
            tracks.append([])
        tracks[track].append((start, end))
        lines.append(Line(start, tuple(sorted(taps[source])), track))
    return lines


@dataclass(frozen=True)
class _Row:
    """Where the boxes of a branch stand, and the side their lines are on."""

    bottom: float
    height: float
    up: bool

    @property
    def edge(self) -> float:
        return self.bottom + self.height if self.up else self.bottom

    def away(self, distance: float) -> float:
        """y at a distance from the boxes, on the lines' side."""
        return self.edge + (distance if self.up else -distance)

    def track(self, track: int) -> float:
        return self.away(NEAR + LINE * track)


class _Graph:
    """Draws each part at its place; ``axes`` is set once the size is known."""

    axes: Axes

    def __init__(self, theme: Theme, place: tuple[dict[str, _Row], float], space: Space) -> None:
        self.theme, self.space = theme, space
        self.rows, self.top = place
        self.colors = {"dense": theme.color(0), "sparse": theme.color(1)}

    def block(self, number: int, block: Block, live: Block | None) -> None:
        tokens = _count(block.sparse_width, "token")
        if live and live.dense_to_sparse:
            tokens = f"{block.sparse_width} + {_count(self.space.tokens, 'token')}"
        if block.dense:
            names = [NAMES[o] for o in block.dense]
            self.box(number, "dense", names, _count(block.dense_width, "column"), not (live and live.dense))
        if block.sparse:
            self.box(number, "sparse", [NAMES[o] for o in block.sparse], tokens, not (live and live.sparse))
        if not live:
            return
        for branch, row in self.rows.items():
            for key, x in _reads(live, branch, number):
                self.arrow((x, row.away(0.1)), (x, row.edge), self.colors[branch])
                if "gating" in live.dense and key in ("left", "right"):
                    self.text(x + (0.06 if key == "right" else -0.06), row.away(0.1), key[0].upper(), 6)
        if "dot_product" in live.dense:
            self.tokens_to_product(number)
        self.mergers(number, live)

    def box(self, number: int, branch: str, names: Sequence[str], size: str, dead: bool) -> None:
        row, x = self.rows[branch], _center(number)
        self.frame(x, row.bottom, row.height, self.theme.cloud if dead else self.colors[branch], dead)
        ink, muted = (self.theme.cloud, self.theme.cloud) if dead else (self.theme.ink, self.theme.muted)
        first = row.bottom + row.height / 2 + LINE * len(names) / 2
        for k, name in enumerate(names):
            self.text(x, first - LINE * k, name, 7.8, color=ink, fontweight="normal" if dead else "bold")
        self.text(x, first - LINE * len(names), size, 7.3, color=muted)

    def head(self, number: int) -> None:
        dense, sparse = self.rows["dense"], self.rows["sparse"]
        x, height = _center(number), dense.edge - sparse.edge
        self.frame(x, sparse.edge, height, self.theme.ink, False)
        self.text(x, sparse.edge + height / 2 + LINE / 2, "Linear", 7.8, fontweight="bold")
        self.text(x, sparse.edge + height / 2 - LINE / 2, "1 logit", 7.3, color=self.theme.muted)
        for branch, row in self.rows.items():
            y = row.bottom + row.height / 2
            self.arrow((_center(number - 1) + BOX / 2, y), (x - BOX / 2, y), self.colors[branch])

    def lines(self, lines: Sequence[Line], branch: str) -> None:
        """Each line from its box along its track, and one way down for all that is read at a place."""
        row, color = self.rows[branch], self.colors[branch]
        furthest: dict[float, int] = {}
        for line in lines:
            y = row.track(line.track)
            self.way([line.start, line.start, line.taps[-1]], [row.edge, y, y], color)
            for x in line.taps:
                self.dot(x, y, color)
                furthest[x] = max(line.track, furthest.get(x, 0))
        for x, track in furthest.items():
            self.way([x, x], [row.track(track), row.away(0.1)], color)

    def tokens_to_product(self, number: int) -> None:
        """What a block reads of the sparse branch, up to its dot product: past its own sparse box, on the left."""
        color, row, high = self.colors["sparse"], self.rows["sparse"], self.rows["dense"].bottom
        x, side = _center(number) + READ[0], _center(number) - COLUMN / 2
        y, up = row.away(0.14), high - 0.15
        self.way([x, side, side, x], [y, y, up, up], color)
        self.dot(x, y, color)
        self.arrow((x, up), (x, high), color)

    def mergers(self, number: int, live: Block) -> None:
        low, high = self.rows["sparse"].bottom + self.rows["sparse"].height, self.rows["dense"].bottom
        for on, x, branch, name in (
            (live.dense_to_sparse, _center(number), "dense", f"+{self.space.tokens}"),
            (live.fm, _center(number) + OUT, "sparse", "FM"),
        ):
            if on:
                ends = ((x, high), (x, low)) if branch == "dense" else ((x, low), (x, high))
                self.arrow(*ends, self.colors[branch])
                box = {"facecolor": self.theme.background, "edgecolor": "none", "pad": 1.0}
                self.text(x, (low + high) / 2, name, 6.8, color=self.colors[branch], bbox=box)

    def number(self, number: int, text: str, cost: Cost | None = None) -> None:
        """Above a column: its name and its cost; without a cost a block is dead."""
        dead = cost is None and number > 0
        ink, muted = (self.theme.cloud, self.theme.cloud) if dead else (self.theme.ink, self.theme.muted)
        self.text(_center(number), self.top + 0.28, text, 8.5, fontweight="bold", color=ink)
        below = f"{si(cost.parameters)} · {si(cost.flops)}" if cost else "unused" if dead else ""
        self.text(_center(number), self.top + 0.13, below, 6.8, color=muted)

    def frame(self, x: float, bottom: float, height: float, color: str, dead: bool) -> None:
        pad = 0.04
        self.axes.add_patch(
            FancyBboxPatch(
                (x - BOX / 2 + pad, bottom + pad), BOX - 2 * pad, height - 2 * pad, facecolor=self.theme.background,
                boxstyle=f"round,pad={pad},rounding_size=0.06", edgecolor=color, linewidth=1.0 if dead else 1.5,
                linestyle=(0, (3, 2)) if dead else "-", zorder=3,
            )
        )  # fmt: skip

    def way(self, x: Sequence[float], y: Sequence[float], color: str) -> None:
        self.axes.plot(x, y, color=color, lw=1.1, zorder=1, solid_capstyle="butt", solid_joinstyle="round")

    def dot(self, x: float, y: float, color: str) -> None:
        self.axes.plot([x], [y], "o", color=color, ms=3.4, zorder=2)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        """A straight arrow along an axis; the head is a marker, which unlike matplotlib's arrows lies on the line."""
        (x, y), (to_x, to_y) = start, end
        ahead = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
        self.way([x, to_x - 0.03 * ahead[0]], [y, to_y - 0.03 * ahead[1]], color)
        marker = {(1, 0): ">", (-1, 0): "<", (0, 1): "^", (0, -1): "v"}[ahead]
        at = to_x - 0.035 * ahead[0], to_y - 0.035 * ahead[1]
        self.axes.plot(*([v] for v in at), marker, color=color, ms=4.2, mew=0, zorder=4)

    def text(self, x: float, y: float, text: str, size: float, ha: str = "center", **style: Any) -> None:
        self.axes.text(x, y, text, ha=ha, va="center", fontsize=size, zorder=4, **style)


def _place(architecture: Architecture, lines: dict[str, list[Line]], legend: int) -> tuple[dict[str, _Row], float]:
    """The rows of boxes, and the y above the highest line."""
    tracks = {branch: max((line.track for line in of), default=0) for branch, of in lines.items()}
    heights = {
        branch: 0.34 + LINE * max(len(getattr(block, branch)) for block in architecture.blocks) for branch in lines
    }
    sparse = _Row(MARGIN + LEGEND * legend + NEAR + LINE * (tracks["sparse"] + 1), heights["sparse"], up=False)
    dense = _Row(sparse.bottom + sparse.height + MIDDLE, heights["dense"], up=True)
    return {"dense": dense, "sparse": sparse}, dense.track(tracks["dense"])


def _reads(block: Block | None, branch: str, number: int) -> list[tuple[str, float]]:
    """The lists of sources a live block reads in a branch, and the x at which each enters its box."""
    if block is None:
        return []
    keys = ["sparse_sources"] if branch == "sparse" else ["dense_sources", "left", "right"]
    present = [key for key in keys if getattr(block, key)]
    return [(key, _center(number) + x) for key, x in zip(present, READ)]


def _legend(blocks: Sequence[Block | None], space: Space) -> list[str]:
    """What the marks mean that occur."""
    live = [block for block in blocks if block]
    parts = ["above a block: its parameters · FLOPs of a row", "dot: read here"]
    if any(block.dense_to_sparse for block in live):
        parts.append(f"+{space.tokens}: the dense output as further tokens")
    if any(block.fm for block in live):
        parts.append("FM: factorization machine of the tokens, added to the dense output")
    if any("gating" in block.dense for block in live):
        parts.append("L: the side of the gate")
    if any(not (block and block.dense and block.sparse) for block in blocks):
        parts.append("grey: does not enter the prediction")
    return parts


def _wrapped(parts: Sequence[str], limit: int) -> list[str]:
    """Lines of whole parts, of at most ``limit`` characters where a part allows it."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]};  {part}"
        if len(longer) <= limit:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _center(number: int) -> float:
    """x of the middle of a block's column; 0 = the input."""
    return COLUMN * (number + 0.5)
