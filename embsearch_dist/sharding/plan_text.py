"""Plans as text: what lies where, which rank is the slowest, and how allocations compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from embsearch_dist.sharding.infeasible import size
from embsearch_dist.sharding.plan import MEMORY, TIMES, Plan, Topology, imbalance

MAX_RANK_LINES = 40


def heading(topology: Topology) -> str:
    """The machines the figures hold for."""
    p = topology.planner
    rows = f"{p.batch_size:,} rows a rank and step ({p.batch_size * topology.world_size:,} in all)"
    nodes = topology.world_size // topology.local_world_size
    machines = "1 machine" if nodes == 1 else f"{nodes} machines of {topology.local_world_size}"
    memory = f"{size(topology.bytes_per_rank)} {topology.memory} a rank, {size(topology.budget)} of it for tables"
    return f"{topology.world_size} rank(s) on {machines}, {topology.device}: {memory}; {rows}"


def plan_text(name: str, plan: Plan, parameters: int) -> str:
    """Summary, a line per table and a line per rank (neighbours that are alike share one)."""
    state = sum(p.bytes for p in plan.placements)
    lines = [
        f"{name}: {parameters:,} parameters, tables {size(plan.weights)}, with optimizer state {size(state)}",
        f"  predicted step {ms(plan.step_ms)} ms on rank {plan.slowest}, the slowest; "
        f"imbalance {imbalance(plan.times):.2f} (slowest / mean)",
        f"  most memory {size(max(plan.bytes))} on rank {plan.fullest}; imbalance {imbalance(plan.bytes):.2f}",
        "",
        *_indent(table_lines(plan)),
        "",
        *_indent(rank_lines(plan)),
    ]
    return "\n".join(lines)


def table_lines(plan: Plan) -> list[str]:
    """Per table: its size, how and where it is sharded, the most it takes on a rank, its slowest part."""
    rows = [["table", "rows", "width", "weights", "sharding", "kernel", "ranks", "on a rank", "ms"]]
    for p in plan.placements:
        per_rank = {r: [s for s in p.shards if s.rank == r] for r in p.ranks}
        most = max(sum(s.hbm + s.ddr for s in shards) for shards in per_rank.values())
        slowest = max(sum(sum(s.times) for s in shards) for shards in per_rank.values())
        text = [p.table.name, f"{p.table.rows:,}", str(p.table.width), size(p.table.bytes)]
        rows.append([*text, p.kind, p.kernel, ranges(p.ranks), size(most), ms(slowest)])
    return columns(rows, left=(0, 4, 5, 6))


def rank_lines(plan: Plan) -> list[str]:
    """Per rank: memory and times; ranks in a row that print alike share a line."""
    hbm, ddr, times = plan.per_rank("hbm"), plan.per_rank("ddr"), [plan.per_rank(t) for t in TIMES]
    lines: list[tuple[list[int], list[str]]] = []
    for rank in range(plan.topology.world_size):
        cells = [size(hbm[rank]), size(ddr[rank]), *(ms(t[rank]) for t in times), ms(plan.times[rank])]
        if lines and lines[-1][1] == cells:
            lines[-1][0].append(rank)
        else:
            lines.append(([rank], cells))
    rest = lines[MAX_RANK_LINES:]
    head = ["rank", "HBM", "DDR", *TIMES, "step ms"]
    found = columns([head, *([ranges(r), *cells] for r, cells in lines[:MAX_RANK_LINES])], left=(0,))
    if rest:
        found.append(f"... {sum(len(r) for r, _ in rest)} more ranks; --json FILE has all")
    return found


def comparison(plans: Mapping[str, Plan], parameters: Mapping[str, int]) -> str:
    """A line per allocation; the last columns are relative to the first allocation."""
    first = next(iter(plans))
    base = plans[first]
    rows = [["allocation", "parameters", "tables", "on a rank", "step ms", f"vs {first}: parameters", "bytes", "step"]]
    for name, plan in plans.items():
        share = parameters[name] / parameters[first], plan.weights / base.weights, plan.step_ms / base.step_ms
        text = [name, f"{parameters[name]:,}", size(plan.weights), size(max(plan.bytes)), ms(plan.step_ms)]
        rows.append([*text, *(f"{s:.1%}" for s in share)])
    return "\n".join(columns(rows, left=(0,)))


def to_json(plans: Mapping[str, Plan], parameters: Mapping[str, int]) -> dict[str, Any]:
    """All figures of all plans, sums included, in bytes and milliseconds."""
    body: dict[str, Any] = {}
    for name, plan in plans.items():
        body[name] = {
            "parameters": parameters[name],
            "bytes": {"weights": plan.weights, "per_rank": {m: plan.per_rank(m) for m in ("hbm", "ddr", *MEMORY)}},
            "milliseconds": {t: plan.per_rank(t) for t in TIMES} | {"step": plan.times},
            "step_ms": plan.step_ms,
            "slowest_rank": plan.slowest,
            "imbalance": {"time": imbalance(plan.times), "bytes": imbalance(plan.bytes)},
            "tables": [dataclasses.asdict(p) for p in plan.placements],
        }
    topology = dataclasses.asdict(next(iter(plans.values())).topology)
    return {"topology": topology, "allocations": body}


def columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Aligned lines; the columns in ``left`` to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    cells = ([c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def ranges(numbers: Sequence[int]) -> str:
    """``0-3,8`` for ascending ``0 1 2 3 8``; a long list keeps its first ranges and its count."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    return ",".join(text) if len(text) <= 5 else f"{','.join(text[:4])},... ({len(numbers)})"


def ms(milliseconds: float) -> str:
    return f"{milliseconds:.4f}" if milliseconds < 1 else f"{milliseconds:.4g}"


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]
