"""A plan: where every part of every table lies, how much memory it takes and how long its step may take.

The figures are estimates. Memory is what a step needs at its peak: weights, optimizer state, the gradient
where it is materialised (dense kernels), and the buffers of look-up and exchange. Times are TorchRec's, in
milliseconds, and cover the tables alone; the dense part is the same for every plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.planner.types import Topology as TorchRecTopology
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardMetadata,
)

from embsearch_dist.config.sections import PlannerConfig
from embsearch_dist.errors import UserError
from embsearch_dist.sharding.card import GIB, fill
from embsearch_dist.sharding.tables import Table

TIMES = ("forward compute", "forward comms", "backward compute", "backward comms")
MEMORY = ("weights", "optimizer", "gradient", "buffers")


@dataclass(frozen=True)
class Topology:
    """The ranks and the machines under them, as the config states them. A GPU it leaves open is the default one."""

    world_size: int
    local_world_size: int
    device: str
    planner: PlannerConfig

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.local_world_size < 1 or self.world_size % self.local_world_size:
            raise UserError(
                f"{self.world_size} ranks cannot be spread over machines of {self.local_world_size}: "
                "the local world size must divide the world size"
            )
        object.__setattr__(self, "planner", fill(self.planner, None))

    @property
    def memory(self) -> str:
        """Where tables lie: HBM of a GPU, DDR of a CPU."""
        return "DDR" if self.device == "cpu" else "HBM"

    @property
    def bytes_per_rank(self) -> int:
        return int(GIB * (self.planner.ddr_gb if self.device == "cpu" else self.planner.hbm_gb))

    @property
    def budget(self) -> int:
        """Bytes of one rank that tables may take: what the reserve leaves, with offload of both memories."""
        offloaded = GIB * self.planner.ddr_gb if self.planner.offload and self.device != "cpu" else 0
        return int((1 - self.planner.reserve) * (self.bytes_per_rank + offloaded))

    def torchrec(self) -> TorchRecTopology:
        """TorchRec's own description; it counts bytes and milliseconds."""
        p = self.planner
        per_ms = GIB / 1000
        return TopologyFactory.create_topology(
            TrainerConfig(world_size=self.world_size, local_world_size=self.local_world_size),
            HardwareConfig(
                hbm_cap_bytes=int(p.hbm_gb * GIB),
                ddr_cap_bytes=int(p.ddr_gb * GIB),
                hbm_mem_bw=p.hbm_bandwidth * per_ms,
                ddr_mem_bw=p.ddr_bandwidth * per_ms,
                hbm_to_ddr_mem_bw=p.hbm_to_ddr_bandwidth * per_ms,
                intra_host_bw=p.intra_host_bandwidth * per_ms,
                inter_host_bw=p.inter_host_bandwidth * per_ms,
            ),
            KernelConfig(compute_device=self.device, use_hardware_based_bandwidth=True),
        )


@dataclass(frozen=True)
class Shard:
    """A part of a table on one rank: rows and columns from an offset on, its bytes and its milliseconds.

    ``hbm`` and ``ddr`` count everything; ``weights``, ``optimizer`` and ``gradient`` are parts of their sum.
    """

    rank: int
    offset: tuple[int, int]
    size: tuple[int, int]
    hbm: int
    ddr: int
    weights: int
    optimizer: int
    gradient: int
    times: tuple[float, float, float, float]

    @property
    def memory(self) -> tuple[int, int, int, int]:
        """Bytes in the order of ``MEMORY``."""
        known = self.weights + self.optimizer + self.gradient
        return self.weights, self.optimizer, self.gradient, max(0, self.hbm + self.ddr - known)


@dataclass(frozen=True)
class Placement:
    """How one table is sharded, and where its shards lie. A data-parallel table has a whole one on every rank."""

    table: Table
    kind: str
    kernel: str
    shards: tuple[Shard, ...]

    @property
    def ranks(self) -> list[int]:
        return sorted({s.rank for s in self.shards})

    @property
    def bytes(self) -> int:
        """Weights and optimizer state over all ranks, copies counted."""
        return sum(s.weights + s.optimizer for s in self.shards)


@dataclass(frozen=True)
class Plan:
    """Placements of all tables, in the order the tables were given."""

    topology: Topology
    placements: tuple[Placement, ...]

    def per_rank(self, what: str) -> list[float]:
        """One number a rank: ``hbm``, ``ddr`` (bytes) or one of ``MEMORY`` (bytes) or ``TIMES`` (ms)."""
        found = [0.0] * self.topology.world_size
        for shard in (s for p in self.placements for s in p.shards):
            if what in TIMES:
                found[shard.rank] += shard.times[TIMES.index(what)]
            elif what in MEMORY:
                found[shard.rank] += shard.memory[MEMORY.index(what)]
            else:
                found[shard.rank] += getattr(shard, what)
        return found

    @property
    def bytes(self) -> list[int]:
        """HBM and DDR of each rank together."""
        return [int(h + d) for h, d in zip(self.per_rank("hbm"), self.per_rank("ddr"), strict=True)]

    @property
    def times(self) -> list[float]:
        """Milliseconds of a step on each rank."""
        return [sum(parts) for parts in zip(*(self.per_rank(t) for t in TIMES), strict=True)]

    @property
    def step_ms(self) -> float:
        """The slowest rank's step; the others wait for it."""
        return max(self.times)

    @property
    def slowest(self) -> int:
        return self.times.index(self.step_ms)

    @property
    def fullest(self) -> int:
        return self.bytes.index(max(self.bytes))

    @property
    def weights(self) -> int:
        """Bytes of the tables themselves, each counted once."""
        return sum(p.table.bytes for p in self.placements)

    @property
    def kinds(self) -> dict[str, str]:
        return {p.table.name: p.kind for p in self.placements}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, everything included; :meth:`from_dict` takes it back."""
        return {"topology": asdict(self.topology), "placements": [asdict(p) for p in self.placements]}

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Plan:
        t = dict(body["topology"])
        placements = []
        for p in body["placements"]:
            lists = ("offset", "size", "times")
            shards = tuple(Shard(**s | {k: tuple(s[k]) for k in lists}) for s in p["shards"])
            placements.append(Placement(Table(**p["table"]), p["kind"], p["kernel"], shards))
        return cls(Topology(**t | {"planner": PlannerConfig(**t["planner"])}), tuple(placements))

    def torchrec(self) -> EmbeddingModuleShardingPlan:
        """The plan as DistributedModelParallel takes it."""
        plan = EmbeddingModuleShardingPlan()
        for p in self.placements:
            spec = None
            if p.kind != "data_parallel":
                where = [placement(self.topology.device, s.rank, self.topology.local_world_size) for s in p.shards]
                spec = EnumerableShardingSpec(
                    [
                        ShardMetadata(shard_offsets=list(s.offset), shard_sizes=list(s.size), placement=w)
                        for s, w in zip(p.shards, where, strict=True)
                    ]
                )
            plan[p.table.module] = ParameterSharding(
                sharding_type=p.kind,
                compute_kernel=p.kernel,
                ranks=[s.rank for s in p.shards],
                sharding_spec=spec,
            )
        return plan


def imbalance(values: Sequence[float]) -> float:
    """The largest over the mean: 1 is even."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0
