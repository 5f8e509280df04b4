"""The tables of a league, as Markdown: quality at each budget, search cost, stability, ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from embsearch_dist.errors import UserError
from embsearch_dist.report.summary import percent
from embsearch_dist.report.verdict import judge
from tools.league.choices import CHOOSES, choices
from tools.league.published import Order, published_section
from tools.league.ranks import Ranking, Stability, complete, rank, stability
from tools.league.rows import (
    UNIFORM,
    Group,
    Row,
    blocks_by_budget,
    blocks_by_data,
    shared_seeds,
    unshared,
    widths_in,
)
from tools.studies.jobs import all_told, machines
from tools.studies.seeds import spread, with_deviation, with_error

PARTS = ("quality", "winners", "choices", "cost", "stability", "ranks", "published")
CHOICE_TOLD = f" `{CHOOSES}` is told for one budget, with the trainings that it chooses from."
FIGURES = {"test_auc": ("test AUC", True), "test_logloss": ("test logloss", False)}


def page(groups: Sequence[Group], orders: Sequence[Order]) -> str:
    """All tables."""
    return "# League\n\n" + sections(groups, orders, PARTS)


def sections(groups: Sequence[Group], orders: Sequence[Order], wanted: Sequence[str]) -> str:
    """Some of :data:`PARTS`, with where the figures are from above them.

    Raises:
        UserError: there is no such part.
    """
    made = {
        "quality": lambda: [line for group in groups for line in quality(group)],
        "winners": lambda: winners(groups),
        "choices": lambda: choices(groups),
        "cost": lambda: costs(groups),
        "stability": lambda: stabilities(groups),
        "ranks": lambda: ranks(groups),
        "published": lambda: published_section(groups, orders),
    }
    for name in wanted:
        if name not in made:
            raise UserError(f"a league has no part {name!r}. Name some of {', '.join(PARTS)}")
    lines = [*provenance(groups), "", *(line for name in wanted for line in made[name]())]
    return "\n".join(lines).rstrip() + "\n"


def provenance(groups: Sequence[Group]) -> list[str]:
    """Where the figures are from: a line for each data set."""
    lines = [
        "Figures are of the test split; +- is one standard deviation over seeds, s.e. the standard error of a "
        "difference paired by seed. AUC is measured with tables in float32. Made by `python tools/studies/league.py "
        "tables`.",
        "",
    ]
    for group in groups:
        data, commits = group.rows[0]["data"], all_told(group.rows, "commit")
        seeds = ", ".join(group.seeds)
        lines.append(f"- {group.title}: {data}, seeds {seeds}, commit {commits}; {machines(group.rows)}.")
    return lines


def quality(group: Group) -> list[str]:
    """Of each model its size, and what it reaches; of found ones the difference to the best uniform width that is not
    smaller, and to the widest uniform width inside the same budget."""
    lines = [
        f"## {group.title}",
        "",
        "| model | seeds | parameters | of UES-32 | bytes at int8 | test AUC | test logloss "
        "| - best uniform, not smaller | - uniform of the budget |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method, label), model in group.models.items():
        own = group.of(method, label)
        size = f"{model.parameters:,.0f} | {percent(model.parameters / group.reference)} | {mean_bytes(own)}"
        figures = " | ".join(with_deviation(spread([float(r[k]) for r in own]), ".4f") for k in FIGURES)
        lines.append(f"| {model.name} | {len(own)} | {size} | {figures} | {against_best(group, method, label)} "
                     f"| {against_budget(group, method, label)} |")  # fmt: skip
    return [*lines, ""]


def mean_bytes(rows: Sequence[Row]) -> str:
    values = [float(r["served_int8_bytes"]) for r in rows if r.get("served_int8_bytes")]
    return f"{statistics.fmean(values):,.0f}" if values else "-"


def against_best(group: Group, method: str, label: str) -> str:
    """``+0.0010 (s.e. 0.0004) UES-8`` for a found model."""
    model = group.models[method, label]
    verdict = None if model.uniform else judge(model, list(group.models.values()), group.reference)
    if verdict is None:
        return "-"
    error = verdict.error * math.sqrt(verdict.seeds)
    return f"{with_error([verdict.gain, error], verdict.seeds, '.4f')} {verdict.against.name}"


def against_budget(group: Group, method: str, label: str) -> str:
    """The same, against the widest uniform width that the budget holds."""
    width = "" if method.startswith(UNIFORM) else group.within(label)
    if not width:
        return "-"
    uniform = {r["seed"]: float(r["test_auc"]) for r in group.of(UNIFORM, width)}
    own = {r["seed"]: float(r["test_auc"]) for r in group.of(method, label)}
    gains = [own[s] - uniform[s] for s in own if s in uniform]
    return f"{with_error(spread(gains), len(gains), '.4f')} UES-{width}"


def winners(groups: Sequence[Group]) -> list[str]:
    """Who is best at each budget, and who is level with it."""
    lines = [
        "## Best at each budget",
        "",
        "The highest mean test AUC over the seeds that all have, and the methods that are lower by no more than one "
        "standard error of the difference, paired by seed. uniform is the widest uniform width that the budget holds.",
        "",
        "| data set | budget | best | test AUC | level with it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group in groups:
        for budget in group.budgets:
            auc = shared_auc(group, budget)
            if auc:
                best = max(auc, key=lambda m: statistics.fmean(auc[m]))
                told = with_deviation(spread(auc[best]), ".4f")
                lines.append(f"| {group.title} | {budget} | {best} | {told} | {level_with(best, auc)} |")
    return [*lines, "", *unshared(groups)]


def shared_auc(group: Group, budget: str) -> dict[str, list[float]]:
    """Method -> test AUC of each seed that all methods of the budget have; empty where they share none."""
    own = {m: {r["seed"]: float(r["test_auc"]) for r in group.at(m, budget)} for m in [*group.methods, UNIFORM]}
    seeds = sorted(shared_seeds(group, budget))
    return {m: [by_seed[s] for s in seeds] for m, by_seed in own.items() if by_seed} if seeds else {}


def level_with(best: str, auc: dict[str, list[float]]) -> str:
    """The methods that are at most a standard error below the best one; one seed does not tell."""
    if len(auc[best]) < 2:
        return "one seed"
    found = []
    for method, values in auc.items():
        mean, deviation = spread([b - v for b, v in zip(auc[best], values, strict=True)])
        error = deviation / math.sqrt(len(values))
        if method != best and mean <= error:
            found.append(f"{method} ({-mean:+.4f}, s.e. {error:.4f})")
    return ", ".join(found) or "none"


def costs(groups: Sequence[Group]) -> list[str]:
    """What searches cost, by method and data set."""
    found = {g.title: cost_of(g) for g in groups}
    methods = list(dict.fromkeys(m for costs in found.values() for m in costs))
    if not methods:
        return ["## Search cost", "", "No file tells what the searches cost.", ""]
    references = sorted({r["cost_reference"] for g in groups for r in g.rows if r.get("cost_reference")})
    clocks = sorted({r["cost_clock"] for g in groups for r in g.rows if r.get("cost_clock")})
    lines = [
        "## Search cost",
        "",
        f"In multiples of one training of {' or '.join(references)} with the same seed; whole commands, "
        f"{' or '.join(clocks)} time. A "
        "search is that of all budgets of a data set together. A model that several methods begin with counts in full "
        f"for each of them.{CHOICE_TOLD if CHOOSES in methods else ''}",
        "",
        f"| method | {' | '.join(found)} |",
        "| --- " * (len(found) + 1) + "|",
    ]
    for method in methods:
        cells = [with_deviation(spread(costs[method]), ".2f") if method in costs else "-" for costs in found.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def cost_of(group: Group) -> dict[str, list[float]]:
    """Method -> multiples, one a seed: the mean over budgets, which one search has served but for ``auto``."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in group.rows:
        if row["budget"] and row.get("search_cost"):
            found.setdefault(row["method"], {}).setdefault(row["seed"], []).append(float(row["search_cost"]))
    return {method: [statistics.fmean(x) for x in by_seed.values()] for method, by_seed in found.items()}


