"""Pictures of a search for networks and the numbers in them: scores in their order, what is chosen how often, logloss
over FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.space import Space
from embsearch_dist.report import network_picture
from embsearch_dist.report.plots import front
from embsearch_dist.report.runs import Evolution, Network
from embsearch_dist.report.style import Theme, figure, label_ends, label_points, short, si_axis, size_axis

CROWD = 100  # of so many dots the worst fiftieth may lie outside the frame
MANY = 400  # so many are drawn smaller


@dataclass(frozen=True)
class Population:
    """The living networks after a generation: how many were scored by then, mean and best fitness, mean FLOPs."""

    scored: int
    mean: float
    best: float
    flops: float


@dataclass(frozen=True)
class Mark:
    """A model trained from scratch: FLOPs, logloss and its spread (None: one value); ``own``: of the search."""

    name: str
    flops: float
    logloss: float
    sd: float | None
    own: bool


def populations(evolution: Evolution) -> list[Population]:
    """The living networks after each generation; the first is the random start."""
    generations = [n.number("generation") for n in evolution.scored]
    points = []
    for generation in sorted(set(generations)):
        count = sum(g <= generation for g in generations)
        alive = evolution.scored[max(0, count - evolution.alive) : count]
        fitness = [n.number("fitness") for n in alive]
        flops = statistics.fmean(n.number("flops") for n in alive)
        points.append(Population(count, statistics.fmean(fitness), min(fitness), flops))
    return points


def usage_of(networks: Sequence[Network], space: Space) -> dict[str, dict[str, float]]:
    """Title -> choice -> share, of what enters the predictions of these networks; dead parts do not count.

    Operators, widths and mergers are shares of the blocks that have that branch, blocks in use of the networks.
    """
    pruned = [[b for b in prune(n.architecture) if b is not None] for n in networks]
    dense = [b for blocks in pruned for b in blocks if b.dense]
    sparse = [b for blocks in pruned for b in blocks if b.sparse]
    names = network_picture.NAMES
    return {
        "Dense operator": {names[o]: _share([o in b.dense for b in dense]) for o in space.dense_operators},
        "Dense width (columns)": {str(w): _share([b.dense_width == w for b in dense]) for w in space.dense_widths},
        "Blocks in use": {str(k): _share([len(b) == k for b in pruned]) for k in range(1, space.blocks + 1)},
        "Sparse operator": {names[o]: _share([o in b.sparse for b in sparse]) for o in space.sparse_operators},
        "Sparse width (tokens)": {str(w): _share([b.sparse_width == w for b in sparse]) for w in space.sparse_widths},
        "Mergers": {
            "FM of tokens\nto dense": _share([b.fm for b in dense]),
            f"dense as {space.tokens}\nmore tokens": _share([b.dense_to_sparse for b in sparse]),
        },
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def evolution(theme: Theme, fitness: Sequence[float], points: Sequence[Population], chosen: int, score: str) -> Figure:
    """Fitness of every candidate in the order of scoring with mean and best of the living; their mean FLOPs.

    Args:
        chosen: place of the best in ``fitness``.
        score: what fitness is.
    """
    several = len(points) > 1
    fig = figure(3.6, 9.6 if several else 5.0)
    panels = fig.subplots(1, 2 if several else 1, squeeze=False, width_ratios=[5, 2] if several else [1])[0]
    left, start, at = panels[0], points[0].scored, [p.scored for p in points]
    left.axvspan(0.5, start + 0.5, color=theme.grid, alpha=0.6, lw=0, zorder=0)
    places = range(1, len(fitness) + 1)
    left.plot(places, fitness, ".", ms=_size(len(fitness)), color=theme.cloud, zorder=2)
    ends = []
    for k, (name, heights) in enumerate({"mean": [p.mean for p in points], "best": [p.best for p in points]}.items()):
        left.plot(at, heights, color=theme.color(k), marker="" if several else "o", clip_on=several, zorder=3)
        ends.append((float(at[-1]), heights[-1], name, theme.color(k)))
    left.plot(chosen + 1, fitness[chosen], "D", ms=7, color=theme.color(1), mec=theme.background, zorder=4)
    left.set_title("Every network scored")
    left.set_xlabel("networks, in the order of scoring")
    left.set_ylabel(score)
    left.set_xlim(0.5, len(fitness) + 0.5)
    _frame(left, min(fitness), ceiling(fitness, points))
    left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if several:
        left.annotate("random start", (0.5, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -2), fontsize=7.5,
                      textcoords="offset points", va="top", color=theme.muted)  # fmt: skip
        right = panels[1]
        right.plot(range(len(points)), [p.flops for p in points], color=theme.color(0))
        right.set_title("FLOPs of the population")
        right.set_xlabel("generation")
        right.set_ylabel("mean FLOPs per row")
        right.set_ylim(0, 1.1 * max(p.flops for p in points) or 1)
        right.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        si_axis(right.yaxis)
    label_ends(left, ends)
    return fig


def ceiling(fitness: Sequence[float], points: Sequence[Population] = ()) -> float:
    """Top of the frame: of many scores the worst few would flatten the rest."""
    ordered = sorted(fitness)
    top = ordered[-1 - len(ordered) // 50] if len(ordered) > CROWD else ordered[-1]
    return max([top, *(p.mean for p in points)])


def usage(theme: Theme, first: Mapping[str, Mapping[str, float]], last: Mapping[str, Mapping[str, float]]) -> Figure:
    """Title -> choice -> share, of the first and of the last population, side by side; six titles."""
    fig = figure(4.2)
    panels = fig.subplots(2, 3)
    for axes, title in zip(panels.flat, first, strict=True):
        names = list(first[title])
        for offset, shares, color, label in (
            (-0.2, first[title], theme.cloud, "first population"),
            (0.2, last[title], theme.color(0), "last population"),
        ):
            heights = [100 * shares[n] for n in names]
            axes.bar([k + offset for k in range(len(names))], heights, width=0.38, color=color, label=label)
        axes.set_title(title)
        axes.set_xticks(range(len(names)), names, fontsize=7.5)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of networks" if title.startswith("Blocks") else "% of blocks")
    fig.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return fig


def trade_off(
    theme: Theme,
    scored: Sequence[tuple[float, float]],
    start: int,
    chosen: tuple[float, float] | None,
    marks: Sequence[Mark],
    split: str,
) -> Figure:
    """Logloss over FLOPs: of all that was scored, the first ``start`` at random, with their front (left), and of what
    was trained from scratch (right)."""
    count = bool(scored) + bool(marks)
    fig = figure(3.9, 9.6 if count > 1 else 6.4)
    panels = list(fig.subplots(1, count, squeeze=False)[0])
    if scored:
        _search_panel(theme, panels[0], scored, start, chosen)
    if marks:
        _trained_panel(theme, panels[-1], marks, split)
    for axes in panels:
        axes.set_xlabel("FLOPs per row")
        axes.yaxis.get_major_formatter().set_useOffset(False)
    # Labels are placed for the final layout, so they come after everything that moves the axes.
    if marks:
        colors = [theme.ink if m.own else theme.uniform for m in marks]
        label_points(panels[-1], [(m.flops, m.logloss) for m in marks], [short(m.name, 22) for m in marks], colors)
    return fig


def _search_panel(
    theme: Theme, axes: Axes, scored: Sequence[tuple[float, float]], start: int, chosen: tuple[float, float] | None
) -> None:
    for part, color, alpha in ((scored[:start], theme.cloud, 1.0), (scored[start:], theme.color(0), 0.55)):
        if part:
            axes.plot(*zip(*part, strict=True), ".", ms=_size(len(scored)), color=color, alpha=alpha, zorder=2)
    lowest = [(flops, -height) for flops, height in front([(x, -y) for x, y in scored])]
    lowest.append((max(x for x, _ in scored), lowest[-1][1]))
    axes.step(*zip(*lowest, strict=True), where="post", color=theme.color(1), zorder=3)
    if chosen is not None:
        axes.plot(*chosen, "D", ms=7, color=theme.color(1), mec=theme.background, zorder=4)
    axes.set_title("Search: networks with shared weights")
    axes.set_ylabel("validation logloss (inherited weights)")
    size_axis(axes, [x for x, _ in scored])
    heights = [y for _, y in scored]
    _frame(axes, min(heights), ceiling(heights))


def _trained_panel(theme: Theme, axes: Axes, marks: Sequence[Mark], split: str) -> None:
    for m in marks:
        color = theme.color(1) if m.own else theme.uniform
        axes.errorbar(m.flops, m.logloss, yerr=m.sd, fmt="D" if m.own else "s", ms=7 if m.own else 5.5, color=color,
                      mec=theme.background, capsize=3, lw=1.2, zorder=3)  # fmt: skip
    axes.set_title("Trained from scratch")
    axes.set_ylabel(f"{split} logloss")
    size_axis(axes, [m.flops for m in marks])
    axes.margins(x=0.15, y=0.15)


def _frame(axes: Axes, low: float, high: float) -> None:
    pad = 0.06 * (high - low) or 1e-4
    axes.set_ylim(low - pad, high + pad)
    axes.ticklabel_format(axis="y", useOffset=False)


def _size(count: int) -> float:
    return 3.0 if count > MANY else 5.0
