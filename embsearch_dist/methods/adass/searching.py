"""Stage 2: search the trained supernet, as often as budgets change (AdaS&S section 3.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.adass.budget import (
    Budget,
    check_feasible,
    cost_table,
    knapsack,
    parse_budget,
    refine,
    relative_costs,
    total_cost,
)
from embsearch_dist.methods.adass.config import AdassConfig, PolicyConfig
from embsearch_dist.methods.adass.policy import SearchTrace, argmax_choice, search
from embsearch_dist.methods.adass.scorer import SubnetScorer, sample_rows
from embsearch_dist.methods.adass.supernet import SupernetTask, load_supernet
from embsearch_dist.methods.base import Run, Stage
from embsearch_dist.schema import Schema, read_json, write_json
from embsearch_dist.train.monitor import Monitor

SCORED_POINTS = 4000  # dots of the Pareto picture


@dataclass(frozen=True)
class Found:
    """What one search gave: the choice, the policy's last word, and the inherited metrics of the choice."""

    choice: list[int]
    probabilities: torch.Tensor
    metrics: dict[str, float]
    budget: Budget | None


class Searcher:
    """Many searches over one frozen supernet; they share the archive of scored subnets."""

    def __init__(self, schema: Schema, config: AdassConfig, scorer: SubnetScorer) -> None:
        self.schema, self.config, self.scorer = schema, config, scorer
        self.candidates = config.candidates

    def find(self, seed: int, budget: Budget | None = None, monitor: Monitor | None = None) -> Found:
        """One search: the policy, then the hard budget, then the local search (all under ``config.policy``)."""
        policy: PolicyConfig = self.config.policy
        costs = relative_costs(self.schema, self.candidates, policy.resource)
        resource = budget.resource if budget else "parameters"
        absolute = cost_table(self.schema, self.candidates, resource)
        limit = float(budget.limit) if budget else None

        def watch(trace: SearchTrace) -> None:
            if monitor is not None:
                self._record(monitor, trace, policy.steps)

        p = search(self.scorer.score, costs, policy, seed, absolute.float(), limit, watch)
        choice = argmax_choice(p)
        if not self._allowed(choice, absolute, limit):
            choice = self._project(p, absolute, limit)
        if policy.refine:
            sign = -1.0 if policy.metric == "logloss" else 1.0

            def value(c: Sequence[int], m: dict[str, float]) -> float:
                reward = policy.reward_weight * sign * m[policy.metric]
                return reward - policy.lambda_r * total_cost(c, costs) / len(costs)

            choice = refine(
                choice,
                self.scorer.score,
                value,
                lambda c: self._allowed(c, absolute, limit),
                len(self.candidates),
                seed,
            )
        return Found(choice, p, self.scorer.score(torch.tensor([choice]))[0], budget)

    def _allowed(self, choice: Sequence[int], costs: torch.Tensor, limit: float | None) -> bool:
        some = any(self.candidates[j] for j in choice)
        return some and (limit is None or total_cost(choice, costs) <= limit)

    def _project(self, p: torch.Tensor, costs: torch.Tensor, limit: float | None) -> list[int]:
        """The allowed choice the policy likes best; at least one field keeps a width above 0."""
        scores = p.clamp(min=1e-6).log().double()
        bound = float("inf") if limit is None else limit
        choice = knapsack(scores, costs, min(bound, float(costs.max(1).values.sum())))
        if any(self.candidates[j] for j in choice):
            return choice
        for field in sorted(range(len(choice)), key=lambda f: float(costs[f, 1])):
            choice[field] = 1
            if total_cost(choice, costs) <= bound:
                return choice
            choice[field] = 0
        raise AssertionError("check_feasible lets no such budget through")

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
                "scored": len(self.scorer.archive),
            },
        )
        if trace.step % max(1, steps // 20) == 0 or trace.step == steps - 1:
            columns = [str(d) for d in self.candidates]
            monitor.heatmap(trace.step, "policy", trace.p.numpy(), self.schema.names, columns)

    def allocation(self, found: Found, provenance: dict[str, object]) -> Allocation:
        widths = {n: self.candidates[j] for n, j in zip(self.schema.names, found.choice, strict=True)}
        scores = {f"supernet_{k}": found.metrics[k] for k in ("auc", "logloss")}
        budget = {"budget": found.budget.text} if found.budget else {}
        return Allocation(self.schema, widths, {"method": "adass", **provenance, **budget, **scores})


def make_scorer(run: Run, task: SupernetTask | None = None) -> SubnetScorer:
    """Load the finished supernet and cache the activations of the validation sample.

    With several ranks each holds its share of the rows.
    """
    search_config: AdassConfig = run.config.search
    task = task or load_supernet(run)
    batch = search_config.supernet.eval_batch_size
    stream = run.stream("validation", batch, shuffle=False)
    policy, backbone = search_config.policy, task.model.bare_head.backbone
    fields, candidates = len(run.schema.fields), len(search_config.candidates)
    rows = sample_rows(
        run.schema.rows["validation"], policy.rows, fields, candidates, backbone, policy.precision, policy.cache_mb
    )
    # Whole batches only, and all of them when no row is to be left out.
    count = stream.batches_per_epoch if rows >= stream.rows else max(1, rows // batch)
    batches = list(itertools.islice(stream.epoch(0), count))
    return SubnetScorer(task.model, batches, run.context, policy.precision)


class SearchStage(Stage):
    """Search once for ``allocation.json`` and once more for each Pareto budget."""

    name = "search"
    repeatable = True

    def inputs(self, run: Run) -> dict[str, Any]:
        search_config: AdassConfig = run.config.search
        keys = {k: getattr(search_config, k) for k in ("name", "policy", "budget", "pareto")}
        keys["supernet.keep"] = search_config.supernet.keep
        return {"schema": run.schema.fingerprint, "run.seed": run.config.run.seed, "search": keys}

    def run(self, run: Run) -> None:
        config: AdassConfig = run.config.search
        budgets = budgets_of(config, run.schema)
        searcher = Searcher(run.schema, config, make_scorer(run))
        with Monitor(run.dir, self.name, run.context.rank) as monitor:
            monitor.resume_at(0)
            size = f"{config.policy.steps} steps x {config.policy.batch} subnets"
            monitor.say(f"search: {size} on {len(searcher.scorer.labels):,} validation rows")
            seed = run.config.run.seed * 7919 + config.policy.seed
            points = []
            with monitor.progress(len(budgets), "searches") as bar:
                for k, (name, budget) in enumerate(budgets):
                    found = searcher.find(seed, budget, monitor if k == 0 else None)
                    provenance = {"name": name, "seed": run.config.run.seed, "search_seed": config.policy.seed}
                    allocation = searcher.allocation(found, provenance)
                    points.append(self._point(name, allocation, found, chosen=k == 0))
                    run.context.first("writing an allocation", lambda n=name, a=allocation: self._save(run.dir, n, a))  # type: ignore[misc]
                    bar.update(1)
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
        if path.exists():
            # Earlier searches of the same supernet stay in the picture.
            names = {p["name"] for p in points}
            points = points + [{**p, "chosen": False} for p in read_json(path)["points"] if p["name"] not in names]
        costs = cost_table(searcher.schema, searcher.candidates, "parameters")
        archive = list(searcher.scorer.archive.items())
        every = archive[:: max(1, len(archive) // SCORED_POINTS)]
        scored = [[int(total_cost(c, costs)), round(m["auc"], 6)] for c, m in every]
        write_json(path, {"resource": "parameters", "points": points, "scored": scored})
        chosen = directory / "allocations" / f"{points[0]['name']}.json"
        write_json(directory / "allocation.json", read_json(chosen))

    def _point(self, name: str, allocation: Allocation, found: Found, chosen: bool) -> dict[str, Any]:
        return {
            "name": name,
            "widths": allocation.widths,
            "parameters": allocation.total("parameters"),
            "bytes": allocation.total("bytes"),
            "auc": found.metrics["auc"],
            "logloss": found.metrics["logloss"],
            "budget": found.budget.limit if found.budget else None,
            "chosen": chosen,
        }


def budgets_of(config: AdassConfig, schema: Schema) -> list[tuple[str, Budget | None]]:
    """(allocation name, budget) of every search of this stage, the main one first; all checked.

    Raises:
        UserError: a budget that no allocation can obey.
    """
    found: list[tuple[str, Budget | None]] = []
    texts = [(config.name, config.budget, "search.budget")]
    texts += [(f"{config.name}-{t.strip()}", t, "search.pareto") for t in config.pareto]
    for name, text, key in texts:
        budget = parse_budget(text, schema, key) if text else None
        if budget:
            check_feasible(budget, schema, config.candidates, key)
        found.append((name.replace("%", "pct").replace(" ", ""), budget))
    return found


def describe(searcher: Searcher, point: dict[str, Any], directory: Path) -> str:
    """The found widths and the next command, for the terminal."""
    widths = "  ".join(f"{n}={w}" for n, w in point["widths"].items())
    reference = 32 * sum(searcher.schema.cardinalities)
    return (
        f"found: {widths}\n"
        f"embedding parameters {point['parameters']:,} ({point['parameters'] / reference:.1%} of UES-32), "
        f"supernet auc {point['auc']:.5f}, {len(searcher.scorer.archive):,} subnets scored\n"
        f"next: python launch/retrain.py --run {directory}"
    )
