"""What searches cost, where nothing that they find is trained: ``league.py run --searches``.

Of each seed all searches are run, the uniform width that is their measure, and, because its choice between trained
models is a part of its search, ``auto`` up to its end under the first budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embsearch_dist.allocation import REFERENCE_WIDTH
from embsearch_dist.config.sections import ModelConfig
from embsearch_dist.schema import Schema
from tools.studies.budget_tables import cost_of, data_told, portable
from tools.studies.comparable import AUTO
from tools.studies.compare_budgets import Plan, uniform_name
from tools.studies.jobs import Job, all_told, machine_of, machines, recorded, run_all
from tools.studies.seeds import spread, with_deviation

COLUMNS = (
    "data_set", "data", "backbone", "seed", "method", "commit", "command", "hardware", "cost_clock",
    "search_cost_seconds", "cost_reference", "search_cost", "search_memory_gib",
)  # fmt: skip
AUTO_TOLD = f"{AUTO}: under the first budget, with the trainings that it chooses from."
Row = dict[str, Any]


def steps(plan: Plan) -> list[list[list[Job]]]:
    """Chains of jobs, each list of them behind the one before: ``auto`` begins with what another search has trained."""
    width = REFERENCE_WIDTH if REFERENCE_WIDTH in plan.widths else max(plan.widths)
    measures = [[plan.training(seed, uniform_name(width, ""), f"ues-{width}", [])] for seed in plan.seeds]
    first = {final.job for seed in plan.seeds for final in plan.finals(seed)[:1]}
    return [measures + plan.searches(), [chain for chain in plan.choices() if chain[-1].name in first]]


def jobs(plan: Plan) -> list[Job]:
    """All that is to be run, as :func:`steps` has it."""
    return [job for chains in steps(plan) for chain in chains for job in chain]


def carry_out(plan: Plan) -> None:
    """Run what is not finished.

    Raises:
        SystemExit: a command failed; names its log. Or the folder has results of another recipe or of other data.
    """
    plan.keep_to()
    for chains in steps(plan):
        run_all(chains, plan.out / "logs", plan.args.jobs)


def rows_of(plan: Plan, data_set: str) -> list[Row]:
    """A line for each search that has ended, and its measure with it."""
    records, models = recorded(plan.out / "logs"), plan.trained()
    data = data_told(Schema.load(Path(plan.args.data)))
    backbone = plan.body.get("model", {}).get("backbone", ModelConfig().backbone)
    found: dict[tuple[str, int], Row] = {}
    for model in models:
        key = (model.method, model.seed)
        if not model.search or key in found or records.get(model.search, {}).get("exit"):
            continue
        cost = cost_of(model, models, records, plan.out)
        if "search_cost" in cost:
            search = records[model.search]
            found[key] = {
                "data_set": data_set,
                "data": data,
                "backbone": backbone,
                "seed": model.seed,
                "method": model.method,
                "commit": search["commit"],
                "command": portable(search["command"], plan.out),
                "hardware": machine_of(search),
                "search_memory_gib": search["memory_gib"],
                **cost,
            }
    return list(found.values())


def markdown(rows: Sequence[Row]) -> str:
    """Multiples of one training, seconds and memory of each search, cheapest first; data sets one below the other."""
    lines = []
    for name in dict.fromkeys(r["data_set"] for r in rows):
        own = [r for r in rows if r["data_set"] == name]
        figures = {m: [r for r in own if r["method"] == m] for m in dict.fromkeys(r["method"] for r in own)}
        reference = own[0]["cost_reference"]
        lines += [head(own), "", f"| method | trainings of {reference} | seconds | GiB |", "| --- " * 4 + "|"]
        for method, mine in sorted(figures.items(), key=lambda found: spread_of(found[1], "search_cost")[0]):
            multiple = with_deviation(spread_of(mine, "search_cost"), ".2f")
            seconds = spread_of(mine, "search_cost_seconds")[0]
            memory = max(float(r["search_memory_gib"]) for r in mine)
            lines.append(f"| {method} | {multiple} | {seconds:,.0f} | {memory:.1f} |")
        lines.append("")
    return "\n".join(lines)


def head(rows: Sequence[Row]) -> str:
    """What the lines of one data set have in common, and what is counted."""
    first, commits = rows[0], all_told(rows, "commit")
    seeds = ", ".join(sorted({str(r["seed"]) for r in rows}, key=int))
    told = (
        f"{first['data_set']}, {first['backbone']}: {first['data']}, seeds {seeds}, commit {commits}; "
        f"{machines(rows)}. Whole commands, {first['cost_clock']} time. A search is that of all budgets of the plan "
        "together; a model that several methods begin with counts in full for each of them."
    )
    return told + f" {AUTO_TOLD}" * any(r["method"] == AUTO for r in rows)


def spread_of(rows: Sequence[Row], key: str) -> list[float]:
    return spread([float(r[key]) for r in rows])
