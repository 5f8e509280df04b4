"""What a table is, which optimizer it runs with, and the plan by hand.

``dist.sharding: auto`` and the single kinds are placed here, without TorchRec's planner: it refuses
row-wise sharding on CPU although it runs there. :mod:`embsearch_dist.sharding.planning`
lifts that and places by predicted time. Both planners work on tables without storage.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from embsearch_dist.config.sections import DistConfig
from embsearch_dist.errors import UserError
from embsearch_dist.schema import Field

ROWS_PER_RANK = 1024  # a table with fewer rows than this a rank gains nothing from being split by rows
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "sgd": (torch.optim.SGD, {}),
}


OURS = re.compile(r"t__[0-9a-f]{24}")
TAKEN = frozenset(dir(nn.ModuleDict()))  # torch gives no module a name that its parent has for something else


def module_name(field: str) -> str:
    """What a field's table is called inside torch's modules, and in checkpoints.

    That is the field's name, unless torch could not take it: names with a dot, the empty one, and those of attributes
    of a module (``type``, ``items``, ``train``) become ``t__`` and a hash of the name. It depends on the name
    alone, so checkpoints fit whatever the order of fields.
    """
    if field and "." not in field and field not in TAKEN and not OURS.fullmatch(field):
        return field
    return f"t__{hashlib.sha256(field.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


class Sharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder without its CPU restriction: row-wise tables train on gloo too."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return types + [t for t in ("row_wise", "table_row_wise", "grid_shard") if t not in types]


@dataclass(frozen=True)
class Table:
    """One table: ``rows`` x ``width`` (physical, a multiple of 4), looked up by the feature ``name``.

    Attributes:
        mean: the rows that a sample looks up are averaged, not added.
        weighted: each comes with a weight.
        length: how many that are on average, for planning.
    """

    name: str
    rows: int
    width: int
    mean: bool = False
    weighted: bool = False
    length: float = 1.0

    @classmethod
    def of(cls, field: Field, width: int, rows: int = 0) -> Table:
        """The table of a field at a physical width; ``rows``: where it has not one for each of the field's values."""
        rows = rows or field.cardinality
        return cls(field.name, rows, width, field.pooling == "mean", field.weighted, field.mean_length)

    @property
    def module(self) -> str:
        """See :func:`module_name`."""
        return module_name(self.name)

    @property
    def bytes(self) -> int:
        """Bytes of the weights alone (float32)."""
        return self.rows * self.width * 4


def check_widths(tables: Sequence[Table]) -> None:
    """FBGEMM refuses other widths too, but only on the rank that would hold the table."""
    for t in tables:
        if t.width % 4 or t.width <= 0:
            raise UserError(f"table {t.name!r}: physical width {t.width} is not a positive multiple of 4")


def local_world_size(world_size: int) -> int:
    """Ranks of this machine as the launcher says; all of them when it says nothing that could be."""
    said = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return said if 0 < said <= world_size and world_size % said == 0 else world_size


def make_collection(tables: Sequence[Table]) -> EmbeddingBagCollection:
    """The tables as one module without storage.

    Every table adds, also one that is to average: see :func:`divide_means`. One weighted table makes all of
    them want weights, which cost memory and traffic.
    """
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=t.module,
                embedding_dim=t.width,
                num_embeddings=t.rows,
                feature_names=[t.name],
                pooling=PoolingType.SUM,
            )
            for t in tables
        ],
        is_weighted=any(t.weighted for t in tables),
        device=torch.device("meta"),
    )


def divide_means(pooled: KeyedTensor, sparse: KeyedJaggedTensor, tables: Mapping[str, Table]) -> KeyedTensor:
    """Sums ``[B, sum of widths]`` -> the same with the columns of averaging tables divided by their bags' lengths.

    TorchRec's own mean pooling depends on the sharding: behind row-wise tables it divides the columns of *all*
    tables, by the length plus 1e-6. Here a mean is the same everywhere, that of no rows is zero, and the columns
    of the other tables keep their bits (they are divided by one).
    """
    keys, values = sparse.keys(), pooled.values()
    lengths = sparse.lengths().view(len(keys), -1).clamp(min=1).to(values.dtype)
    one = torch.ones_like(lengths[0])
    # A KeyedTensor is no mapping: a loop over it itself does not give its keys.
    each = [lengths[keys.index(name)] if tables[name].mean else one for name in pooled.keys()]  # noqa: SIM118
    divisor = torch.cat([x[:, None].expand(-1, w) for x, w in zip(each, pooled.length_per_key(), strict=True)], 1)
    return KeyedTensor(pooled.keys(), pooled.length_per_key(), values / divisor)


def choose_sharding(tables: Sequence[Table], world_size: int, config: DistConfig) -> dict[str, str]:
    """Sharding kind of each table. ``auto`` splits by rows what would fill more than one rank's fair share."""
    kinds = {}
    fair = sum(t.rows * t.width for t in tables) / world_size
    for t in tables:
        kind = config.tables.get(t.name, config.sharding)
        if kind == "auto":
            kind = "row_wise" if t.rows * t.width > fair else "table_wise"
        if kind == "row_wise" and (world_size == 1 or t.rows < ROWS_PER_RANK * world_size):
            kind = "table_wise"
        if kind == "column_wise" and (world_size == 1 or t.width // 4 < world_size or t.width % world_size):
            kind = "table_wise"
        if kind == "data_parallel" and world_size == 1:
            kind = "table_wise"
        kinds[t.name] = kind
    return kinds


def plan_by_hand(
    collection: EmbeddingBagCollection,
    tables: Sequence[Table],
    kinds: dict[str, str],
    world_size: int,
    local_size: int,
    device: str,
) -> EmbeddingModuleShardingPlan:
    """The placement of the given kinds; every rank computes the same one from the same numbers."""
    return construct_module_sharding_plan(
        collection,
        _generators(tables, kinds, world_size),
        sharder=Sharder(),  # type: ignore[arg-type]
        local_size=local_size,
        world_size=world_size,
        device_type=device,
    )


def _generators(
    tables: Sequence[Table], kinds: dict[str, str], world_size: int
) -> dict[str, ParameterShardingGenerator]:
    """Placement: whole tables go to the rank with the fewest bytes so far, largest first."""
    load = [0] * world_size
    per_table: dict[str, ParameterShardingGenerator] = {}
    for t in sorted(tables, key=lambda t: (-t.rows * t.width, t.name)):
        kind = kinds[t.name]
        if kind == "table_wise":
            rank = load.index(min(load))
            load[rank] += t.rows * t.width
            per_table[t.module] = table_wise(rank=rank, compute_kernel="fused")
        elif kind == "row_wise":
            per_table[t.module] = row_wise(compute_kernel="fused")
        elif kind == "column_wise":
            per_table[t.module] = column_wise(ranks=list(range(world_size)), compute_kernel="fused")
        else:
            per_table[t.module] = data_parallel()
    return per_table
