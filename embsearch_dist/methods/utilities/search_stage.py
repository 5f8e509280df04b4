"""Stage 2: what each width of each field is worth, and the best allocation under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from embsearch_dist.allocation import Allocation, cost
from embsearch_dist.methods.budget import Budget, cost_table, total_cost
from embsearch_dist.methods.directions import common, principal, sensitive
from embsearch_dist.methods.found import Point, budget_told, budgets, describe, write_points
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.truncated import Changes, Truncated, TruncatedModel, logit_gram
from embsearch_dist.methods.utilities.config import MeasuredSearch, UtilitiesConfig
from embsearch_dist.methods.utilities.worth import LEAST_GAIN, by_heart, choose, harming, mostly_new, spend, supported
from embsearch_dist.methods.widest import Moments, load_widest, rows_at_once, rows_in_memory, sample_of
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.precision import MIXED, row_bytes, served
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.monitor import Monitor

SHARES = (1.0, 0.5, 0.25)  # of what evidence leaves of a budget, that spending it is tried with


@dataclass(frozen=True)
class Option:
    """What a field's table may be: its width, and the precision it is served at; "" where that is not searched."""

    width: int
    precision: str = ""


def options_of(config: MeasuredSearch, extra: int) -> list[Option]:
    """What is searched: the candidate widths; with ``precision: mixed`` each at int8 and at int4, shortest served row
    first. A budget puts them in an order of its own, see :meth:`Searcher.order`."""
    if config.precision != MIXED:
        return [Option(width) for width in config.candidates]
    both = [Option(w, p) for w in config.candidates for p in (("int8", "int4") if w else ("",))]
    return sorted(both, key=lambda o: (row_bytes(o.width + extra, o.precision) if o.width else 0, o.width))


