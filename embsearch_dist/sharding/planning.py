"""A plan made by TorchRec's own planner, for any number of ranks, from one process without a GPU.

The planner enumerates every sharding of every table, lets TorchRec's performance model say how long each
part takes and how much memory it needs, and packs them on the ranks so that the slowest is as fast as can
be. Four things differ from TorchRec as it comes:

* On CPU it refuses row-wise sharding and the dense kernel of data-parallel tables. Both run there, so both are offered.
* Its memory leaves out the gradient of a dense kernel, which is as large as the table. It is counted.
* No rank gets two column shards of a table, which would spare nothing.
* Options are sorted. TorchRec's order depends on the hash seed of the process, and so would ties: a run
  that continues must find the plan it began with.

A table that ``dist.tables`` says nothing about gets only kinds that do not change what is learned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator, get_partition_by_type
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, OrderedDeviceHardware
from torchrec.distributed.planner.planners import EmbeddingShardingPlanner
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    Storage,
)
from torchrec.distributed.planner.types import Shard as TorchRecShard
from torchrec.distributed.planner.types import Topology as TorchRecTopology
from torchrec.distributed.types import ModuleSharder

from embsearch_dist.config.sections import DistConfig
from embsearch_dist.sharding.infeasible import explain, explain_full_rank
from embsearch_dist.sharding.plan import Placement, Plan, Shard, Topology
from embsearch_dist.sharding.tables import (
    ROWS_PER_RANK,
    Sharder,
    Table,
    check_widths,
    choose_sharding,
    make_collection,
    plan_by_hand,
)
from embsearch_dist.sharding.versions import estimated_by

EVERY_COMBINATION = 1000  # more than this many plans are not tried one by one; the greedy proposers serve then


class PlanningSharder(Sharder):
    """Offers the kernel that will run: one process's planner must not promise what training does not do."""

    def __init__(self, offload: bool) -> None:
        super().__init__()
        self.kernels = ["fused", "fused_uvm", "fused_uvm_caching"] if offload else ["fused"]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return self.kernels if sharding_type != "data_parallel" else ["dense"]


class StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's weights and buffers, and beside them optimizer state and dense gradients as they are here."""

    def __init__(self, topology: TorchRecTopology, optimizer: str) -> None:
        super().__init__(topology)
        self.optimizer, self.on_cpu = optimizer, topology.compute_device == "cpu"

    def estimate(self, sharding_options: list[ShardingOption], *sharders: Any, **named: Any) -> None:
        super().estimate(sharding_options, *sharders, **named)  # TorchRec's releases pass them in several ways
        for option in sharding_options:
            in_ddr = self.on_cpu or "uvm" in option.compute_kernel
            for shard in option.shards:
                extra = state_bytes(self.optimizer, *shard.size) + gradient_bytes(option.compute_kernel, *shard.size)
                shard.storage += Storage(hbm=0 if in_ddr else extra, ddr=extra if in_ddr else 0)


