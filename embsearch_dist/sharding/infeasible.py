"""Why tables do not fit the ranks, and what would help: TorchRec's planner says neither by name.

Three cases, told apart in this order: a table has no sharding whose parts fit a rank; all tables together
are larger than all ranks; each would fit, but they cannot be packed side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchrec.distributed.planner.types import ShardingOption

from embsearch_dist.config.sections import DistConfig
from embsearch_dist.errors import UserError
from embsearch_dist.sharding.plan import GIB, Plan, Topology
from embsearch_dist.sharding.tables import ROWS_PER_RANK, Table

SPLIT_BY_ROWS = ("row_wise", "table_row_wise", "grid_shard")


def explain(
    tables: Sequence[Table], options: Sequence[ShardingOption], topology: Topology, dist: DistConfig
) -> UserError:
    """The error for tables that no combination of ``options`` (those the planner had) places."""
    # Of equal parts those by rows count: only they shrink with more ranks, and only they are whole rows.
    own = {t.name: sorted((o for o in options if o.name == t.module), key=_by_rows_last) for t in tables}
    parts = {n: min(reversed(found), key=_largest_part) for n, found in own.items()}
    whole = {n: min(_total(o) for o in found) for n, found in own.items()}
    alone = [t for t in tables if _largest_part(parts[t.name]) > topology.budget]
    total, room = sum(whole.values()), topology.budget * topology.world_size
    table = max(tables, key=lambda t: whole[t.name])
    if alone:
        table = max(alone, key=lambda t: _largest_part(parts[t.name]))
        kind, need = parts[table.name].sharding_type, _largest_part(parts[table.name])
        told = f" (dist.tables.{table.name} allows no other way)" if table.name in dist.tables else ""
        what = (
            f"{describe(table)}, with optimizer state {size(whole[table.name])}: {kind} takes {size(need)} on one rank"
        )
        what += told
    elif total > room:
        need = math.ceil(total / topology.world_size)
        what = f"the tables and their optimizer state take {size(total)}, the ranks together have {size(room)}; "
        what += f"the largest is {describe(table)}"
    else:
        need = max(_fullest_rank(list(parts.values()), topology.world_size), topology.budget + 1)
        what = f"each table would fit, {size(total)} in all, but they cannot be packed side by side; "
        what += f"the largest is {describe(table)}"
    kinds = {o.sharding_type for o in own[table.name]}
    splits = dist.tables.get(table.name, "row_wise") == "row_wise" and table.rows >= ROWS_PER_RANK
    fixes = _fixes(table, need, topology, whole=not kinds & set(SPLIT_BY_ROWS), grow=splits or not alone, all=not alone)
    return UserError(f"no plan for {_ranks(topology)}: {what}. Would help: {fixes}")


def explain_full_rank(plan: Plan, dist: DistConfig) -> None:
    """Raise ``UserError`` when a plan that was made by hand puts more on a rank than it holds."""
    topology, rank = plan.topology, plan.fullest
    need = plan.bytes[rank]
    if need <= topology.budget:
        return
    here = {p.table: sum(s.hbm + s.ddr for s in p.shards if s.rank == rank) for p in plan.placements}
    table = max(here, key=lambda t: here[t])
    kind = plan.kinds[table.name]
    whole = kind not in SPLIT_BY_ROWS
    fixes = _fixes(table, need, topology, whole=whole, grow=not whole, all=False)
    raise UserError(
        f"dist.sharding {dist.sharding} does not fit {_ranks(topology)}: rank {rank} would hold {size(need)}, "
        f"{size(here[table])} of it for {describe(table)}, {kind}. Would help: dist.sharding: planner, {fixes}"
    )


def describe(table: Table) -> str:
    return f"table {table.name!r} ({table.rows:,} rows x {table.width} = {size(table.bytes)})"


def size(number: float) -> str:
    """Bytes for people, in units of 1024 as ``hbm_gb`` counts."""
    for unit, letter in ((GIB, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if number >= unit:
            value = number / unit
            return f"{value:.0f} {letter}" if value >= 100 else f"{value:.3g} {letter}"
    return f"{number:.0f} B"


def _fixes(table: Table, need: int, topology: Topology, *, whole: bool, grow: bool, all: bool) -> str:
    """What brings ``need`` bytes a rank down to the budget.

    Args:
        whole: the table may not be split by rows now.
        grow: more ranks would each hold less.
        all: it is about all tables, not about this one.
    """
    share = topology.budget / need
    world = topology.world_size
    found = []
    if whole and world > 1 and table.rows >= ROWS_PER_RANK * world and (all or share * world > 1):
        found.append(f"dist.tables.{table.name}=row_wise")
    if grow:
        # A part more than the quotient: buffers do not shrink, and packing wastes some.
        found.append(f"more ranks (about {max(world + 1, math.ceil(1.05 * world / share))})")
    narrower = int(table.width * share) // 4 * 4
    if all:
        found.append(f"narrower tables (widths times {share:.2f})")
    elif narrower:
        found.append(f"width {narrower} or less for this table")
    key = "ddr_gb" if topology.device == "cpu" else "hbm_gb"
    p = topology.planner
    least = need / (1 - p.reserve) / GIB - (p.ddr_gb if p.offload and topology.device != "cpu" else 0)
    found.append(f"more {topology.memory} a rank (dist.planner.{key} {math.ceil(least * 10) / 10:g} or more)")
    if topology.device != "cpu" and not p.offload:
        found.append("dist.planner.offload=true (main memory, slow)")
    return ", ".join(found)


def _ranks(topology: Topology) -> str:
    many = "1 rank" if topology.world_size == 1 else f"{topology.world_size} ranks"
    both = f" and {topology.planner.ddr_gb:g} GiB DDR" if topology.planner.offload and topology.device != "cpu" else ""
    memory = f"{size(topology.bytes_per_rank)} {topology.memory}{both}"
    return f"{many} with {memory} each ({size(topology.budget)} for tables)"


def _by_rows_last(option: ShardingOption) -> tuple[bool, bool]:
    return option.sharding_type in SPLIT_BY_ROWS, option.sharding_type == "row_wise"


def _largest_part(option: ShardingOption) -> int:
    return max(int(s.storage.hbm + s.storage.ddr) for s in option.shards)


def _fullest_rank(options: Sequence[ShardingOption], world_size: int) -> int:
    """Bytes on the fullest rank when the parts, largest first, go where the fewest bytes are."""
    load = [0] * world_size
    for part in sorted((int(s.storage.hbm + s.storage.ddr) for o in options for s in o.shards), reverse=True):
        load[load.index(min(load))] += part
    return max(load)


def _total(option: ShardingOption) -> int:
    return sum(int(s.storage.hbm + s.storage.ddr) for s in option.shards)