@dataclass
class Searcher:
    """Searches of one widest model, or of one for each group of rows; budgets share what was measured.

    ``model``: of several ``groups`` all of them as one, whose fields are the tables of group 0, then of group 1, ...;
    ``salient``: see :meth:`TruncatedModel.saliency`, None to measure losses; ``held``: see :func:`supported`;
    ``trained``: the model on training rows, None where nothing is spent by them;
    ``alone``: fields that nothing is spent on, see :func:`by_heart`;
    ``extra``: columns of a kept field's table beside its width (``ModelConfig.extra``); ``tick``: see
    :meth:`TruncatedModel.changes`.
    """

    schema: Schema
    config: MeasuredSearch
    model: Truncated
    salient: torch.Tensor | None = None
    held: torch.Tensor | None = None
    trained: Truncated | None = None
    alone: torch.Tensor | None = None
    extra: int = 0
    groups: int = 1
    measured: dict[tuple[int, ...], Changes] = field(default_factory=dict)
    tick: Callable[[int], None] = lambda rows: None

    def __post_init__(self) -> None:
        self.options = options_of(self.config, self.extra)
        self.widths = [o.width for o in self.options]
        self.precisions = [o.precision for o in self.options] if self.config.precision == MIXED else []

    def around(self, choice: Sequence[int]) -> Changes:
        """The changes around an allocation, measured once."""
        key = tuple(choice)
        if key not in self.measured:
            known = self.config.judge == "known"
            self.measured[key] = self.model.changes(choice, self.widths, self.precisions, self.tick, known)
        return self.measured[key]

    def worth_at_full_width(self) -> torch.Tensor:
        """``[F, T]``, options as in ``options``: by saliency, or with every other field at its widest candidate."""
        return self._at_full_width(range(len(self.options)))

    def _at_full_width(self, order: Sequence[int]) -> torch.Tensor:
        if self.salient is not None:
            summed = torch.nn.functional.pad(self.salient.cumsum(1), (1, 0))
            return summed[:, self.config.candidates] - summed[:, self.config.candidates[:1]]
        return self._supported([len(self.options) - 1] * self.model.fields, order)

    def _supported(self, choice: Sequence[int], order: Sequence[int]) -> torch.Tensor:
        """Worths around an allocation, ``[F, T]``, options in an order."""
        changes, widths = self.around(choice).ordered(order), [self.widths[j] for j in order]
        return supported(changes, self.config.evidence, self.held, widths)

    def order(self, costs: torch.Tensor) -> list[int]:
        """The options by what they cost of a budget, ``costs [F, T]``.

        Of two that cost the same the first counts unless there is evidence for the other: the narrower one, and of one
        width that at int8. Parameters do not tell int8 from int4, and bytes as served may be fewer for more columns, so
        the order is the budget's.
        """
        of_field, options = costs[0].tolist(), self.options
        return sorted(
            range(len(options)), key=lambda j: (of_field[j], options[j].width, options[j].precision == "int4")
        )

    def find(self, budget: Budget | None) -> list[int]:
        """The best measured allocation under a budget.

        Worths measured with all other fields wide are added up first, which is right as long as fields do not depend
        on each other. So the found allocation is measured, with all changes around it; the mean of all worths so far
        gives the next one; of those that were measured the one of least loss is taken.

        Raises:
            ValueError: no allocation obeys the budget.
        """
        costs = self.costs(budget)
        limit = float(budget.limit) if budget else None
        order = self.order(costs)
        worths = [self._at_full_width(order)]
        choice = self._choose(worths, costs, limit, order)
        if self.salient is not None:
            return choice
        tried: list[list[int]] = []
        while choice not in tried:
            tried.append(choice)
            worths.append(self._supported(choice, order))
            if len(tried) == self.config.rounds:
                break
            choice = self._choose(worths, costs, limit, order)
        best = min(tried, key=lambda c: (self.around(c).loss, total_cost(c, costs)))
        return best if limit is None else self._spent(best, costs, limit)

    def _spent(self, choice: list[int], costs: torch.Tensor, limit: float) -> list[int]:
        """With what the budget leaves, or a part of it: see :func:`spend`. No more is spent than validation rows bear,
        field by field or all together: their losses may not rise by more than ``evidence`` standard errors.

        Nothing is where values of all fields come back in validation rows: these speak for every width, and what
        training saves beyond what they ask for was learned by heart."""
        if self.trained is None or not self._new(choice).any():
            return choice
        changes = self.trained.changes(choice, self.widths, self.precisions)
        context, before = self.model.context, self._losses(choice)
        harms = harming(choice, self.around(choice), self.config.evidence)
        if self.alone is not None:
            harms |= self.alone[:, None]
        cost_before = total_cost(choice, costs)
        for share in SHARES:
            room = cost_before + share * (limit - cost_before)
            found = context.share(self._spend(choice, changes, costs, room, harms) if context.rank == 0 else [])
            worse, error = self.model.paired(self._losses(found), before, self._speaking(choice, found))
            if worse <= self.config.evidence * error + LEAST_GAIN:
                return found
        return choice

    def _spend(
        self, choice: list[int], changes: Changes, costs: torch.Tensor, room: float, harms: torch.Tensor
    ) -> list[int]:
        order = self.order(costs)
        own, widths = [order.index(j) for j in choice], [self.widths[j] for j in order]
        found = spend(own, changes.ordered(order), widths, costs[:, order], room, harms[:, order])
        return [order[j] for j in found]

    def _new(self, choice: Sequence[int]) -> torch.Tensor:
        assert self.trained is not None
        new = mostly_new(self.ranks(choice), self.model.known_shares(), self.trained.known_shares())
        return new if self.alone is None else new & ~self.alone

    def _speaking(self, choice: Sequence[int], other: Sequence[int]) -> torch.Tensor:
        """``[n]`` bool: this rank's rows that can tell two allocations apart: they know all fields that differ."""
        differing = [f for f, (a, b) in enumerate(zip(choice, other, strict=True)) if a != b]
        return self.model.knowing(differing if self.config.judge == "known" else [])

    def _losses(self, choice: Sequence[int]) -> torch.Tensor:
        """Of this rank's measured rows ``[n]``."""
        return self.model.calibrated(self.ranks(choice), [self.options[j].precision for j in choice])

    def _choose(
        self, worths: list[torch.Tensor], costs: torch.Tensor, limit: float | None, order: list[int]
    ) -> list[int]:
        """By worths of options in an order, and by costs of them as in ``options``."""
        # One rank decides: all have the same figures, but perhaps not the same solver, and must measure the same.
        context = self.model.context
        worth = torch.stack(worths).mean(0)
        found = context.share(choose(worth, costs[:, order], limit, self.groups) if context.rank == 0 else [])
        return [order[j] for j in found]

    def costs(self, budget: Budget | None) -> torch.Tensor:
        """``[F, T]``: what each option costs, in the budget's unit; without one parameters, or bytes as served."""
        if not self.precisions:
            resource = budget.resource if budget else "parameters"
            return cost_table(self.schema, self.widths, resource, self.extra).repeat(self.groups, 1)
        resource = budget.resource if budget else served(MIXED)
        own = [served(o.precision or "int8") if resource == served(MIXED) else resource for o in self.options]
        rows = [
            [cost(r, f.cardinality, w, self.extra) for r, w in zip(own, self.widths, strict=True)]
            for f in self.schema.fields
        ]
        return torch.tensor(rows, dtype=torch.float64).repeat(self.groups, 1)

    def note_by_heart(self, monitor: Monitor) -> None:
        """Say which fields training rows have no say in."""
        if self.alone is not None and self.alone.any():
            names = [n for n, alone in zip(self.schema.names, self.alone.tolist(), strict=False) if alone]
            monitor.say(
                f"note: ids of {', '.join(names)} hardly come again in training rows: only validation rows that know "
                "them can ask for their tables"
            )

    def ranks(self, choice: Sequence[int]) -> list[int]:
        return [self.widths[j] for j in choice]

    def precisions_of(self, choice: Sequence[int]) -> dict[str, str]:
        """Kept field -> the precision chosen for it; nothing where precisions are not searched."""
        if not self.precisions:
            return {}
        named = zip(self.schema.names, (self.options[j] for j in choice), strict=True)
        return {name: option.precision for name, option in named if option.width}


