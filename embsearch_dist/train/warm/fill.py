"""An earlier checkpoint into the live tensors of a new model, table by table, on any number of ranks.

Each process reads one earlier table at a time, whole, into main memory and takes from it the rows and columns of its
own shards: so neither ranks nor sharding have to be those of the earlier training.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.sharding.tables import module_name
from embsearch_dist.train.tensors import hearing_signals, tensors_of
from embsearch_dist.train.warm.dense import DenseMove
from embsearch_dist.train.warm.ids import IdMap
from embsearch_dist.train.warm.widths import FieldMove, common_rotation, principal, second_moments

HEAD, HEAD_STATE = "head", "head_optimizer"
SQUARES = re.compile(r"(exp_avg_sq|sum|momentum1)$")  # means or sums of squared gradients


class Saved:
    """Tensors of a checkpoint whose checksums were compared, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "data"
        told = dcp.FileSystemReader(self._directory).read_metadata().state_dict_metadata
        self._told = {k: v for k, v in told.items() if isinstance(v, TensorStorageMetadata)}

    def names(self, group: str) -> list[str]:
        """Names inside ``tables``, ``head``, ``head_optimizer``, ``adam``, ..."""
        return [k.removeprefix(f"{group}.") for k in self._told if k.startswith(f"{group}.")]

    def read(self, group: str, name: str) -> torch.Tensor | None:
        """A whole tensor on the CPU; None where there is none."""
        told = self._told.get(key := f"{group}.{name}")
        if told is None:
            return None
        found = torch.empty(told.size, dtype=told.properties.dtype)
        with warnings.catch_warnings(), hearing_signals():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by no_dist, as it is meant
            dcp.load({key: found}, storage_reader=dcp.FileSystemReader(self._directory), no_dist=True)
        return found

    def all(self, group: str) -> dict[str, torch.Tensor]:
        """All tensors of a small group."""
        found = {name: self.read(group, name) for name in self.names(group)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def table_key(field: str) -> str:
    """Of a field's table in a collection's state."""
    return f"embedding_bags.{module_name(field)}.weight"


def rotations(
    saved: Saved,
    how: str,
    moves: Mapping[str, FieldMove],
    weights: Mapping[str, torch.Tensor],
    centred: Collection[str],
    context: Context,
) -> dict[str, FieldMove]:
    """The moves with their rotations; rank 0 finds them and tells, since eigenvectors differ between machines.

    Args:
        how: see :func:`embsearch_dist.train.warm.widths.turning`.
        weights: how often each earlier row occurs, ``[earlier rows]``.
        centred: fields whose mean is kept beside their columns: a turn of their own is for what differs from it. One
            turn for all fields is that of the whole rows, mean included, which FM's products read (on a part of Frappe
            DeepFMs of widths 2 and 3 began 0.005 AUC lower around the means, wider ones alike).
    """
    if not how:
        return dict(moves)

    def find() -> dict[str, list[list[float]]]:
        turned = {f: m for f, m in moves.items() if how == "common" or m.new < m.old}
        seconds, around = {}, set(centred) if how == "field" else set()
        for field, move in turned.items():
            table = saved.read("tables", table_key(field))
            assert table is not None
            seconds[field] = second_moments(table[:, : move.old], weights[field], field in around)
        if how == "common":
            return dict.fromkeys(turned, common_rotation(list(seconds.values())).tolist())
        return {f: principal(second).tolist() for f, second in seconds.items()}

    found = context.share(context.first("turning the earlier tables", find)) or {}
    return {f: replace(m, rotation=torch.tensor(found[f])) if f in found else m for f, m in moves.items()}


@torch.no_grad()
def fill_tables(
    saved: Saved,
    model: SubnetModel,
    moves: Mapping[str, FieldMove],
    ids: Mapping[str, IdMap],
    extra: int,
    optimizers: bool,
    beside: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Tables, and what their optimizers keep, of the fields in ``moves``; other fields stay as they are.

    A value without an earlier row begins with the weights of id 0, which stands for what is rare or unseen, and with a
    new state of the optimizer.

    Args:
        extra: columns behind the width that both have (a first-order weight of each value).
        optimizers: their state too.
        beside: field -> ``[kept]``: its kept columns times this are added to its values' first-order weights.
    """
    groups: dict[str, Any] = {"tables": dict(model.sharded.collection.state_dict())}
    groups |= model.sharded.optimizer_state() if optimizers else {}
    by_key = {table_key(field): field for field in moves}
    for group, tensors in groups.items():
        for name, target in tensors.items():
            field = by_key.get(name.split("/")[0])
            if field is None and "/" not in name and group != "tables":  # a count of steps
                if (value := saved.read(group, name)) is not None and value.shape == target.shape:
                    target.copy_(value)
            elif field is not None and (whole := saved.read(group, name)) is not None:
                shift = (beside or {}).get(field) if group == "tables" else None
                if shift is not None:
                    whole[:, moves[field].old] += moves[field].columns(whole) @ shift
                for offsets, part in local_parts(target):
                    _fill_part(part, offsets, whole, moves[field], ids[field], extra, name, group == "tables")


def local_parts(target: ShardedTensor | torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """What of a tensor lives on this rank: its offsets and its live storage."""
    if isinstance(target, ShardedTensor):
        for shard in target.local_shards():
            yield tuple(shard.metadata.shard_offsets), shard.tensor
    else:
        yield (0,) * target.dim(), target.detach()


def _fill_part(
    part: torch.Tensor,
    offsets: tuple[int, ...],
    whole: torch.Tensor,
    move: FieldMove,
    ids: IdMap,
    extra: int,
    name: str,
    weights: bool,
) -> None:
    """One shard ``[n]``, ``[n, columns]`` or a scalar from the whole earlier tensor."""
    if part.dim() == 0:
        part.copy_(whole)
        return
    rows = ids.rows[offsets[0] : offsets[0] + len(part)]
    values = whole[rows.clamp(min=0)]
    if not weights:
        values[rows < 0] = 0
    if part.dim() == 1:
        part.copy_(values)
        return
    first, last = offsets[1], offsets[1] + part.shape[1]
    if move.how == "same":  # with the columns that only fill up
        part.copy_(values[:, first:last])
        return
    moved = move.columns(values, squares=not weights and bool(SQUARES.search(name)))
    if (stop := min(move.kept, last)) > first:
        part[:, : stop - first] = moved[:, first:stop].to(part.device)
    for k in range(extra):
        if first <= (column := move.new + k) < last:
            part[:, column - first] = values[:, move.old + k].to(part.device)


@torch.no_grad()
def fill_head(
    saved: Saved, model: SubnetModel, move: DenseMove, optimizer: torch.optim.Optimizer | None
) -> dict[str, int]:
    """The dense part, and with an ``optimizer`` its state; returns how many weights were found and how many are new."""
    tensors = tensors_of(model, optimizer, optimizer is not None)
    target = tensors[HEAD]
    values = move(saved.all(HEAD), target)
    for name, value in values.items():
        target[name].copy_(value)
    parameters = {n for n, p in model.replicated.named_parameters() if p.requires_grad}
    if optimizer is not None:
        _fill_state(saved, tensors[HEAD_STATE], move, set(values))
    found = sum(target[n].numel() for n in parameters & set(values))
    return {"found": found, "new": sum(target[n].numel() for n in parameters) - found}


def _fill_state(saved: Saved, target: Mapping[str, torch.Tensor], move: DenseMove, names: set[str]) -> None:
    """Of the optimizer of the dense part, for the weights of these names; the others begin anew."""
    earlier = saved.all(HEAD_STATE)
    for kind in sorted({n.rpartition("/")[2] for n in target}):
        old, new = (
            {n.rpartition("/")[0]: t for n, t in group.items() if n.rpartition("/")[2] == kind}
            for group in (earlier, target)
        )
        scalars = {n: t for n, t in old.items() if t.dim() == 0 and n in new}
        found = scalars | move(
            {n: t for n, t in old.items() if t.dim()},
            {n: t for n, t in new.items() if t.dim()},
            bool(SQUARES.search(kind)),
            weights=False,
        )
        for name in names & set(found):
            new[name].copy_(found[name])
