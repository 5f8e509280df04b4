"""What a search for networks leaves: the network found, how the search came to it, and what FLOPs buy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from embsearch_dist.errors import script
from embsearch_dist.networks.canonical import prune
from embsearch_dist.networks.space import Space
from embsearch_dist.report import network_picture, page
from embsearch_dist.report import network_plots as plots
from embsearch_dist.report.network_plots import Mark, Population, populations, usage_of
from embsearch_dist.report.page import Cell, Section
from embsearch_dist.report.plots import Curve, curves
from embsearch_dist.report.result import Result
from embsearch_dist.report.runs import Evolution, Network, Run, series
from embsearch_dist.report.style import render, si
from embsearch_dist.report.summary import Comparison, Row, auc_difference, display_name, percent, spearman

OPERATORS = {
    "fc": "FC is a fully connected layer",
    "dot_product": "Dot product takes the inner products of all pairs of tokens",
    "gating": "Gating weighs the columns of one vector by another (L: the side that weighs)",
    "sum": "Sum adds two vectors before a linear layer",
    "efc": "EFC makes new tokens, each a weighted sum of those it reads",
    "attention": "Attention lets tokens weigh each other, row by row",
}
MAX_PICTURES = 3  # of networks found, one per run
ENOUGH = 5  # trained networks that make a rank correlation worth printing


def headline(runs: Sequence[Run], comparison: Comparison | None) -> list[str]:
    """The result of a search for networks in plain words; nothing where no run is one."""
    run = next((r for r in runs if r.by_network), None)
    if run is None:
        return []
    rows = [r for r in comparison.rows if _by_network(r)] if comparison else []
    if comparison is None or not rows:
        return [_unevaluated(run)]
    own = [r for r in rows if r.name == run.provenance.get("name")]
    first = next(iter(own or [r for r in rows if any(x.rank == 1 for x in r.results)] or rows))
    trust = f"mean of {len(first.results)} runs" if len(first.results) > 1 else "one seed, so the spread is unknown"
    sentences = [
        f"The found network ({first.name}) reaches a logloss of {_logloss(first):.4f} and {_auc(first)} "
        f"on the {comparison.split} split ({trust})."
    ]
    others = [r for r in comparison.rows if not _by_network(r)]
    # Behind tables of the same width the network is all that differs.
    alike = [r for r in others if run.space is not None and r.uniform_width == run.space.width]
    base = next(iter(alike or [r for r in others if r is comparison.baseline] or others), None)
    sentences.append(_against(first, base) if base else "No other model was trained to compare it with.")
    lowest = min(rows, key=_logloss)
    if f"{_logloss(lowest):.4f}" != f"{_logloss(first):.4f}":
        which = f"{lowest.name} ({behind(lowest)}) has the lowest logloss, {_logloss(lowest):.4f}"
        sentences.append(f"Of the networks trained from scratch, {which}.")
    return sentences


def _auc(row: Row) -> str:
    return "no AUC (rows of one class)" if math.isnan(row.auc.mean) else f"an AUC of {row.auc.mean:.4f}"


def behind(row: Row) -> str:
    """What stands behind the tables of a result: a network of a search, or a backbone."""
    return ", ".join(dict.fromkeys(_behind(r) for r in row.results))


def any_network(comparison: Comparison) -> bool:
    """Whether a network of a search stands behind the tables of a result."""
    return any(map(_by_network, comparison.rows))


def found(runs: Sequence[Run], directory: Path) -> Section | None:
    """The best network as a picture, and the best few as a table; None without a search for networks."""
    searched = [r for r in runs if r.by_network]
    shown = [r for r in searched if best(r)]
    if not searched:
        return None
    if not shown:
        text = "No network has been scored yet: evolution.json and architecture.json are not in this run directory."
        return Section("network", "Network found", page.missing(text))
    body = ""
    for k, run in enumerate(shown[:MAX_PICTURES]):
        body += _picture(run, k, runs, directory)
    if len(shown) > MAX_PICTURES:
        body += page.paragraph(f"The networks of the first {MAX_PICTURES} of {len(shown)} runs are drawn.", "note")
    body += _table(shown, runs)
    title = "Network found" if all(r.networks for r in shown) else "Best network so far"
    return Section("network", title, body)


def search(runs: Sequence[Run], directory: Path) -> Section | None:
    """How the scores came down, and which operators and widths stayed; None without a search for networks."""
    run = _scored(runs)
    if run is None or run.evolution is None:
        return _curves_alone(runs, directory)
    evolution, points = run.evolution, populations(run.evolution)
    fitness = [n.number("fitness") for n in evolution.scored]
    chosen = min(range(len(fitness)), key=fitness.__getitem__)
    image = render("evolution", lambda t: plots.evolution(t, fitness, points, chosen, _score(evolution)), directory)
    random = evolution.setting("strategy", "evolution") == "random"
    caption = (
        "Each dot is a network, in the order of scoring. Its score is the logloss on validation rows with the weights "
        "of the supernet, which all networks share, after a little training of the last layer; lower is better. "
    )
    if evolution.setting("cost_weight", 0.0):
        cost = evolution.setting("cost", "none")
        caption += f"What a network costs ({cost}) is added to its score (search.evolution.cost_weight). "
    if random:
        caption += f"All were {evolution.beginning}; the lines are mean and best of the last {evolution.alive:,}"
    else:
        caption += (
            f"The first {points[0].scored:,} (shaded) were {evolution.beginning} and live. Then, in each generation, "
            "the best of some of the living is copied with small changes; the copies live, and as many of the oldest "
            "die, however good they are. The lines are mean and best of the living (the population)"
        )
    caption += ", the diamond is the best of all. "
    above = sum(f > plots.ceiling(fitness, points) for f in fitness)
    caption += f"{above:,} dots lie above the frame. " * (above > 0) + _label(run, runs)
    body = page.paragraph(_told(evolution, points))
    body += page.picture(image, caption, "Scores in the order of scoring, and FLOPs over generations")
    if run.space is not None and len(points) > 1 and not random:
        body += _usage_picture(run, runs, run.space, directory)
    return Section("search", "Search", body)


def trade_off(runs: Sequence[Run], comparison: Comparison | None, directory: Path) -> Section | None:
    """Logloss over FLOPs, of all that was scored and of what was trained; None without a search for networks."""
    if not any(r.by_network for r in runs):
        return None
    run = _scored(runs)
    rows = [r for r in comparison.rows if r.spread("logloss") and r.spread("flops_per_sample")] if comparison else []
    marks = [_mark(r) for r in rows]
    scored: list[tuple[float, float]] = []
    start, chosen, parts = 0, None, []
    if run is not None and run.evolution is not None:
        scored = [_place(n) for n in run.evolution.scored]
        start, chosen = populations(run.evolution)[0].scored, _place(best(run)[0])
        parts.append(
            f"The dots{' (left)' if marks else ''} are the {len(scored):,} networks that the search scored, grey the "
            f"random start; the diamond is the one it chose{' by logloss and cost' if _costed(run.evolution) else ''}, "
            "the line the lowest logloss for so many FLOPs or fewer. Inherited logloss puts networks in order, it does "
            "not say how good they get."
        )
        parts += [_label(run, runs)] * (len(runs) > 1)
    if not scored and not marks:
        return None
    split = comparison.split if comparison else ""
    if marks:
        parts.append(
            f"{'The marks on the right' if scored else 'The marks'} are models trained from scratch: diamonds with a "
            "network of a search, squares others. Lower is better. FLOPs are those of one row, two for each "
            "multiply-add, without the look-up of embeddings."
        )
        reachable = next((r.truth.get("from_fields") or r.truth for r in runs if r.truth), {})
        if reachable.get("bayes_logloss") is not None:
            parts.append(f"The lowest logloss any model can reach on this data is {reachable['bayes_logloss']:.4f}.")
    else:
        parts.append("No retrained model has been evaluated, so the second panel is missing.")
    image = render("network-cost", lambda t: plots.trade_off(t, scored, start, chosen, marks, split), directory)
    return Section("cost", "Logloss against FLOPs", page.picture(image, " ".join(parts), "Logloss over FLOPs"))


def best(run: Run) -> list[Network]:
    """The best networks of a search, best first: those it left, or of one under way those it would leave."""
    if run.networks or run.evolution is None:
        return run.networks
    kept: dict[float, Network] = {}
    for n in sorted(run.evolution.scored, key=lambda n: (n.number("fitness"), n.key)):
        kept.setdefault(n.number("logloss"), n)
    return list(kept.values())[: int(run.evolution.setting("keep", 15))]


def _picture(run: Run, place: int, runs: Sequence[Run], directory: Path) -> str:
    """The best network of a run, drawn; the first one with what its parts mean."""
    architecture, schema, space = best(run)[0].architecture, run.schema, run.space
    live = [b for b in prune(architecture) if b is not None]
    blocks, own = len(architecture.blocks), f"{run.label}: " * (len(runs) > 1)
    text = f"{own}{blocks} blocks"
    if len(live) < blocks:
        text += f", of which the prediction uses {len(live)}"
    if schema is None or space is None:
        return page.paragraph(text + ".") + page.missing("Not drawn: schema.json is not in this run directory.")
    fields, dense = len(schema.fields), len(schema.dense)
    text += f", behind embeddings of width {space.width} for each of {fields} fields."
    title = f"{own}{run.provenance.get('name', 'network')}"
    draw = partial(network_picture.draw, architecture=architecture, space=space, n_dense=dense, fields=fields)
    image = render(f"network-{place + 1}" if place else "network", lambda t: draw(t, title=title), directory)
    # One caption for all pictures: with several it has to name every operator.
    several = (*space.dense_operators, *space.sparse_operators) if len(runs) > 1 else ()
    used = {*several, *(o for b in live for o in (*b.dense, *b.sparse))}
    caption = (
        "Each block makes one vector per row (dense, above) and some tokens (sparse, below): vectors of "
        f"{space.width} numbers, as an embedding is one. It reads the input and blocks before it, as the lines show. "
        f"The prediction is made of the last block. {'. '.join(OPERATORS[o] for o in OPERATORS if o in used)}."
    )
    alt = "The blocks of the network and what each reads"
    return page.paragraph(text) + page.picture(image, "" if place else caption, alt)


def _table(shown: Sequence[Run], runs: Sequence[Run]) -> str:
    """The best networks of each run, with what became of those that were trained."""
    costed = any(r.evolution is not None and _costed(r.evolution) for r in shown)
    timed = any(n.number("latency") > 0 for r in shown for n in best(r))
    trained = _trained(shown, runs)
    lines, said = [], ""
    for run in shown:
        networks = best(run)
        for rank, n in enumerate(networks, 1):
            results = trained.get(n.key, [])
            cells = [Cell(f"{run.label} " * (len(shown) > 1) + str(rank)), _cell(n, "logloss", ".5f")]
            cells += [_cell(n, "fitness", ".5f")] * costed + [_cell(n, "flops", ",.0f"), _cell(n, "parameters", ",.0f")]
            cells += [_cell(n, "latency", ".2f")] * timed + [_cell(n, "generation", ".0f")]
            cells.append(Cell(str(sum(b is not None for b in prune(n.architecture)))))
            cells.append(Cell(results[0].name if results else "-", css="text"))
            cells += [_measured(results, "logloss"), _measured(results, "auc")]
            lines.append(("found" if rank == 1 else "", cells))
        heights = [n.number("fitness") for n in networks]
        if len(networks) > 1 and not math.isnan(sum(heights)):
            said += f"{run.label}: the " if len(shown) > 1 else "The "
            said += f"{len(networks)} best lie within {max(heights) - min(heights):.5f} of each other. "
        pairs = [(n.number("logloss"), _mean(trained[n.key], "logloss")) for n in networks if n.key in trained]
        rho = spearman(*zip(*pairs, strict=True)) if len(pairs) >= ENOUGH else None
        if rho is not None:
            said += f"Spearman's rho between the search's and the test logloss of the {len(pairs)} trained ones is "
            said += f"{rho:+.2f} (1: the same order). "
    head = [
        "Rank",
        "Logloss (shared weights)",
        *["Score"] * costed,
        "FLOPs",
        "Parameters",
        *["ms per 512 rows"] * timed,
    ]
    head += ["Generation", "Blocks used", "Trained as", "Test logloss", "Test AUC"]
    text = (
        "FLOPs (of one row) and parameters are those behind the tables; generation 0 is the random start. "
        f"{said}Train others too before settling on one: {script('retrain')} --run RUN --model.architecture "
        "RUN/architectures/rank-2.json --name second"
    )
    return "<h3>The best of the search</h3>" + page.table(head, lines, (len(head) - 3,)) + page.paragraph(text, "note")


def _trained(shown: Sequence[Run], runs: Sequence[Run]) -> dict[str, list[Result]]:
    """Key -> test results of networks behind the tables they were searched with; seeds of one name together."""
    found: dict[str, list[Result]] = {}
    plain = {r.space.width for r in shown if r.space is not None}
    for result in (r for run in runs for r in run.results if r.network is not None and r.split == "test"):
        if result.widths and not (len(set(result.widths.values())) == 1 and plain & set(result.widths.values())):
            continue  # widths that another search found
        same = found.setdefault(str(result.network), [])
        if not same or same[0].name == result.name:
            same.append(result)
    return found


def _usage_picture(run: Run, runs: Sequence[Run], space: Space, directory: Path) -> str:
    evolution = run.evolution
    assert evolution is not None
    first = [n for n in evolution.scored if n.number("generation") == 0]
    last = evolution.scored[-evolution.alive :]
    shares = usage_of(first, space), usage_of(last, space)
    image = render("usage", lambda t: plots.usage(t, *shares), directory)
    caption = (
        f"How often the {len(first):,} networks of the random start and the last {len(last):,} living use each choice; "
        "only what enters a prediction counts. The living descend from a few parents, so that a choice may have "
        "spread with a good network without being what made it good. " + _label(run, runs)
    )
    picture = page.picture(image, caption, "Shares of operators, widths and blocks in the first and last population")
    return "<h3>What the last population uses</h3>" + picture


def _curves_alone(runs: Sequence[Run], directory: Path) -> Section | None:
    """Of a search whose evolution.json is not there: what it logged."""
    panels = []
    for title, key in (("Mean of the living", "population_mean"), ("Best so far", "best"), ("FLOPs", "flops_mean")):
        lines = [Curve(r.label, k, *series(r.metrics, key, "evolution")) for k, r in enumerate(runs)]
        if any(c.steps for c in lines):
            unit = "FLOPs per row" if key == "flops_mean" else "score"
            panels.append((title, unit, [c for c in lines if c.steps]))
    if not panels:
        return None
    image = render("evolution", lambda t: curves(t, panels, x_label="generation"), directory)
    caption = "Scores of the living networks over generations; lower is better. evolution.json, with each, is missing."
    return Section("search", "Search", page.picture(image, caption, "Scores over generations"))


def _told(evolution: Evolution, points: Sequence[Population]) -> str:
    """The search in numbers."""
    chosen = min(evolution.scored, key=lambda n: (n.number("fitness"), n.key))
    generations, score = len(points) - 1, "score" if _costed(evolution) else "logloss"
    text = f"The search scored {len(evolution.scored):,} networks"
    if not evolution.over:
        text += f" so far ({evolution.done:,} of {int(evolution.setting('generations', 0)) + 1:,} generations)"
    low = min(n.number("fitness") for n in evolution.scored[: points[0].scored])
    gain = low - chosen.number("fitness")
    text += f". The best has a {score} of {chosen.number('fitness'):.5f} (generation {chosen.number('generation'):.0f})"
    if generations:
        text += f"; the best of the {points[0].scored:,} {evolution.beginning} had {low:.5f}"
        text += f", {gain:.5f} more" if gain > 0 else ", the same network"
        before, after = points[0].mean, points[-1].mean
        text += f". The mean of the living {'fell' if after <= before else 'rose'} from {before:.5f} to {after:.5f}"
    return text + "."


def _unevaluated(run: Run) -> str:
    networks = best(run)
    if not networks:
        stages = ", ".join(sorted({str(line.get("stage")) for line in run.metrics}))
        return f"No network has been scored yet{f' (recorded so far: {stages})' * bool(stages)}: there is no result."
    n, evolution = networks[0], run.evolution
    used = sum(b is not None for b in prune(n.architecture))
    text = f"The search {'chose' if run.networks else 'has so far found'} a network of {used} block{'s' * (used != 1)}"
    if not math.isnan(n.number("flops")):
        text += f" with {si(n.number('parameters'))} parameters and {si(n.number('flops'))} FLOPs per row"
    if evolution is not None:
        text += f", the best of {len(evolution.scored):,} that were scored with shared weights"
    return text + "; no network trained from scratch has been evaluated, so how good it gets is open."


def _against(row: Row, base: Row) -> str:
    delta, gain = auc_difference(row, base), _logloss(base) - _logloss(row)
    areas = not math.isnan(delta.mean)
    theirs_auc = f" and {base.auc.mean:.4f}" if areas else ""
    text = f"Against {display_name(base)} ({behind(base)}, {_logloss(base):.4f}{theirs_auc}) its logloss is "
    text += f"{abs(gain):.4f} {'lower' if gain >= 0 else 'higher'}"
    if areas:
        text += f" and its AUC {abs(delta.mean):.4f} {'higher' if delta.mean >= 0 else 'lower'}"
    if areas and delta.interval is not None:
        text += f" (95% interval {delta.interval[0]:+.4f} to {delta.interval[1]:+.4f})"
    shares = []
    for key, name in (("flops_per_sample", "FLOPs"), ("embedding_parameters", "embedding parameters")):
        own, theirs = row.spread(key), base.spread(key)
        if own is not None and theirs is not None and theirs.mean:
            share = own.mean / theirs.mean
            shares.append(f"as many {name}" if share == 1 else f"{percent(share)} of the {name}")
    return text + (f", with {' and '.join(shares)}." if shares else ".")


def _behind(result: Result) -> str:
    if result.network is None:
        return result.backbone or "-"
    return f"found, rank {result.rank}" if result.rank else "another architecture"


def _by_network(row: Row) -> bool:
    return any(r.network is not None for r in row.results)


def _logloss(row: Row) -> float:
    spread = row.spread("logloss")
    return spread.mean if spread else math.nan


def _mark(row: Row) -> Mark:
    logloss, flops = row.spread("logloss"), row.spread("flops_per_sample")
    assert logloss is not None and flops is not None
    return Mark(display_name(row), flops.mean, logloss.mean, logloss.sd, _by_network(row))


def _place(network: Network) -> tuple[float, float]:
    return network.number("flops"), network.number("logloss")


def _scored(runs: Sequence[Run]) -> Run | None:
    """The first run that has scored networks."""
    return next((r for r in runs if r.evolution is not None and r.evolution.scored), None)


def _costed(evolution: Evolution) -> bool:
    return bool(evolution.setting("cost_weight", 0.0))


def _score(evolution: Evolution) -> str:
    return "score: logloss and cost" if _costed(evolution) else "validation logloss (inherited weights)"


def _cell(network: Network, key: str, form: str) -> Cell:
    value = network.number(key)
    return Cell("-" if math.isnan(value) else format(value, form))


def _mean(results: Sequence[Result], key: str) -> float:
    values = [r.numbers[key] for r in results if key in r.numbers]
    return statistics.fmean(values) if values else math.nan


def _measured(results: Sequence[Result], key: str) -> Cell:
    value = _mean(results, key)
    return Cell("-" if math.isnan(value) else f"{value:.4f}")


def _label(run: Run, runs: Sequence[Run]) -> str:
    return f"Shown for {run.label}." if len(runs) > 1 else ""