class Reservation(FixedPercentageStorageReservation):
    """TorchRec's share of HBM that is left free, and as much of DDR: on CPU the tables lie there."""

    def reserve(
        self,
        topology: TorchRecTopology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> TorchRecTopology:
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        for device in reserved.devices:
            device.storage.ddr = int((1 - self._percentage) * device.storage.ddr)
        return reserved


class Enumerator(EmbeddingEnumerator):
    """Options in an order that does not depend on the process."""

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        place = {o.name: i for i, o in reversed(list(enumerate(options)))}
        return sorted(options, key=lambda o: (place[o.name], o.sharding_type, o.compute_kernel))


class Partitioner(GreedyPerfPartitioner):
    """Column shards of one table go to different ranks."""

    @classmethod
    def _device_partition(
        cls,
        sharding_option: ShardingOption,
        minheap_devices: list[OrderedDeviceHardware],
        bulk_heapify_threshold: float = 0.25,
    ) -> None:
        if sharding_option.sharding_type == "column_wise":
            cls._column_wise_device_partition(sharding_option, minheap_devices)
        else:
            super()._device_partition(sharding_option, minheap_devices, bulk_heapify_threshold)


def make_plan(tables: Sequence[Table], topology: Topology, dist: DistConfig, optimizer: str) -> Plan:
    """Where ``dist`` puts the tables, with predicted bytes and times.

    ``dist.sharding: planner`` asks TorchRec's planner; any other value is placed by hand as training does,
    and only its figures are TorchRec's.

    Raises:
        UserError: the tables do not fit: which one, why, and what would do.
    """
    check_widths(tables)
    collection = make_collection(tables)
    if dist.sharding == "planner":
        options = _search(collection, tables, topology, dist, optimizer)
    else:
        options = _by_hand(collection, tables, topology, dist, optimizer)
    placed = {o.name: _placement(o, t, optimizer) for t in tables for o in options if o.name == t.module}
    plan = Plan(topology, tuple(placed[t.module] for t in tables))
    if dist.sharding != "planner":
        explain_full_rank(plan, dist)
    return plan


def allowed_kinds(table: Table, topology: Topology, dist: DistConfig, optimizer: str) -> list[str]:
    """What the planner may do with a table: the kind it is told, else those that leave the result alone.

    Row-wise Adagrad keeps one state per row *and shard*, so columns are not split.
    What splits nothing, or shards too small to gain anything, becomes ``table_wise`` as it does by hand.
    """
    world, local = topology.world_size, topology.local_world_size
    told = dist.tables.get(table.name)
    if world == 1:
        return ["table_wise"]
    kinds = [told] if told else ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
    if table.rows < ROWS_PER_RANK * world:
        kinds = [k for k in kinds if k != "row_wise"]
    if table.rows < ROWS_PER_RANK * local or (local in (1, world) and not told):
        kinds = [k for k in kinds if k not in ("table_row_wise", "grid_shard")]
    if column_shard(table.width, world, topology.planner.column_width) == table.width:
        kinds = [k for k in kinds if k != "column_wise"]
    if not told and optimizer == "rowwise_adagrad":
        kinds = [k for k in kinds if k != "column_wise"]
    return kinds or ["table_wise"]


def column_shard(width: int, parts: int, narrowest: int) -> int:
    """Columns of a shard when a table is split into at most ``parts``: a divisor and a multiple of 4."""
    fits = (w for w in range(4, width, 4) if width % w == 0 and w >= narrowest and w * parts >= width)
    return next(fits, width)


def state_bytes(optimizer: str, rows: int, columns: int) -> int:
    """Optimizer state of a shard: Adam's two moments, Adagrad's sum, one number a row for row-wise Adagrad."""
    numbers = {"adam": 2 * columns, "adagrad": columns, "rowwise_adagrad": 1, "sgd": 0}[optimizer]
    return 4 * rows * numbers


def gradient_bytes(kernel: str, rows: int, columns: int) -> int:
    """Gradient of a shard that exists as a tensor: a dense kernel's is as large as its weights."""
    return 4 * rows * columns if kernel == "dense" else 0


def _search(
    collection: EmbeddingBagCollection, tables: Sequence[Table], topology: Topology, dist: DistConfig, optimizer: str
) -> list[ShardingOption]:
    constraints = {}
    for t in tables:
        kinds = allowed_kinds(t, topology, dist, optimizer)
        # The columns of a grid are spread over machines, its rows over the ranks of each.
        parts = topology.world_size // topology.local_world_size if "grid_shard" in kinds else topology.world_size
        width = column_shard(t.width, parts, topology.planner.column_width)
        constraints[t.module] = ParameterConstraints(
            sharding_types=kinds, min_partition=width, pooling_factors=[t.length]
        )
    machines = topology.torchrec()
    sharder = PlanningSharder(topology.planner.offload)
    estimators = [EmbeddingPerfEstimator(machines, constraints), StorageEstimator(machines, optimizer)]
    enumerator = Enumerator(machines, topology.planner.batch_size, constraints, estimators)
    best: list[ShardingOption] = []

    def keep(found: list[ShardingOption]) -> list[ShardingOption]:
        # TorchRec checks once more what this returns, and refuses dense kernels and warns of data-parallel
        # tables. What it then makes of it is not used.
        best.extend(found)
        renamed = copy.deepcopy(found)
        for option in (o for o in renamed if o.compute_kernel == "dense"):
            option.compute_kernel = "fused"
            if option.sharding_type == "data_parallel":
                option.sharding_type, option.shards = "table_wise", option.shards[:1]
        return renamed

    planner = EmbeddingShardingPlanner(
        topology=machines,
        batch_size=topology.planner.batch_size,
        enumerator=enumerator,
        storage_reservation=Reservation(topology.planner.reserve),
        proposer=[
            GridSearchProposer(max_proposals=EVERY_COMBINATION),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        partitioner=Partitioner(),
        constraints=constraints,
        stats=[],
        callbacks=[keep],
        debug=False,
    )
    try:
        planner.plan(collection, [sharder])
    except PlannerError as e:
        options = enumerator.enumerate(collection, [sharder])
        raise explain(tables, options, topology, dist) from e
    return best


def _by_hand(
    collection: EmbeddingBagCollection, tables: Sequence[Table], topology: Topology, dist: DistConfig, optimizer: str
) -> list[ShardingOption]:
    """The plan of :mod:`embsearch_dist.sharding.tables` in the planner's terms, so that TorchRec can rate it."""
    world = topology.world_size
    plan = plan_by_hand(
        collection,
        tables,
        choose_sharding(tables, world, dist),
        world,
        topology.local_world_size,
        topology.device,
    )
    options = []
    lengths = {t.module: t.length for t in tables}
    sharder = PlanningSharder(offload=False)
    parameters = sharder.shardable_parameters(collection)
    for name, sharding in plan.items():
        parameter = parameters[name]
        if sharding.sharding_spec is None:
            shards = [TorchRecShard(size=list(parameter.shape), offset=[0, 0], rank=r) for r in range(world)]
        else:
            parts = zip(sharding.sharding_spec.shards, sharding.ranks, strict=True)
            shards = [TorchRecShard(size=m.shard_sizes, offset=m.shard_offsets, rank=r) for m, r in parts]
        options.append(
            ShardingOption(
                name=name,
                tensor=parameter,
                module=("", collection),
                input_lengths=[lengths[name]],
                batch_size=topology.planner.batch_size,
                sharding_type=sharding.sharding_type,
                partition_by=get_partition_by_type(sharding.sharding_type),
                compute_kernel=sharding.compute_kernel,
                shards=shards,
                is_pooled=True,
            )
        )
    machines = topology.torchrec()
    known = estimated_by(EmbeddingBagCollection, sharder)
    for estimator in (EmbeddingPerfEstimator(machines), StorageEstimator(machines, optimizer)):
        estimator.estimate(options, **known)
    return options


def _placement(option: ShardingOption, table: Table, optimizer: str) -> Placement:
    shards = []
    for s in option.shards:
        rows, columns = (int(n) for n in s.size)
        shards.append(
            Shard(
                rank=int(s.rank),
                offset=(int(s.offset[0]), int(s.offset[1])),
                size=(rows, columns),
                hbm=int(s.storage.hbm),
                ddr=int(s.storage.ddr),
                weights=4 * rows * columns,
                optimizer=state_bytes(optimizer, rows, columns),
                gradient=gradient_bytes(option.compute_kernel, rows, columns),
                times=(s.perf.fwd_compute, s.perf.fwd_comms, s.perf.bwd_compute, s.perf.bwd_comms),
            )
        )
    return Placement(table, option.sharding_type, option.compute_kernel, tuple(shards))
