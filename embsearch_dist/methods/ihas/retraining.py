"""Stage 3: one model per group, each an ordinary training on its group's rows (iHAS, "Retraining Stage" and
Algorithm 1, lines 16-21), then all as one.

Leaves in ``RUN/retrain/NAME``: ``config.yaml``, ``groups.json``, ``group-K/`` as ``retrain.py`` leaves a training, and
an evaluation of the routed model by each router.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.read import load_config
from embsearch_dist.config.sections import Config
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.grouped import GROUPS, GroupedAllocation, group_dir
from embsearch_dist.methods.ihas.gates_stage import load_gates
from embsearch_dist.methods.ihas.groups_stage import KEPT
from embsearch_dist.methods.ihas.routed_model import ROUTERS, RoutedModel, evaluate_routed, is_data_of, open_router
from embsearch_dist.methods.ihas.router_by_centres import ROUTER
from embsearch_dist.methods.ihas.router_by_fields import can_route, fit_field_router
from embsearch_dist.methods.retraining import leave_evaluation
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.ranks.shared import open_shared
from embsearch_dist.run import Run
from embsearch_dist.rundir import check_text
from embsearch_dist.schema import Schema, differs
from embsearch_dist.sharding.sharded_tables import LocalShard, ShardedTables
from embsearch_dist.train.directories import open_retraining
from embsearch_dist.train.figures import Wanted
from embsearch_dist.train.retrain import SubnetTask, load_best, retrain

BLOCK_ROWS = 1 << 16

Begin = Callable[[SubnetTask], None]


def open_search(directory: Path, config: Config, schema: Schema, context: Context) -> Run:
    """The search of groups that ``directory`` belongs to: its run directory, or that of one of its retrainings.

    The settings are those of the search; where the data lie and how tables are spread is as ``config`` says.
    """
    with context.together("looking for the search"):
        places = [directory, *directory.parents, *directory.resolve().parents]
        home = next((p for p in places if (p / ROUTER).exists() and (p / "config.yaml").exists()), None)
        if home is None:
            raise UserError(f"{directory} belongs to no search of groups: no directory above it has {ROUTER}")
        check_text(home / "config.yaml")
        found = load_config({config.method: type(config.search)}, home / "config.yaml", [])
        found.run.dir, found.run.overwrite = str(home), False
        found.data, found.dist = copy.copy(config.data), copy.copy(config.dist)
    return Run(found, schema, context)


def retrain_groups(
    search: Run, config: Config, grouped: GroupedAllocation, directory: Path
) -> dict[str, dict[str, Any]]:
    """Train every group's model from where it stood, then measure them as one on the test split.

    One group after the other, so that the optimizer states of two are never held at once. The router of fields is
    fitted here, because it costs less than one of these trainings and not every search is retrained.

    Args:
        search: the finished search, with its own config: the router is built from it.
        config: of the group models; its model and train keys may be others.
        grouped: what the search found.
        directory: ``RUN/retrain/NAME``.

    Returns:
        The evaluation by each router, by its kind.

    Raises:
        UserError: the data are not those of the search, groups are missing, or a training fails.
    """
    context = search.context
    with context.together("looking at the data"):
        if not is_data_of(search):
            raise UserError(
                f"{config.data.path} holds other rows than those that {search.dir} has grouped. Give --data.path of "
                "the search, or search again on this data"
            )
    make = partial(open_retraining, config, search.schema, grouped, directory)
    open_shared(context, directory, "opening the run directory", make)
    begins: Sequence[Begin] = [lambda task: None] * len(grouped.allocations)
    if config.search.groups.inherit:
        with context.together("reading what the groups keep"):
            kept = read_kept(search, grouped)
        begins = begins_with(search, kept)
    for k in range(len(grouped.allocations)):
        _train_group(search, config, grouped, directory, k, begins[k])
        gc.collect()  # what DDP and TorchRec build refers to itself, and would stay beside the next group
    del begins
    if can_route(search.schema):
        fit_field_router(search, len(grouped.allocations))
    results = {}
    models = load_groups(config, grouped, context, directory)
    for kind in ROUTERS:
        if kind != "fields" or can_route(search.schema):
            results[kind] = evaluate_groups(search, config, grouped, directory, models, "test", kind)
    return results


def evaluate_groups(
    search: Run,
    config: Config,
    grouped: GroupedAllocation,
    directory: Path,
    models: Sequence[SubnetModel],
    split: str,
    kind: str,
    wanted: Wanted | None = None,
) -> dict[str, Any]:
    """Measure trained groups as one model and leave the figures in :func:`evaluation_file`.

    Raises:
        UserError: the search has grouped the rows anew since; a router is missing or damaged.
    """
    model, context = open_routed(search, grouped, directory, models, kind), search.context
    stream = Run(config, search.schema, context).stream(split, config.train.eval_batch_size, shuffle=False)
    result = evaluate_routed(model, search, grouped, stream, config, directory.name, kind, wanted)
    return leave_evaluation(context, directory, split, result, "" if kind == ROUTERS[0] else kind)


def open_routed(
    search: Run, grouped: GroupedAllocation, directory: Path, models: Sequence[SubnetModel], kind: str
) -> RoutedModel:
    """Trained groups as one model behind a router of the search.

    Raises:
        UserError: the search has grouped the rows anew since; a router is missing or damaged.
    """
    context = search.context
    with context.together("comparing with the groups of the search"):
        # The search's own models have no columns beside the widths; those of the groups may.
        if GroupedAllocation.load(search.dir / GROUPS, search.schema).counted(0) != grouped.counted(0):
            raise UserError(
                f"{search.dir} has other groups than those that {directory} was trained on; nothing can route rows to "
                "these any more. Train the new ones: retrain.py with another --name"
            )
    return RoutedModel(open_router(search, kind, len(models)), models, search.schema, context)


def load_groups(config: Config, grouped: GroupedAllocation, context: Context, directory: Path) -> list[SubnetModel]:
    """The models of all groups with their best weights.

    Raises:
        UserError: a group is not trained, or a checkpoint is damaged.
    """
    found = []
    for k, allocation in enumerate(grouped.allocations):
        found.append(load_best(config, allocation, context, own_directory(directory, k)).model)
    return found


def own_directory(directory: Path, group: int) -> Path:
    """Of one group's training."""
    return directory / f"group-{group}"