def make_searcher(run: Run[UtilitiesConfig]) -> Searcher:
    """Load the widest model, take the directions of its fields and look the measured rows up."""
    config, model = run.config.search, load_widest(run).model
    truncated, trained = cut_down(run, model, config.rows, config.basis_rows)
    if config.utility == "saliency":
        return Searcher(run.schema, config, truncated, truncated.saliency(model), extra=run.config.model.extra)
    return by_losses(run.schema, config, truncated, trained, run.config.model.extra)


def by_losses(
    schema: Schema, config: MeasuredSearch, measured: Truncated, trained: Truncated, extra: int = 0, groups: int = 1
) -> Searcher:
    """A search of ``measured`` by its losses; ``trained``: the same on training rows."""
    alone = by_heart(trained.again())
    held = None if config.candidates[0] else held_by_training(trained, config).masked_fill(alone, 0.0)
    spending = trained if config.spend else None
    return Searcher(schema, config, measured, None, held, spending, alone, extra, groups)


def cut_down(run: Run, model: SubnetModel, rows: int, basis_rows: int) -> tuple[TruncatedModel, TruncatedModel]:
    """A trained widest model on about ``rows`` validation rows, and on the about ``basis_rows`` training rows that the
    directions of its fields are taken from. The run's section is a :class:`MeasuredSearch`."""
    config: MeasuredSearch = run.config.search
    context = run.context
    basis = sample_of(run, model, "train", basis_rows, config.seed, repeats=True)
    moments = Moments(len(run.schema.fields), config.width, context.device)
    for piece in basis.pieces(rows_at_once(len(run.schema.fields), config.width)):
        moments.add(piece.x)
    moments.sum(context)
    if config.basis == "sensitivity":
        bases = sensitive(moments, logit_gram(model, basis, context))
    else:
        bases = common(moments) if config.basis == "common" else principal(moments)
    truncated = TruncatedModel(model, sample_of(run, model, "validation", rows, config.seed), bases, context)
    return truncated, TruncatedModel(model, basis, bases, context)