def stabilities(groups: Sequence[Group]) -> list[str]:
    """How alike the widths of several seeds are."""
    lines = [
        "## Stability over seeds",
        "",
        "Share of fields with the same width, and Spearman's rank correlation of widths over fields, each the mean "
        "over pairs of seeds.",
        "",
    ]
    for group in groups:
        budgets = group.budgets
        head = " | ".join(f"{b}: same | {b}: rho" for b in budgets)
        lines += [f"| {group.title} | {head} |", "| --- " * (2 * len(budgets) + 1) + "|"]
        for method in group.methods:
            cells = [stability_of(group, method, budget) for budget in budgets]
            texts = [f"{shown(s.agreement, '.0%')} | {shown(s.correlation, '.2f')}" for s in cells]
            lines.append(f"| {method} | {' | '.join(texts)} |")
        lines.append("")
    return lines


def stability_of(group: Group, method: str, budget: str) -> Stability:
    return stability([widths_in(r) for r in group.of(method, budget)])


def shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def ranks(groups: Sequence[Group]) -> list[str]:
    """Mean ranks by AUC and by logloss: a block for each data set and budget, and one for each data set."""
    lines = [
        "## Ranks",
        "",
        "1 is best. uniform is the widest uniform width that the budget holds. Budgets of one data set share rows and "
        "searches, so blocks of a data set and a budget are not independent, and their test is too sure of itself. "
        "Blocks of whole data sets are independent, and few.",
        "",
        *unshared(groups),
    ]
    for block, make in (("a data set and a budget", blocks_by_budget), ("a data set", blocks_by_data)):
        for figure, (name, higher) in FIGURES.items():
            lines += _ranking(f"By {name}, mean over seeds; a block is {block}", make(groups, figure), higher)
    return lines