def _train_group(
    search: Run,
    config: Config,
    grouped: GroupedAllocation,
    directory: Path,
    group: int,
    begin: Begin,
) -> None:
    context, own = search.context, own_directory(directory, group)
    run = open_group(search, config, group, own)
    allocation = grouped.allocations[group]
    make = partial(open_retraining, run.config, run.schema, allocation, own)
    open_shared(context, own, "opening the directory of a group", make)
    if context.rank == 0:
        count, n = len(grouped.allocations), run.schema.rows["train"]
        print(f"group {group}, one of {count}: {n:,} training rows ({grouped.share(group):.1%})", flush=True)
    train_on(run, allocation, begin)


def train_on(run: Run, allocation: Allocation, begin: Begin) -> None:
    """Train a model of an allocation on the rows of one group, to its early stop, in the run's directory."""
    train = run.config.train
    training = run.stream("train", train.batch_size, shuffle=True)
    validation = run.stream("validation", train.eval_batch_size, shuffle=False)
    retrain(run.config, allocation, training, validation, run.context, run.dir, begin=begin)


def open_group(search: Run, config: Config, group: int, directory: Path) -> Run:
    """A run on the rows of one group of a search, with its directory.

    Raises:
        UserError: the rows are missing, or are not those of the search's data.
    """
    rows = group_dir(search.dir, group)
    # Rows that are gone must not be made up.
    data = dataclasses.replace(config.data, path=str(rows), make="")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(directory)), data=data)
    schema = search.schema
    with search.context.together("reading a group"):
        schema = _schema_of(rows, search)
    return Run(config, schema, search.context)


