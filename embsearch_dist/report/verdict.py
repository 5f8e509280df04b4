"""The judgement of a search: what it found against the best uniform width that is not smaller, as words and picture.

Reports and ``tools/studies/compare_budgets.py`` judge by the same rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from embsearch_dist.allocation import REFERENCE_WIDTH
from embsearch_dist.errors import script
from embsearch_dist.report.result import Result
from embsearch_dist.report.style import Theme, figure, label_points, short, size_axis
from embsearch_dist.report.summary import Comparison, Row, display_name, percent
from embsearch_dist.report.uniform import ROUNDING, UniformSizes


@dataclass(frozen=True)
class Model:
    """One retrained model over seeds.

    Attributes:
        name: for people.
        parameters: mean size of its tables over seeds.
        auc: seed -> AUC on the judging split; a key None: of an unknown seed.
        group: models of one group are joined by a line in the picture.
        uniform: whether every field has the same width.
    """

    name: str
    parameters: float
    auc: Mapping[int | None, float]
    group: str
    uniform: bool

    @property
    def mean(self) -> float:
        return statistics.fmean(self.auc.values())

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds; NaN for one seed."""
        values = list(self.auc.values())
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Verdict:
    """A found model against another one.

    Attributes:
        share: its size against UES-32.
        gain: mean difference of AUC.
        error: standard error of that over seeds, paired; NaN for one seed.
        interval: of the gain of one seed by resampling the rows, where it was measured.
    """

    found: Model
    against: Model
    share: float
    against_share: float
    gain: float
    error: float
    seeds: int
    interval: tuple[float, float] | None = None

    @property
    def word(self) -> str:
        """In two words: how sure the seeds make it."""
        if self.seeds == 1:
            return "one seed: a hint"
        if self.gain > 2 * self.error:
            return "better"
        if self.gain >= -self.error:
            return "not worse"
        return "worse" if self.gain < -2 * self.error else "lower, by less than two standard errors"

    def sentence(self, why: str = "the best uniform width that is not smaller") -> str:
        """``at 25% of UES-32: +0.0021 AUC over UES-8, the best uniform width that is not smaller (25%), 5 seeds, s.e.
        0.0006: better``; ``why`` says what the other model is."""
        role = f", {why}" if why else ""
        trust = self.word if self.seeds == 1 else f"{self.seeds} seeds, s.e. {self.error:.4f}: {self.word}"
        if self.seeds == 1 and self.interval is not None:
            low, high = self.interval
            trust += f", by the luck of the rows alone between {low:+.4f} and {high:+.4f} (95%)"
        return (
            f"at {percent(self.share)} of UES-{REFERENCE_WIDTH}: {self.gain:+.4f} AUC over {self.against.name}{role} "
            f"({percent(self.against_share)}), {trust}"
        )


def compare_models(found: Model, against: Model, reference: float) -> Verdict | None:
    """The paired difference over the seeds that both have; None without any.

    Args:
        reference: parameters of UES-32.
    """
    both = sorted((s for s in found.auc if s in against.auc), key=str)
    if not both:
        return None
    gains = [found.auc[s] - against.auc[s] for s in both]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    shares = found.parameters / reference, against.parameters / reference
    return Verdict(found, against, *shares, statistics.fmean(gains), error, len(gains))


def judge(found: Model, models: Sequence[Model], reference: float) -> Verdict | None:
    """``found`` against the uniform model of the highest mean AUC among those that are not smaller.

    The best one is picked on the very rows it is judged by, so luck is on its side and never on the search's. Only
    models of as many common seeds as there are take part. None where no uniform model is large enough.
    """
    enough = [m for m in models if m.uniform and m.parameters >= found.parameters * (1 - ROUNDING)]
    verdicts = [v for m in enough if (v := compare_models(found, m, reference)) is not None]
    most = max((v.seeds for v in verdicts), default=0)
    return min((v for v in verdicts if v.seeds == most), key=lambda v: v.gain, default=None)


def missing_width(found: Model, models: Sequence[Model], sizes: UniformSizes) -> int | None:
    """The narrowest uniform width that is not smaller than what was found, if no model of it is there."""
    width = sizes.not_smaller(found.parameters)
    least, above = found.parameters * (1 - ROUNDING), (sizes.of(width) + sizes.of(width + 1)) / 2
    there = any(m.uniform and least <= m.parameters < above for m in models)
    return None if there or not found.parameters else width


def models_of(comparison: Comparison) -> list[Model]:
    """The rows of a report's comparison."""
    return [_model(row) for row in comparison.rows if row.parameters and not math.isnan(row.auc.mean)]


def _model(row: Row) -> Model:
    uniform = row.uniform_width is not None
    auc: dict[int | None, float] = {}
    for result in row.results:
        if not math.isnan(result.numbers["auc"]):
            auc[result.seed] = result.numbers["auc"]
    group = ("uniform, fine-tuned" if row.finetuned else "uniform") if uniform else display_name(row)
    return Model(display_name(row), row.parameters or 0.0, auc, group, uniform)


