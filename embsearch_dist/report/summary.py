"""Numbers of the report: means over seeds, differences to the uniform baseline, the headline in words."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embsearch_dist.allocation import REFERENCE_WIDTH
from embsearch_dist.report.result import Result
from embsearch_dist.report.runs import Run
from embsearch_dist.report.uniform import UniformSizes, extra_of, sizes_of

# Two-sided 95% quantiles of Student's t by degrees of freedom; beyond them the normal one is close enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_UES = re.compile(r"^(?:ues|uniform)[-_ ]?(\d+)(-finetuned)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value)."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% confidence interval of the mean by Student's t; None for a single value."""
        if self.sd is None:
            return None
        t = _T95[self.n - 2] if self.n - 2 < len(_T95) else 1.96 + 2.5 / (self.n - 1)
        half = t * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Row:
    """One line of the comparison: all results of one name."""

    name: str
    results: tuple[Result, ...]
    uniform_width: int | None

    @property
    def finetuned(self) -> bool:
        """Whether its trainings began with another model, and not with fresh weights."""
        return any(r.begun for r in self.results)

    @property
    def seeds(self) -> list[int]:
        return sorted({r.seed for r in self.results if r.seed is not None})

    def spread(self, key: str) -> Spread | None:
        """Mean and spread of one number over the results that have it."""
        values = [r.numbers[key] for r in self.results if not math.isnan(r.numbers.get(key, math.nan))]
        return Spread.of(values) if values else None

    @property
    def auc(self) -> Spread:
        """Its mean is NaN where no result has rows of both classes."""
        return self.spread("auc") or Spread(math.nan, None, 0)

    @property
    def parameters(self) -> float | None:
        spread = self.spread("embedding_parameters")
        return spread.mean if spread else None


@dataclass(frozen=True)
class Comparison:
    """Everything the comparison table and the headline need.

    Attributes:
        split: the split the rows were measured on.
        rows: one per name: found allocations first, best AUC first; then uniform ones from wide to narrow.
        baseline: UES-32, or the widest uniform row there is.
        found: names of the rows the searches of these runs produced.
        ues32_parameters: embedding parameters of width 32 everywhere, if known.
        uniform: those of any uniform width; None where they are unknown, or sizes are bytes.
    """

    split: str
    rows: tuple[Row, ...]
    baseline: Row | None
    found: tuple[str, ...]
    ues32_parameters: float | None
    uniform: UniformSizes | None = None

    @property
    def by_name(self) -> dict[str, Row]:
        return {r.name: r for r in self.rows}


def display_name(row: Row) -> str:
    """``UES-32`` for a uniform row, otherwise the name as given."""
    if row.uniform_width is None:
        return row.name
    return f"UES-{row.uniform_width}{' fine-tuned' if _tuned(row.name) else ''}"


def _tuned(name: str) -> bool:
    match = _UES.match(name)
    return bool(match and match.group(2))


def compare(runs: Sequence[Run]) -> Comparison | None:
    """Group all results of all runs by name. None when nothing was evaluated.

    Results of another split than the common one (test if there is any) are left out, never mixed in.
    """
    results = [r for run in runs for r in run.results]
    if not results:
        return None
    splits = [r.split for r in results]
    split = "test" if "test" in splits else splits[0]
    grouped: dict[str, list[Result]] = {}
    for result in results:
        if result.split == split:
            grouped.setdefault(result.name, []).append(result)
    rows = [Row(name, tuple(group), _uniform_width(group[0])) for name, group in grouped.items()]
    rows.sort(key=lambda r: (r.uniform_width is not None, _tuned(r.name), -(r.uniform_width or 0), -_known(r.auc.mean)))
    uniform = [r for r in rows if r.uniform_width is not None and not _tuned(r.name)]
    baseline = next((r for r in uniform if r.uniform_width == REFERENCE_WIDTH), uniform[0] if uniform else None)
    sizes, ues32 = sizes_of(runs), None
    if sizes is None and baseline is not None and baseline.parameters is not None and baseline.uniform_width:
        extra = extra_of(runs)
        sizes = UniformSizes(baseline.parameters / (baseline.uniform_width + extra), extra)
    if baseline is not None and baseline.uniform_width == REFERENCE_WIDTH and baseline.parameters is not None:
        ues32 = baseline.parameters  # as it was measured
    elif sizes is not None:
        ues32 = sizes.reference
    return Comparison(split, tuple(rows), baseline, _found(runs, rows), ues32, sizes)


def _known(auc: float) -> float:
    """For sorting: what is undefined comes last."""
    return -math.inf if math.isnan(auc) else auc