def held_by_training(model: Truncated, config: MeasuredSearch) -> torch.Tensor:
    """``[F]``: what the first width above 0 saves on training rows against none, all other fields being whole."""
    narrow = [*[o.width for o in options_of(config, 0)[:2]], config.width]
    changes = model.changes([2] * model.fields, narrow)
    return changes.more[:, 0] - changes.more[:, 1]


def note_fewer(monitor: Monitor, run: Run, rows: int) -> None:
    """Say where memory holds fewer rows than asked for. The run's section is a :class:`MeasuredSearch`."""
    width, fields = run.config.search.width, len(run.schema.fields)
    most = rows_in_memory(fields, width)
    if most < min(rows, max(run.schema.rows.values(), default=rows)):
        monitor.say(f"note: {most:,} rows at most are measured: of {fields} fields of width {width} they take 4 GiB")


class UtilitiesStage(Stage[UtilitiesConfig]):
    """Search once for ``allocation.json`` and once more for each Pareto budget."""

    name = "utilities"
    repeatable = True

    def run(self, run: Run[UtilitiesConfig]) -> None:
        config, context = run.config.search, run.context
        wanted = budgets_of(config, run.schema, run.config.model.extra)
        searcher = make_searcher(run)
        with Monitor(run.dir, self.name, context.rank) as monitor:
            monitor.resume_at(-1)
            monitor.say(
                f"utilities: {len(run.schema.fields)} fields x candidates {config.candidates} on "
                f"{searcher.model.rows:,} validation rows, by {config.utility}"
            )
            note_fewer(monitor, run, max(config.rows, config.basis_rows))
            searcher.note_by_heart(monitor)
            points: list[Point] = []
            rows, rounds = searcher.model.own_rows, config.rounds if config.utility == "loss" else 0
            with monitor.progress(rows * (1 + rounds * len(wanted)), "rows") as bar:
                searcher.tick = bar.update
                columns = [f"{o.width} {o.precision}".strip() for o in searcher.options]
                worth = searcher.worth_at_full_width()
                monitor.heatmap(0, "worth", (worth * 1000).numpy(), run.schema.names, columns)
                for number, (name, budget) in enumerate(wanted, 1):
                    points.append(self._point(run, searcher, name, budget))
                    bar.update(rows * (1 + rounds * number) - bar.done)  # what was measured before, or need not be
            context.first("writing the allocations", lambda: write_points(run.dir, points))
            monitor.say(describe(points[0], run.dir))

    def _point(self, run: Run[UtilitiesConfig], searcher: Searcher, name: str, budget: Budget | None) -> Point:
        choice = searcher.find(budget)
        ranks, precisions = searcher.ranks(choice), searcher.precisions_of(choice)
        metrics = searcher.model.metrics(ranks, [precisions.get(n, "") for n in run.schema.names])
        provenance: dict[str, object] = {
            "method": run.config.method,
            "name": name,
            "seed": run.config.run.seed,
            "search_seed": searcher.config.seed,
            "utility": run.config.search.utility,
            **budget_told(budget, searcher.config.precision),
            **{f"truncated_{k}": metrics[k] for k in ("auc", "logloss")},
        }
        widths = dict(zip(run.schema.names, ranks, strict=True))
        allocation = Allocation(run.schema, widths, provenance, searcher.extra, precisions)
        return Point(
            name,
            allocation,
            metrics,
            budget.limit if budget else None,
            [(allocation.total("parameters"), metrics["auc"])],
        )


def budgets_of(config: UtilitiesConfig, schema: Schema, extra: int) -> list[tuple[str, Budget | None]]:
    """The searches of this stage; see :func:`embsearch_dist.methods.found.budgets`."""
    return budgets(config, config.name, schema, extra, precisions=True)
