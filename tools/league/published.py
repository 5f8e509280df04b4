"""The orders of methods that papers publish, beside ours: which pairs agree, which do not.

tools/league/published_orders.yaml holds what papers print, each entry with its source.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import yaml

from embsearch_dist.errors import UserError
from tools.league.rows import UNIFORM, Group
from tools.studies.jobs import ROOT

FILE = ROOT / "tools" / "league" / "published_orders.yaml"


@dataclass(frozen=True)
class Order:
    """What a paper says of one data set and backbone.

    Attributes:
        paper: and where in it.
        data_set: as the paper names it.
        backbone: as this project names it.
        beside: data sets of ours that it may stand beside.
        note: how the setting differs from ours.
        auc: method -> test AUC as printed.
        tiers: or, where figures are not to be had, groups of methods from best to worst, each as the text has them.
    """

    paper: str
    data_set: str
    backbone: str
    beside: Sequence[str]
    note: str
    auc: Mapping[str, float] = field(default_factory=dict)
    tiers: Sequence[Sequence[str]] = ()

    def methods(self) -> list[str]:
        """Best first."""
        if self.auc:
            return sorted(self.auc, key=lambda m: -self.auc[m])
        return [m for tier in self.tiers for m in tier]

    def shown(self) -> str:
        """``adass (0.7923) > mde (0.7886)``; methods without an order among them are parted by commas."""
        if self.auc:
            return " > ".join(f"{m} ({self.auc[m]:.4f})" for m in self.methods())
        return " > ".join(", ".join(tier) for tier in self.tiers)

    def gain(self, a: str, b: str) -> float:
        """By how much AUC ``a`` is above ``b``; only the sign means something where tiers are known; 0: no order."""
        if self.auc:
            return self.auc[a] - self.auc[b]
        tier = {m: k for k, tier in enumerate(self.tiers) for m in tier}
        return float(tier[b] - tier[a])


@dataclass(frozen=True)
class Pair:
    """Two methods of a published order, the better one first, and ours: mean difference of test AUC, paired by seed,
    and its standard error (NaN for one seed)."""

    better: str
    worse: str
    published: float
    ours: float
    error: float

    @property
    def word(self) -> str:
        """``agrees`` or ``disagrees`` where ours is more than a standard error from 0, else ``not told apart``."""
        if math.isnan(self.error) or abs(self.ours) <= self.error:
            return "not told apart"
        return "agrees" if self.ours > 0 else "disagrees"


def read_orders(path: Path = FILE) -> list[Order]:
    """
    Raises:
        UserError: an entry lacks its order.
    """
    orders = [Order(**entry) for entry in yaml.safe_load(path.read_text())]
    for order in orders:
        if bool(order.auc) == bool(order.tiers):
            raise UserError(f"{path}: {order.paper}, {order.data_set}: give auc or tiers, one of them")
    return orders


def pairs_of(order: Order, group: Group, budget: str) -> list[Pair]:
    """The pairs of methods that both the paper and we have; ours at one budget, and UES-32 as ``uniform``."""
    auc: dict[str, dict[str, float]] = {}
    for method in order.methods():
        rows = group.of(UNIFORM, "32") if method == UNIFORM else group.of(method, budget)
        if rows:
            auc[method] = {r["seed"]: float(r["test_auc"]) for r in rows}
    found = []
    for a, b in combinations(auc, 2):
        published = order.gain(a, b)
        gains = [auc[a][s] - auc[b][s] for s in auc[a] if s in auc[b]]
        if published and gains:
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            found.append(Pair(a, b, published, statistics.fmean(gains), error))
    return found


def published_section(groups: Sequence[Group], orders: Sequence[Order]) -> list[str]:
    """Lines of Markdown: each published order that some of our data sets may stand beside, and of each of these the
    pairs that speak for or against it."""
    lines = ["## Published orders beside ours", ""]
    names = {group.name for group in groups}
    near = [order for order in orders if names.intersection(order.beside)]
    for order in near:
        lines += [f"**{order.paper}**, {order.data_set}, {order.backbone}: {order.shown()}. {order.note}", ""]
        for group in groups:
            if group.name in order.beside and group.budgets:
                lines += _beside(order, group)
    other = [f"{o.paper}: {o.data_set}, {o.backbone}" for o in orders if o not in near]
    return lines + ([f"No data set here stands beside {'; '.join(other)}.", ""] if other else [])


def _beside(order: Order, group: Group) -> list[str]:
    budget = group.budgets[-1]
    pairs = pairs_of(order, group, budget)
    if not pairs:
        return [f"- {group.title}: no two methods that the paper puts in order were run.", ""]
    told = []
    for word in ("agrees", "disagrees", "not told apart"):
        own = [p for p in pairs if p.word == word]
        names = "; ".join(f"{p.better} over {p.worse} ({_figures(p)})" for p in own)
        told.append(f"  - {word}: {len(own)} of {len(pairs)}" + (f": {names}" if own else ""))
    other = "" if group.backbone == order.backbone else f", with {group.backbone}"
    return [f"- {group.name}{other}, budget {budget} (uniform is UES-32):", *told, ""]


def _figures(pair: Pair) -> str:
    error = "one seed" if math.isnan(pair.error) else f"s.e. {pair.error:.4f}"
    return f"ours {pair.ours:+.4f}, {error}"
