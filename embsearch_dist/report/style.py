"""How the pictures look: two themes, one palette, number formats, labels that do not cover each other."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

WIDTH = 9.6  # inches: 960 CSS pixels at 100 per inch, the width of the page
DPI = 150


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance. The series are Okabe and Ito's colours, which colour-blind readers can tell apart."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    cloud: str
    uniform: str
    series: tuple[str, ...]
    map: str = "viridis"

    def color(self, index: int) -> str:
        return self.series[index % len(self.series)]


LIGHT = Theme(
    "light",
    background="#ffffff",
    ink="#1d2329",
    muted="#5d6770",
    grid="#e4e7ea",
    cloud="#b4bcc4",
    uniform="#7b858e",
    series=("#0072b2", "#d55e00", "#009e73", "#b8608f", "#c98a00", "#3a9bd1"),
)
DARK = Theme(
    "dark",
    background="#161b20",
    ink="#e6e9ec",
    muted="#a3adb6",
    grid="#2d353c",
    cloud="#55606a",
    uniform="#98a2ab",
    series=("#56b4e9", "#f08a4b", "#3fc79a", "#dd9cc0", "#e8b93f", "#7fc4ea"),
)

Draw = Callable[[Theme], Figure]


@dataclass(frozen=True)
class Picture:
    """One plot in both themes, as base64 PNG."""

    name: str
    light: str
    dark: str
    width: int  # CSS pixels


def render(name: str, draw: Draw, directory: Path) -> Picture:
    """Draw a plot in both themes; the light one is also written to ``directory/<name>.png``."""
    images = {theme.name: drawn(draw, theme) for theme in (LIGHT, DARK)}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.png").write_bytes(images["light"][0])
    light, dark = (base64.b64encode(images[theme.name][0]).decode("ascii") for theme in (LIGHT, DARK))
    return Picture(name, light, dark, images["light"][1])


def drawn(draw: Draw, theme: Theme) -> tuple[bytes, int]:
    """A plot as PNG, and its width in CSS pixels."""
    with matplotlib.rc_context(_settings(theme)):
        figure = draw(theme)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue(), round(figure.get_size_inches()[0] * 100)


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure outside pyplot, so that nothing needs closing."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def short(text: str, limit: int = 26) -> str:
    """A long name with its middle left out: both ends of a column name usually tell it apart."""
    if len(text) <= limit:
        return text
    tail = (limit - 2) // 2
    return f"{text[: limit - 2 - tail]}..{text[-tail:]}"


def si(number: float) -> str:
    """``1.2M``, ``38k``, ``512``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def si_axis(axis: Any) -> None:
    """SI numbers on an axis, and on a log axis only as many of the minor ones as have room."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: si(v)))
    axis.set_minor_formatter(FuncFormatter(lambda v, _: ""))


def size_axis(axes: Axes, values: Sequence[float]) -> None:
    """X axis of a size: logarithmic when the sizes span more than a factor of five."""
    positive = [v for v in values if v > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    if high > 5 * low and len(positive) == len(values):
        axes.set_xscale("log")
        # A log axis labels powers of ten only; over less than two decades that would leave one label.
        if high < 200 * low:
            ticks = [m * 10**e for e in range(15) for m in (1, 2, 5) if low / 1.6 <= m * 10**e <= high * 1.6]
            axes.set_xticks(ticks)
    si_axis(axes.xaxis)


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colors: Sequence[str],
    line: Sequence[tuple[float, float]] = (),
) -> None:
    """Write a label beside each point where it covers neither a point, nor another label, nor ``line``.

    Call it last: it needs the final axis limits. A label without a free place goes to the right.
    """
    canvas = FigureCanvasAgg(axes.figure.figure)  # type: ignore[arg-type]
    canvas.draw()
    # A label must not push the layout around after its place was chosen for this layout.
    at = [tuple(axes.transData.transform(p)) for p in points]
    frame = axes.get_window_extent()
    scale = axes.figure.dpi / 72
    taken = [(x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale) for x, y in at]
    corners = [axes.transData.transform(p) for p in line]
    for (x0, y0), (x1, y1) in zip(corners, corners[1:], strict=False):
        parts = max(2, int(max(abs(x1 - x0), abs(y1 - y0)) / (4 * scale)))
        for k in range(parts + 1):
            x, y = x0 + (x1 - x0) * k / parts, y0 + (y1 - y0) * k / parts
            taken.append((x, y, x, y))
    for (x, y), point, text, color in zip(at, points, texts, colors, strict=True):
        wide, tall = len(text) * 4.9 * scale, 10 * scale
        gap = 6 * scale
        places = [
            (gap, 0.0, "left", "center"),
            (-gap, 0.0, "right", "center"),
            (0.0, gap, "center", "bottom"),
            (0.0, -gap, "center", "top"),
            *((gap, k * 11 * scale, "left", "center") for k in (1, -1, 2, -2)),
            *((-gap, k * 11 * scale, "right", "center") for k in (1, -1, 2, -2)),
        ]
        chosen = places[0]
        for place in places:
            dx, dy, horizontal, vertical = place
            left = x + dx - {"left": 0.0, "right": wide, "center": wide / 2}[horizontal]
            bottom = y + dy - {"center": tall / 2, "bottom": 0.0, "top": tall}[vertical]
            box = (left, bottom, left + wide, bottom + tall)
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                chosen = place
                taken.append(box)
                break
        dx, dy, horizontal, vertical = chosen
        axes.annotate(
            text,
            point,
            xytext=(dx / scale, dy / scale),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            color=color,
            fontsize=8,
            annotation_clip=False,
        ).set_in_layout(False)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name lines at their right ends (x, y, text, color), moved apart where they would touch."""
    if not ends:
        return
    low, high = axes.get_ylim()
    spec = axes.get_subplotspec()
    rows = spec.get_gridspec().nrows if spec is not None else 1
    points = axes.figure.figure.get_size_inches()[1] * 72 / rows - 48  # less title and x labels
    step = (high - low) * 10.5 / points
    ordered = sorted(ends, key=lambda e: e[1])
    heights = [e[1] for e in ordered]
    for k in range(1, len(heights)):
        heights[k] = max(heights[k], heights[k - 1] + step)
    # Pushed past the top, the pile slides down as one, keeping its distances.
    over = heights[-1] - (high - step / 2)
    if over > 0:
        heights[-1] -= over
        for k in range(len(heights) - 2, -1, -1):
            heights[k] = min(heights[k], heights[k + 1] - step)
    right = axes.get_xlim()[1]
    for (_, _, text, color), y in zip(ordered, heights, strict=True):
        axes.annotate(
            short(text, 18),
            (right, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8,
            annotation_clip=False,
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "text.parse_math": False,  # a dollar sign in a name is no formula
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.6,
        "axes.unicode_minus": True,
    }