def _schema_of(rows: Path, search: Run) -> Schema:
    if not (rows / "schema.json").exists():
        raise UserError(f"{rows} is missing: the rows of a group. Copy it back, or run search.py again")
    schema = Schema.load(rows)
    if schema.fingerprint != search.schema.fingerprint:
        raise UserError(f"{rows} was made for data with another schema. Run search.py again")
    if differs(schema.data, search.schema.data):
        raise UserError(
            f"{rows} was made from data {schema.data}, {search.config.data.path} is {search.schema.data}. Give the "
            "--data.path of the search, or search again"
        )
    return schema


def begins_with(search: Run, kept: Sequence[Mapping[str, torch.Tensor]]) -> list[Begin]:
    """For each group what sets its tables to the columns it keeps of the search's (``search.groups.inherit``).

    Args:
        kept: of each group field -> the columns.
    """
    base = load_gates(search).model

    def begin(columns: Mapping[str, torch.Tensor]) -> Begin:
        return lambda task: inherit(base.sharded, task.model.sharded, columns, search.context)

    return [begin(columns) for columns in kept]


def read_kept(search: Run, grouped: GroupedAllocation) -> list[dict[str, torch.Tensor]]:
    """For each group: field -> the columns it keeps of the search's table, ``[width]`` int64, ascending.

    Raises:
        UserError: the search has left no such list, or one that does not fit the widths.
    """
    path = search.dir / KEPT
    width, names = search.config.search.width, search.schema.names
    try:
        masks = torch.tensor(read_sealed(path)["kept"]).view(len(grouped.allocations), len(names), width)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: does not say which columns the groups keep ({e!r}). Run search.py again") from e
    found = []
    for mask, allocation in zip(masks, grouped.allocations, strict=True):
        columns = {n: row.nonzero().flatten() for n, row in zip(names, mask, strict=True)}
        if any(len(c) != allocation.widths[n] for n, c in columns.items()):
            raise UserError(f"{path}: other columns than groups.json has widths. Run search.py again")
        found.append(columns)
    return found


@torch.no_grad()
def inherit(base: ShardedTables, into: ShardedTables, columns: Mapping[str, torch.Tensor], context: Context) -> None:
    """Write columns of sharded tables into the leading columns of others, however each is sharded.

    All ranks call it. Blocks of rows go to every rank, which takes what is its own; columns beyond those given (a
    table's padding) stay as they are.

    Args:
        columns: name of each table of ``into`` -> columns of the table of that name in ``base``.
    """
    sources, targets = _shards(base), _shards(into)
    for name, table in into.tables.items():
        own, width = columns[name].to(context.device), base.tables[name].width
        for start in range(0, table.rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, table.rows)
            block = torch.zeros(stop - start, width, device=context.device)
            for shard in sources.get(name, []):
                if not shard.replicated or context.rank == 0:
                    part, place = _overlap(shard, start, stop)
                    block[place, shard.column_offset : shard.column_offset + part.shape[1]] = part
            context.sum(block)
            for shard in targets.get(name, []):
                part, place = _overlap(shard, start, stop)
                mine = own[shard.column_offset : shard.column_offset + part.shape[1]]
                part[:, : len(mine)] = block[place][:, mine]


def _shards(tables: ShardedTables) -> dict[str, list[LocalShard]]:
    found: dict[str, list[LocalShard]] = {}
    for shard in tables.local_shards():
        found.setdefault(shard.table.name, []).append(shard)
    return found


def _overlap(shard: LocalShard, start: int, stop: int) -> tuple[torch.Tensor, slice]:
    """The rows of a shard that are among ``start..stop`` of its table, live, and where they stand there."""
    low = min(max(start, shard.row_offset), stop)
    high = max(low, min(stop, shard.row_offset + len(shard.tensor)))
    return shard.tensor[max(0, low - shard.row_offset) : max(0, high - shard.row_offset)], slice(
        low - start, high - start
    )