def auc_difference(row: Row, baseline: Row) -> Spread:
    """AUC of ``row`` minus AUC of ``baseline``; paired by seed, over the seeds that both have.

    A seed whose training has diverged, and has no AUC, is none of those. Without a common seed it is the difference of
    the means, of ``n`` 0.
    """
    ours, theirs = (_by_seed(r) for r in (row, baseline))
    both = sorted(ours.keys() & theirs.keys())
    if both:
        return Spread.of([ours[s] - theirs[s] for s in both])
    return Spread(row.auc.mean - baseline.auc.mean, None, 0)


def _by_seed(row: Row) -> dict[int, float]:
    """AUC by seed; nothing where a seed is unknown or has several results, which seeds cannot pair."""
    seeds = [r.seed for r in _with_auc(row)]
    found = {r.seed: r.numbers["auc"] for r in _with_auc(row) if r.seed is not None}
    return found if len(found) == len(seeds) else {}


def _with_auc(row: Row) -> list[Result]:
    return [r for r in row.results if not math.isnan(r.numbers["auc"])]


def headline(runs: Sequence[Run], comparison: Comparison | None) -> list[str]:
    """The result in plain words: first the sentence that matters most, then what qualifies it."""
    if comparison is None or not comparison.found:
        return [_without_results(runs, comparison)]
    rows = [comparison.by_name[name] for name in comparison.found]
    sentences = []
    for row in rows:
        sentences.append(_sentence(row, comparison, several=len(rows) > 1))
        uniform = uniform_auc_at(row.parameters, comparison)
        if uniform is not None and not math.isnan(row.auc.mean + uniform):
            apart = row.auc.mean - uniform
            relation = f"{abs(apart):.4f} {'above' if apart > 0 else 'below'} it" if abs(apart) >= 0.00005 else "on it"
            sentences.append(
                f"At the size of {row.name}, the line between the uniform widths is at an AUC of about {uniform:.4f}; "
                f"{row.name} is {relation}."
            )
        better = [r for r in comparison.rows if _dominates(r, row)]
        if better:
            best = max(better, key=lambda r: auc_difference(r, row).mean)
            delta = auc_difference(best, row)
            told = f"of {best.auc.mean:.4f} against {row.auc.mean:.4f}"
            if 0 < delta.n < max(best.auc.n, row.auc.n):
                told = f"{delta.mean:.4f} above it over the seeds that both have"
            sentences.append(
                f"{display_name(best)} beats it on both counts: {_share(best, row)} of its embedding parameters "
                f"and an AUC {told}."
            )
    return sentences


def uniform_auc_at(parameters: float | None, comparison: Comparison) -> float | None:
    """AUC a uniform width of this size would reach, read off between its neighbours over log size.

    None outside the range of the uniform rows: going beyond them would be a guess.
    """
    best: dict[float, float] = {}  # of one width trained in two ways the better one
    for row in comparison.rows:
        if row.uniform_width and row.parameters:
            best[row.parameters] = max(best.get(row.parameters, -math.inf), _known(row.auc.mean))
    points = sorted(best.items())
    if not parameters:
        return None
    for (small, low), (large, high) in zip(points, points[1:], strict=False):
        if small < parameters < large:
            return low + (high - low) * math.log(parameters / small) / math.log(large / small)
    return None


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation with tied values sharing their mean rank; None when one side is constant."""
    if len(a) < 2 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return statistics.correlation(_ranks(a), _ranks(b))


def planted_correlation(widths: Mapping[str, int], ranks: Mapping[str, float]) -> float | None:
    """Spearman's rho between found widths and planted ranks over the fields both name."""
    names = [n for n in ranks if n in widths]
    return spearman([widths[n] for n in names], [ranks[n] for n in names])


def percent(share: float) -> str:
    """``41%``; one decimal where whole percents would hide the difference."""
    return f"{share:.0%}" if 0.1 <= share <= 0.985 or share >= 1.015 or share in (0, 1) else f"{share:.1%}"