def sentences(comparison: Comparison | None, directory: str) -> list[str]:
    """The verdicts on what the runs of a report have found, and what is missing for them; nothing where widths of
    tables are not what was found."""
    if comparison is None or not comparison.found or not comparison.ues32_parameters:
        return []
    models, reference = models_of(comparison), comparison.ues32_parameters
    found = [m for m in models if m.name in comparison.found]
    begun = {display_name(row) for row in comparison.rows if row.finetuned}
    add = f"{script('retrain')} --run {directory} --allocation bracket"
    texts = []
    for model in found:
        verdict = _with_interval(judge(model, models, reference), comparison)
        who = f"{model.name}, " if len(found) > 1 else ""
        if verdict is not None:
            text = verdict.sentence()
            texts.append(f"{who or text[:1].upper()}{text if who else text[1:]} ({comparison.split} split).")
        width = missing_width(model, models, comparison.uniform) if comparison.uniform is not None else None
        if verdict is not None and model.name in begun and not any(m.uniform and m.name in begun for m in models):
            texts.append(
                f"{model.name} began with a wider model, the uniform widths with fresh weights. This trains uniform "
                f"widths in both ways: {add}"
            )
        if width is not None:
            lack = "No verdict" if verdict is None else "Not yet the whole verdict"
            texts.append(
                f"{lack}: UES-{width}, the narrowest uniform width that is not smaller than {model.name}, has not been "
                f"retrained. This adds it and the one below: {add}"
            )
    return texts


def difference_of(verdict: Verdict, comparison: Comparison) -> tuple[Result, Result, dict[str, Any] | None] | None:
    """The two results behind a verdict of one seed, and what ``evaluate.py --against`` has measured between them; None
    for several seeds."""
    if verdict.seeds != 1:
        return None
    (seed,) = (s for s in verdict.found.auc if s in verdict.against.auc)
    rows = {display_name(row): row for row in comparison.rows}
    pair = [[r for r in rows[m.name].results if r.seed == seed] for m in (verdict.found, verdict.against)]
    if not all(len(own) == 1 for own in pair):
        return None
    found, against = pair[0][0], pair[1][0]
    fits = (d for d in found.differences if (d["against"], d["against_seed"]) == (against.name, against.seed))
    # One that an evaluation since then has made untrue does not count.
    same = (d for d in fits if math.isclose(d.get("auc", {}).get("value", math.nan), verdict.gain, abs_tol=1e-9))
    return found, against, next(same, None)


def _with_interval(verdict: Verdict | None, comparison: Comparison) -> Verdict | None:
    known = difference_of(verdict, comparison) if verdict is not None else None
    if verdict is None or known is None or known[2] is None:
        return verdict
    return replace(verdict, interval=(float(known[2]["auc"]["low"]), float(known[2]["auc"]["high"])))


def untold(comparison: Comparison | None) -> list[tuple[Path, Path]]:
    """Directories of the models of one seed whose difference on the rows nobody has measured, found before uniform."""
    if comparison is None or not comparison.ues32_parameters:
        return []
    models, found = models_of(comparison), []
    for model in (m for m in models if m.name in comparison.found):
        verdict = judge(model, models, comparison.ues32_parameters)
        known = difference_of(verdict, comparison) if verdict is not None else None
        if known is not None and known[2] is None:
            found.append((known[0].source.parent, known[1].source.parent))
    return found


def draw(
    theme: Theme, models: Sequence[Model], split: str, label: bool = True, size: str = "embedding parameters"
) -> Figure:
    """AUC against size, whose name is ``size``; bars are one standard error over seeds, lines join the models of a
    group."""
    fig = figure(4.2)
    axes = fig.subplots()
    uniform = list(dict.fromkeys(m.group for m in models if m.uniform))
    searched = list(dict.fromkeys(m.group for m in models if not m.uniform))
    colors = dict.fromkeys(uniform, theme.uniform) | {g: theme.color(k) for k, g in enumerate(searched)}
    for group in colors:
        own = sorted((m for m in models if m.group == group), key=lambda m: m.parameters)
        plain, first = own[0].uniform, group == next(iter(uniform), None)
        errors = [0.0 if math.isnan(m.error) else m.error for m in own]
        axes.errorbar(
            [m.parameters for m in own], [m.mean for m in own], yerr=errors, marker="s" if plain else "D",
            ls="-" if first or not plain else "--", lw=1.0, ms=5 if plain else 6, color=colors[group],
            mec=theme.background, capsize=3, label=group,
        )  # fmt: skip
    axes.set_xlabel(size)
    seeds = sorted({len(m.auc) for m in models})
    mean = f", mean of {'to '.join(f'{n} ' for n in seeds[:: max(1, len(seeds) - 1)])}seeds"
    axes.set_ylabel(f"{split} AUC" + (mean if seeds[-1] > 1 else ", one seed"))
    size_axis(axes, [m.parameters for m in models])
    axes.margins(x=0.12, y=0.15)
    axes.ticklabel_format(axis="y", useOffset=False)
    if any(sum(m.group == g for m in models) > 1 for g in searched):
        fig.legend(loc="outside upper left", ncols=min(6, len(colors)), frameon=False)
    if label:
        line = sorted((m.parameters, m.mean) for m in models if m.uniform)
        texts = [short(m.name, 22) for m in models]
        label_points(axes, [(m.parameters, m.mean) for m in models], texts, [colors[m.group] for m in models], line)
    return fig