def ranking_of(groups: Sequence[Group], figure: str) -> Ranking | None:
    """Of the blocks of data sets and budgets; None where no two methods can be ranked."""
    scores = blocks_by_budget(groups, figure)
    methods, _ = complete(scores)
    return rank(scores, methods, FIGURES[figure][1]) if len(methods) > 1 else None


def _ranking(title: str, scores: dict[str, dict[str, float]], higher: bool) -> list[str]:
    methods, lacking = complete(scores)
    left_out = "".join(f" {m} is left out: not in {'; '.join(blocks)}." for m, blocks in lacking.items())
    if len(methods) < 2:
        return [f"{title}: fewer than two methods are in every block.{left_out}", ""]
    found = rank(scores, methods, higher)
    lines = [
        f"{title}: {sentence(found)}{left_out}",
        "",
        "| method | mean rank | told from the best |",
        "| --- | --- | --- |",
    ]
    for method, mean in zip(found.methods, found.ranks, strict=True):
        lines.append(f"| {method} | {mean:.2f} | {'yes' if found.apart(mean, found.ranks[0]) else 'no'} |")
    return [*lines, ""]


def sentence(found: Ranking) -> str:
    """Blocks, Friedman's test and the critical difference in words."""
    blocks = f"{found.blocks} block" + "s" * (found.blocks != 1)
    if math.isnan(found.chi2):
        return f"{blocks}, {len(found.methods)} methods: not enough for Friedman's test, so nothing is told apart."
    differ = "the methods differ" if found.p_f < found.alpha else "so no difference is shown"
    distance = f"{differ}; critical difference {found.distance:.2f} (Nemenyi, {found.alpha:g})"
    f = "infinite" if math.isinf(found.f) else f"{found.f:.2f}"
    friedman = f"Friedman chi2 {found.chi2:.2f} (p {found.p:.2g}), Iman-Davenport F {f} (p {found.p_f:.2g})"
    return f"{blocks}; {friedman}; {distance}."
