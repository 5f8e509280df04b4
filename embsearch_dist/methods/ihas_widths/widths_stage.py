"""Stage 4: what each width of each field is worth to each group, and the best widths of all groups under a budget."""

from __future__ import annotations

import torch

from embsearch_dist.methods.budget import Budget, check_feasible, parse_budget
from embsearch_dist.methods.found import budget_told
from embsearch_dist.methods.ihas.groups_stage import leave_widths, read_open
from embsearch_dist.methods.ihas_widths.config import IHASWidthsConfig
from embsearch_dist.methods.ihas_widths.joined import TruncatedGroups
from embsearch_dist.methods.ihas_widths.widest_stage import group_runs, load_widest_of
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.utilities.search_stage import Searcher, by_losses, cut_down
from embsearch_dist.run import Run
from embsearch_dist.train.monitor import Monitor


class GroupWidthsStage(Stage[IHASWidthsConfig]):
    """Searches the widths of all groups at once; leaves what iHAS leaves: ``groups.json`` and the files beside it."""

    name = "widths"
    repeatable = True

    def run(self, run: Run[IHASWidthsConfig]) -> None:
        config, names = run.config.search, run.schema.names
        searcher = make_searcher(run)
        count, model = searcher.groups, searcher.model
        budget = budget_of_run(run, count)
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.resume_at(-1)
            monitor.say(
                f"widths: {count} group(s) x {len(names)} fields x candidates {config.candidates} on {model.rows:,} "
                "validation rows"
            )
            searcher.note_by_heart(monitor)
            assert isinstance(model, TruncatedGroups)
            for k in model.of_one_class():
                monitor.say(
                    f"note: the measured validation rows of group {k} are of one class: no width saves anything on "
                    "them, so its widths are those that training rows ask for. A higher search.groups.min_rows "
                    "dissolves it"
                )
            worth = searcher.worth_at_full_width()
            tables = [f"{name}, group {k}" for k in range(count) for name in names]
            monitor.heatmap(0, "worth", (worth * 1000).numpy(), tables, [str(w) for w in config.candidates])
            ranks = searcher.ranks(searcher.find(budget))
            metrics = model.metrics(ranks)
            monitor.say(f"on these rows, cut down: auc {metrics['auc']:.5f}  logloss {metrics['logloss']:.5f}")
            own = [dict(zip(names, ranks[k * len(names) :], strict=False)) for k in range(count)]
            kept = most_open(read_open(run), ranks)
            told = {"method": run.config.method, "name": config.name, "seed": run.config.run.seed}
            told |= {"search_seed": config.seed, **budget_told(budget, config.precision)}
            told |= {f"truncated_{k}": metrics[k] for k in ("auc", "logloss")}
            leave_widths(run, monitor, own, kept, told, run.config.model.extra)


def budget_of_run(run: Run[IHASWidthsConfig], groups: int = 1) -> Budget | None:
    """The bound on the tables of all groups together; None where none is given.

    Raises:
        UserError: no budget, or one that not even the narrowest tables of so many groups obey.
    """
    search, extra = run.config.search, run.config.model.extra
    if not search.budget:
        return None
    budget = parse_budget(search.budget, run.schema, extra=extra, precision=search.precision)
    check_feasible(budget, run.schema, search.candidates, extra=extra, groups=groups)
    return budget


def make_searcher(run: Run[IHASWidthsConfig]) -> Searcher:
    """Load the widest models, take the directions of their fields, and look up of each group its share of the measured
    rows."""
    config, runs = run.config.search, group_runs(run)
    measured, trained = [], []
    for own in runs:
        shares = [own.schema.rows[s] / sum(r.schema.rows[s] for r in runs) for s in ("validation", "train")]
        # Every rank looks up a row at least; a group has as many.
        least = run.context.world_size
        rows, basis_rows = (
            max(least, round(n * share)) for n, share in zip((config.rows, config.basis_rows), shares, strict=True)
        )
        one, other = cut_down(own, load_widest_of(own), rows, basis_rows)
        measured.append(one)
        trained.append(other)
    extra = run.config.model.extra
    return by_losses(run.schema, config, TruncatedGroups(measured), TruncatedGroups(trained), extra, len(runs))


def most_open(shares: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """``[K, F * d]`` bool: of each table as many dimensions as it is wide, those that are open most often.

    Args:
        shares: ``[K, F * d]``, of a group's rows in which each dimension is open.
        widths: ``[K * F]``, at most d.
    """
    tables = shares.view(len(widths), -1)
    order = tables.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(tables.shape[1]) < torch.tensor(widths)[:, None]
    return torch.zeros_like(tables, dtype=torch.bool).scatter(1, order, first).view_as(shares)
