"""Stage 2: search the trained supernet, as often as budgets change (AdaS&S section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError, script
from embsearch_dist.files import copy_sealed, write_sealed
from embsearch_dist.methods.adass.config import AdassConfig, PolicyConfig
from embsearch_dist.methods.adass.distinct import distinct_of
from embsearch_dist.methods.adass.knapsack import InheritedLosses, make_measured
from embsearch_dist.methods.adass.local import ROUNDS, SWEEPS, Problem, Tick, prune, refine, sweep, within_budget
from embsearch_dist.methods.adass.policy import SearchTrace, argmax_choice, nearest_allowed, search
from embsearch_dist.methods.adass.scored_rows import make_scorer
from embsearch_dist.methods.adass.scoring import Scoring
from embsearch_dist.methods.adass.supernet_stage import load_supernet
from embsearch_dist.methods.budget import (
    Budget,
    cost_table,
    relative_costs,
    total_cost,
)
from embsearch_dist.methods.found import SCORED_POINTS, budget_told, budgets, earlier_points
from embsearch_dist.methods.stages import Stage
from embsearch_dist.methods.utilities import search_stage as utilities
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.train.metrics import shown
from embsearch_dist.train.monitor import Monitor

MANY_FIELDS = 64
"""With more, ``finder: auto`` sweeps: a policy that draws all fields anew in each subnet learns little of each one, and
what it costs grows with the fields. Heat maps of more fields are recorded once a stage."""
SWEPT = 16_000_000  # changes times rows of a sweep; it takes fewer rows where that would be more
LEAST_SWEPT_ROWS = 2048
SWEPT_ROUNDS = 6  # of the local search behind sweeps, which have done most of its work


@dataclass(frozen=True)
class Found:
    """What one search gave: the choice, the policy's last word, the inherited metrics of the choice, and how many
    columns the last check for evidence took away."""

    choice: list[int]
    probabilities: torch.Tensor
    metrics: dict[str, float]
    budget: Budget | None
    pruned: int = 0


class Searcher:
    """Many searches over one frozen supernet; they share the archive of scored subnets."""

    def __init__(
        self,
        schema: Schema,
        config: AdassConfig,
        scorer: Scoring,
        distinct: torch.Tensor | None = None,
        extra: int = 0,
        measured: utilities.Searcher | None = None,
    ) -> None:
        """
        Args:
            distinct: ``[F, T]`` bool, candidates that may be chosen; None: all.
            extra: columns of a kept field's table beside its width (``ModelConfig.extra``).
            measured: of the same supernet, for ``finder: knapsack``; see :func:`make_measured`.

        Raises:
            UserError: ``finder: knapsack``, and no ``measured``.
        """
        self.schema, self.config, self.scorer, self.extra = schema, config, scorer, extra
        self.candidates = config.candidates
        shape = len(schema.fields), len(config.candidates)
        self.allowed = torch.ones(shape, dtype=torch.bool) if distinct is None else distinct.cpu()
        self._few = scorer.part(config.policy.policy_rows) if config.policy.policy_rows else None
        finder = config.policy.finder
        self.measured = measured if finder == "knapsack" else None
        if finder == "knapsack" and measured is None:
            raise UserError("finder: knapsack needs a supernet that search.py has trained; choose sweeps or policy")
        self.sweeps = finder == "sweeps" or (finder == "auto" and shape[0] > MANY_FIELDS)
        self.rounds = SWEPT_ROUNDS if self.sweeps else ROUNDS

    def find(
        self, seed: int, budget: Budget | None = None, monitor: Monitor | None = None, tick: Tick = lambda n: None
    ) -> Found:
        """One search: the policy or sweeps, then the hard budget, the local search, and the check for evidence; or the
        knapsack, which has the last two in it.

        Args:
            tick: told how many of :meth:`subnets` are done.
        """
        policy: PolicyConfig = self.config.policy
        if self.measured is not None:
            return self._by_knapsack(self.measured, budget, monitor, tick)
        problem = self._problem(budget)
        if self.sweeps:
            choice, p = self._by_sweeps(problem, monitor, tick)
        else:
            choice, p = self._by_policy(problem, seed, monitor, tick)
        if policy.refine:
            promise = p.clamp(min=1e-6).log().numpy()

            def refined(rounds: int) -> None:
                tick(rounds * policy.moves)

            choice = refine(problem, choice, seed, policy.moves, promise, self.rounds, refined)
        kept = choice
        if policy.evidence >= 0:
            choice = prune(problem, choice, policy.evidence, lambda n: tick(len(choice)))
        gone = int(problem.widths[kept].sum() - problem.widths[choice].sum())
        return Found(choice, p, self.scorer.score_near(choice, torch.tensor([choice]))[0], budget, gone)

    @property
    def told(self) -> str:
        """How it searches, for the terminal."""
        if self.measured is not None:
            return "a knapsack over measured losses"
        policy = self.config.policy
        return "sweeps over single changes" if self.sweeps else f"{policy.steps} steps x {policy.batch} subnets"

    @property
    def archive(self) -> dict[tuple[int, ...], dict[str, float]]:
        """All scored subnets; where only the policy has seen one, from its share of the rows."""
        few = self._few.archive if self._few else {}
        return few | self.scorer.archive

    def subnets(self) -> int:
        """How many subnets a search scores at most, about: the whole of a progress bar."""
        policy, (fields, candidates) = self.config.policy, self.allowed.shape
        if self.measured is not None:
            return (1 + self.measured.config.rounds) * fields * candidates
        found = SWEEPS * fields * (candidates - 1) if self.sweeps else policy.steps * policy.batch
        found += self.rounds * policy.moves if policy.refine else 0
        return found + (fields * (candidates - 1) if policy.evidence >= 0 else 0)

    def _problem(self, budget: Budget | None) -> Problem:
        policy = self.config.policy
        resource = budget.resource if budget else "parameters"
        costs = cost_table(self.schema, self.candidates, resource, self.extra).numpy()
        widths = np.array(self.candidates)
        relative = relative_costs(self.schema, self.candidates, self.config.counted, self.extra).double().numpy()
        column = policy.reward_weight * policy.column_cost * widths
        sign = -1.0 if policy.metric == "logloss" else 1.0
        return Problem(
            self.scorer.score_near,
            lambda m: policy.reward_weight * sign * m[policy.metric],
            policy.lambda_r * relative / len(relative) + column,
            costs,
            float(budget.limit) if budget else float("inf"),
            self.allowed.numpy(),
            widths,
        )

    def _by_policy(
        self, problem: Problem, seed: int, monitor: Monitor | None, tick: Tick
    ) -> tuple[list[int], torch.Tensor]:
        policy = self.config.policy

        def watch(trace: SearchTrace) -> None:
            tick(policy.batch)
            if monitor is not None:
                self._record(monitor, trace, policy.steps)

        costs = relative_costs(self.schema, self.candidates, self.config.counted, self.extra)
        limit = None if problem.limit == float("inf") else problem.limit
        column = policy.column_cost * torch.tensor(self.candidates, dtype=torch.float32)
        absolute = torch.from_numpy(problem.costs).float()
        scorer = self._few or self.scorer
        p = search(scorer.score, costs, policy, seed, absolute, limit, watch, self.allowed, column)
        choice = argmax_choice(p)
        if not problem.fit(np.array([choice]))[0]:
            choice = self._project(p, problem)
        return choice, p

    def _by_sweeps(self, problem: Problem, monitor: Monitor | None, tick: Tick) -> tuple[list[int], torch.Tensor]:
        """From the best uniform width; P says of each candidate how its gain compares with the field's others."""
        fields, candidates = self.allowed.shape
        rows = max(LEAST_SWEPT_ROWS, SWEPT // (fields * (candidates - 1)))
        part = self.scorer.part(rows)
        few = replace(problem, score_near=part.score_near)
        starts = (
            nearest_allowed(torch.arange(candidates)[:, None].repeat(1, fields), self.allowed).unique(dim=0).tolist()
        )
        able = [s for s in starts if few.fit(np.array([s]))[0]] or starts[:1]
        start = able[int(few.values(np.array(able), part.score(torch.tensor(able))).argmax())]
        choice, gains = sweep(few, start, tick=tick)
        if not problem.fit(np.array([choice]))[0]:
            choice = within_budget(problem, gains.masked_fill(~self.allowed, -np.inf))
        p = self._leaning(gains)
        if monitor is not None:
            self._record(monitor, self._at_once(problem, choice, p), 1)
        return choice, p

    def _by_knapsack(
        self, measured: utilities.Searcher, budget: Budget | None, monitor: Monitor | None, tick: Tick
    ) -> Found:
        """P says of each candidate what it is worth beside the field's others, all fields being at their widest."""
        model, changes = cast(InheritedLosses, measured.model), self.allowed.numel()
        rows = 0

        def watch(more: int) -> None:
            nonlocal rows
            before, rows = rows, rows + more
            tick(changes * rows // model.own_rows - changes * before // model.own_rows)

        measured.tick = watch
        worth = measured.worth_at_full_width()
        choice = model.subnet(measured.ranks(measured.find(budget)))
        p = self._leaning(worth)
        (metrics,) = self.scorer.score_near(choice, torch.tensor([choice]))
        if monitor is not None:
            self._record(monitor, self._at_once(self._problem(budget), choice, p), 1)
        return Found(choice, p, metrics, budget)

    def _leaning(self, gains: torch.Tensor) -> torch.Tensor:
        """``[F, T]`` probabilities that say of each candidate how its gain compares with the field's others."""
        scale = gains.abs().amax(1, keepdim=True).clamp(min=1e-12)
        return (gains / scale * 4).masked_fill(~self.allowed, -np.inf).softmax(1).float()

    def _at_once(self, problem: Problem, choice: list[int], p: torch.Tensor) -> SearchTrace:
        """What was found without steps, as one step of a search."""
        fields, value = np.arange(len(choice)), problem.value(choice)
        price = float(problem.price[fields, choice].sum())
        entropy = float(-(p * p.clamp(min=1e-30).log()).sum(1).mean())
        reward = (value + price) / self.config.policy.reward_weight
        return SearchTrace(0, reward, reward, entropy, price, float(problem.costs[fields, choice].sum()), p)

    def _project(self, p: torch.Tensor, problem: Problem) -> list[int]:
        """The allowed choice the policy likes best; at least one field keeps a width above 0."""
        scores = p.clamp(min=1e-6).log().double().masked_fill(~self.allowed, -np.inf)
        return within_budget(problem, scores)

    def _record(self, monitor: Monitor, trace: SearchTrace, steps: int) -> None:
        widths = torch.tensor(self.candidates, dtype=torch.float32)
        monitor.scalars(
            trace.step,
            {
                "reward_mean": trace.reward_mean,
                "reward_best": trace.reward_best,
                "entropy": trace.entropy,
                "penalty": trace.penalty,
                "expected_width": float((trace.p * widths).sum(1).mean()),
                "expected_cost": trace.expected_cost,
                "scored": len(self.archive),
            },
        )
        every = steps if len(trace.p) > MANY_FIELDS else max(1, steps // 20)
        if (trace.step % every == 0 and every < steps) or trace.step == steps - 1:
            columns = [str(d) for d in self.candidates]
            monitor.heatmap(trace.step, "policy", trace.p.numpy(), self.schema.names, columns)

    def allocation(self, found: Found, provenance: dict[str, object]) -> Allocation:
        widths = {n: self.candidates[j] for n, j in zip(self.schema.names, found.choice, strict=True)}
        scores = {f"supernet_{k}": found.metrics[k] for k in ("auc", "logloss")}
        told = budget_told(found.budget, self.config.precision)
        return Allocation(self.schema, widths, {"method": "adass", **provenance, **told, **scores}, self.extra)


def make_searcher(run: Run[AdassConfig]) -> Searcher:
    """Load the finished supernet, look up the rows that its subnets are scored on, and make the searches of it."""
    task, distinct = load_supernet(run), distinct_of(run.config, run.schema)
    scorer, config = make_scorer(run, task), run.config.search
    measured = make_measured(run, task, scorer, distinct) if config.policy.finder == "knapsack" else None
    return Searcher(run.schema, config, scorer, distinct, run.config.model.extra, measured)


class SearchStage(Stage[AdassConfig]):
    """Search once for ``allocation.json`` and once more for each Pareto budget."""

    name = "search"
    repeatable = True

    def inputs(self, run: Run[AdassConfig]) -> dict[str, Any]:
        search_config = run.config.search
        keys = {k: getattr(search_config, k) for k in ("name", "policy", "budget", "pareto", "precision")}
        keys["supernet.keep"] = search_config.supernet.keep
        return {"schema": run.schema.fingerprint, "run.seed": run.config.run.seed, "search": keys}

    def run(self, run: Run[AdassConfig]) -> None:
        config = run.config.search
        extra = run.config.model.extra
        wanted = budgets_of(config, run.schema, extra)
        searcher = make_searcher(run)
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.resume_at(-1)
            split = run.schema.rows["validation"]
            monitor.say(f"search: {searcher.told} on {len(searcher.scorer.labels):,} of {split:,} validation rows")
            if searcher.measured is not None:
                searcher.measured.note_by_heart(monitor)
            seed = run.config.run.seed * 7919 + config.policy.seed
            points = []
            whole = searcher.subnets()
            with monitor.progress(len(wanted) * whole, "subnets") as bar:
                for k, (name, budget) in enumerate(wanted):
                    found = searcher.find(seed, budget, monitor if k == 0 else None, bar.update)
                    provenance = {"name": name, "seed": run.config.run.seed, "search_seed": config.policy.seed}
                    allocation = searcher.allocation(found, provenance)
                    points.append(self._point(name, allocation, found, chosen=k == 0))
                    run.context.first("writing an allocation", self._save, run.dir, name, allocation)
                    bar.update((k + 1) * whole - bar.done)
            picked = torch.zeros(len(run.schema.fields), len(config.candidates))
            for f, name in enumerate(run.schema.names):
                picked[f, config.candidates.index(points[0]["widths"][name])] = 1
            columns = [str(d) for d in config.candidates]
            monitor.heatmap(config.policy.steps, "allocation", picked.numpy(), run.schema.names, columns)
            run.context.first("writing the Pareto set", lambda: self._finish(run.dir, searcher, points))
            monitor.say(describe(searcher, points[0], run.dir))

    def _save(self, directory: Path, name: str, allocation: Allocation) -> None:
        allocation.save(directory / "allocations" / f"{name}.json")

    def _finish(self, directory: Path, searcher: Searcher, points: list[dict[str, Any]]) -> None:
        path = directory / "search" / "pareto.json"
        # Earlier searches of the same supernet stay in the picture.
        points = points + earlier_points(path, {p["name"] for p in points})
        costs = cost_table(searcher.schema, searcher.candidates, "parameters", searcher.extra)
        archive = list(searcher.archive.items())
        every = archive[:: max(1, len(archive) // SCORED_POINTS)]
        scored = [[int(total_cost(c, costs)), round(m["auc"], 6)] for c, m in every]
        write_sealed(path, {"resource": "parameters", "points": points, "scored": scored})
        copy_sealed(directory / "allocations" / f"{points[0]['name']}.json", directory / "allocation.json")

    def _point(self, name: str, allocation: Allocation, found: Found, chosen: bool) -> dict[str, Any]:
        return {
            "name": name,
            "widths": allocation.widths,
            "parameters": allocation.total("parameters"),
            "bytes": allocation.total("bytes"),
            "auc": found.metrics["auc"],
            "logloss": found.metrics["logloss"],
            "budget": found.budget.limit if found.budget else None,
            "pruned_columns": found.pruned,
            "chosen": chosen,
        }


def budgets_of(config: AdassConfig, schema: Schema, extra: int = 0) -> list[tuple[str, Budget | None]]:
    """(allocation name, budget) of every search of this stage, the main one first; all checked.

    Raises:
        UserError: a budget that no allocation can obey.
    """
    return budgets(config, config.name, schema, extra)


def describe(searcher: Searcher, point: dict[str, Any], directory: Path) -> str:
    """The found widths and the next command, for the terminal."""
    some = list(point["widths"].items())[:MANY_FIELDS]
    widths = "  ".join(f"{n}={w}" for n, w in some)
    widths += f"  and {more:,} fields more" if (more := len(point["widths"]) - len(some)) else ""
    reference = (32 + searcher.extra) * sum(searcher.schema.cardinalities)
    return (
        f"found: {widths}\n"
        f"embedding parameters {point['parameters']:,} ({point['parameters'] / reference:.1%} of UES-32), "
        f"supernet auc {shown(point['auc'])}, {len(searcher.archive):,} subnets scored, "
        f"{point['pruned_columns']:,} columns taken away for want of evidence\n"
        f"next: {script('retrain')} --run {directory}"
    )