def _sentence(row: Row, comparison: Comparison, several: bool) -> str:
    base = comparison.baseline
    subject = f"The widths of {row.name}" if several else f"The found widths ({row.name})"
    where = f"on the {comparison.split} split"
    if math.isnan(row.auc.mean):
        return f"{subject} have no AUC {where}: its rows are of one class only. Compare the loglosses."
    if base is None or math.isnan(base.auc.mean):
        size = ""
        if row.parameters and comparison.ues32_parameters:
            size = f" with {percent(row.parameters / comparison.ues32_parameters)} of UES-32's embedding parameters"
        return f"{subject} reach an AUC of {row.auc.mean:.4f} {where}{size}; no uniform baseline was evaluated."
    name = display_name(base)
    delta = auc_difference(row, base)
    if row.parameters and base.parameters:
        share = row.parameters / base.parameters
        size = f"{'keep' if share < 1 else 'use'} {percent(share)} of {name}'s embedding parameters"
    else:
        share, size = math.nan, "have no recorded parameter count"
    interval = delta.interval
    if abs(delta.mean) < 0.00005:
        effect = f"and match its AUC to four decimals {where}"
    elif interval is not None and interval[0] <= 0 <= interval[1]:
        effect = f"and change AUC by {delta.mean:+.4f} {where}, which the seeds cannot tell from no change"
    elif delta.mean > 0:
        effect = f"and gain {delta.mean:+.4f} AUC {where}"
    else:
        effect = f"{'but' if share < 1 else 'and'} lose {-delta.mean:.4f} AUC {where}"
    if interval is not None:
        told = "" if delta.n == row.auc.n == base.auc.n else " that both have"
        trust = f"mean of {delta.n} seeds{told}, 95% interval {interval[0]:+.4f} to {interval[1]:+.4f}"
    elif delta.n == 1 and max(row.auc.n, base.auc.n) > 1:
        trust = "of the one seed that both have, so the spread is unknown"
    elif row.auc.n == base.auc.n == 1:
        trust = "one seed, so the spread is unknown"
    else:
        trust = f"mean of {row.auc.n} runs against {base.auc.n}, not paired by seed"
    for who, undefined in ((row, len(row.results) - row.auc.n), (base, len(base.results) - base.auc.n)):
        if undefined:
            trust += f"; {undefined} of {len(who.results)} runs of {display_name(who)} have no AUC and are left out"
    return f"{subject} {size} {effect} ({trust})."


def _without_results(runs: Sequence[Run], comparison: Comparison | None) -> str:
    if comparison is not None:
        names = ", ".join(display_name(r) for r in comparison.rows)
        return f"Only uniform widths have been evaluated so far ({names}); the found widths have not."
    for run in runs:
        if run.widths is None:
            continue
        kept = sum(1 for w in run.widths.values() if w)
        text = f"The search chose widths for {len(run.widths)} fields and dropped {len(run.widths) - kept}"
        sizes = sizes_of([run])
        if run.schema is not None and sizes is not None:
            share = sum(map(run.parameters, run.schema.names)) / sizes.reference
            text += f", with {percent(share)} of UES-32's embedding parameters"
        return text + "; no retrained model has been evaluated, so whether they predict as well is open."
    stages = sorted({str(line.get("stage")) for run in runs for line in run.metrics})
    done = f" (recorded so far: {', '.join(stages)})" if stages else ""
    return f"No allocation and no evaluation yet{done}: there is no result to judge."


def _found(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[str, ...]:
    """Which rows are this project's finds: named by the runs' own artifacts, otherwise all that are not uniform. Where
    retrain.py has chosen a wider allocation than the one a search ended with, that one stands in its place."""
    own = {str(run.provenance.get(key)) for run in runs for key in ("method", "name") if run.provenance.get(key)}
    own |= {str(p["name"]) for run in runs if run.pareto for p in run.pareto.get("points", []) if p.get("chosen")}
    widths = [run.widths for run in runs if run.widths is not None]
    searched = [r for r in rows if r.uniform_width is None]
    named = [r.name for r in searched if r.name in own or any(x.widths in widths for x in r.results if x.widths)]
    chosen = {str(run.final["name"]) for run in runs if run.final and not run.final.get("fallback")}
    if len(chosen) == 1 and chosen <= {r.name for r in searched}:
        ended = {run.provenance.get("name") for run in runs if run.final}
        named = list(dict.fromkeys(next(iter(chosen)) if name in ended else name for name in named))
    return tuple(named or [r.name for r in searched])


def _uniform_width(result: Result) -> int | None:
    match = _UES.match(result.name)
    return int(match.group(1)) if match else None


def _dominates(other: Row, row: Row) -> bool:
    if other.parameters is None or row.parameters is None or other.name == row.name:
        return False
    return other.parameters <= row.parameters and auc_difference(other, row).mean > 0


def _share(row: Row, of: Row) -> str:
    assert row.parameters is not None
    return percent(row.parameters / of.parameters) if of.parameters else "none"


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop + 1 < len(order) and values[order[stop + 1]] == values[order[start]]:
            stop += 1
        for k in range(start, stop + 1):
            ranks[order[k]] = (start + stop) / 2
        start = stop + 1
    return ranks
