"""Checkpoints: DCP for tensors, JSON for the rest, a manifest of checksums written last.

Layout: ``<root>/step-N/{data/*, state.json, manifest.json}``. A directory without a whole manifest does
not count. The checksums are verified before anything is read: DCP's own metadata is a pickle, and DCP
notices neither flipped bits nor a missing optimizer state.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.optimizer import Optimizer

from embsearch_dist.dist.context import Context
from embsearch_dist.errors import UserError
from embsearch_dist.models.ctr import CTRModel
from embsearch_dist.schema import read_json, write_json


class Checkpointer:
    """Saves and restores a model, its optimizers and a JSON-able state under ``root``.

    The last ``keep`` checkpoints and the best one stay.
    """

    def __init__(
        self, root: Path, model: CTRModel, head_optimizer: Optimizer | None, context: Context, keep: int = 2
    ) -> None:
        """``head_optimizer``: None for a model that is only read; nothing can be saved then."""
        self.root, self.model, self.optimizer, self.context, self.keep = root, model, head_optimizer, context, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``step-N``; it counts from the moment its manifest is there."""
        final = self.root / f"step-{step}"
        partial = self.root / f"step-{step}.partial"
        self.context.first("clearing a half-written checkpoint", lambda: _remove(partial))
        writer = dcp.FileSystemWriter(partial / "data", sync_files=False)
        dcp.save(self._tensors(), storage_writer=writer, process_group=self.context.group)
        self.context.first("writing a checkpoint", lambda: self._seal(partial, final, state))
        return final

    def _seal(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        write_json(partial / "state.json", state)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {
            "world_size": self.context.world_size,
            "files": {str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files},
        }
        write_json(partial / "manifest.json", manifest)
        _remove(final)
        partial.rename(final)
        best = self.best()
        for old in self.steps()[: -self.keep]:
            if old != best:
                _remove(self.root / f"step-{old}")

    def mark_best(self, step: int) -> None:
        """Remember ``step`` as the best checkpoint; it is kept."""
        self.context.first("marking the best checkpoint", lambda: write_json(self.root / "best.json", {"step": step}))

    def best(self) -> int | None:
        path = self.root / "best.json"
        return int(read_json(path)["step"]) if path.exists() else None

    def steps(self) -> list[int]:
        """Steps of whole checkpoints, ascending."""
        found = []
        for path in self.root.glob("step-*/manifest.json"):
            number = path.parent.name.removeprefix("step-")
            if number.isdigit():
                found.append(int(number))
        return sorted(found)

    def load(self, step: int, optimizers: bool = True) -> dict[str, Any]:
        """Restore ``step-N``; returns the JSON state.

        Args:
            optimizers: their state too. Without it, any number of ranks and any sharding will do.

        Raises:
            UserError: a file is missing, truncated or differs from its checksum (named), or the
                checkpoint lacks state that this run's optimizers need.
        """
        directory = self.root / f"step-{step}"
        self.context.first("checking a checkpoint", lambda: verify(directory))
        tensors = self._tensors(optimizers)
        reader = dcp.FileSystemReader(directory / "data")
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self.context.group)
        except CheckpointException as e:
            ranks = read_json(directory / "manifest.json")["world_size"]
            reasons = "; ".join(sorted({str(f[0]) for f in e.failures.values()}))
            raise UserError(
                f"checkpoint {directory} of {ranks} rank(s) does not fit this run of {self.context.world_size}: "
                f"{reasons}. Continue with the number of ranks, sharding and optimizer it was made with"
            ) from e
        self.model.bare_head.load_state_dict(tensors["head"])
        return read_json(directory / "state.json")

    def _tensors(self, optimizers: bool = True) -> dict[str, Any]:
        """Everything that is a tensor, as views of live storage wherever DCP loads in place."""
        tables = self.model.sharded
        tensors: dict[str, Any] = {
            "tables": dict(tables.collection.state_dict()),
            "head": {k: v.detach() for k, v in self.model.bare_head.state_dict().items()},
        }
        if not optimizers:
            return tensors
        assert self.optimizer is not None, "without the head's optimizer only the weights can be loaded"
        tensors["head_optimizer"] = dict(_adam_state(self.optimizer, dict(self.model.bare_head.named_parameters())))
        fused: dict[str, Any] = {}
        for parameter, values in tables.collection.fused_optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, ShardedTensor | torch.Tensor):
                    fused[f"{parameter}/{key}"] = value
        own = {} if tables.torch_optimizer is None else dict(_table_state(tables, self.context))
        # DCP takes an empty group for a value, which only rank 0 would write and every rank would look for.
        return tensors | {k: v for k, v in {"fused_optimizer": fused, "torch_optimizer": own}.items() if v}


def verify(directory: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        UserError: naming the first file that is missing, has another size or another checksum.
    """
    manifest = directory / "manifest.json"
    if not manifest.exists():
        raise UserError(f"{directory} is not a whole checkpoint: manifest.json is missing")
    for name, entry in read_json(manifest)["files"].items():
        path = directory / name
        if not path.exists():
            raise UserError(f"checkpoint file {path} is missing; delete {directory} to go back to the one before")
        if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise UserError(
                f"checkpoint file {path} is damaged (its checksum differs from the manifest); "
                f"delete {directory} to go back to the one before"
            )


def _adam_state(optimizer: Optimizer, named: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """Optimizer state by parameter name. It is created first where it does not exist yet: loading
    into an optimizer that has never stepped would silently drop it."""
    for name, parameter in named.items():
        for key, value in _ensure_state(optimizer, parameter).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}/{key}", value


def _ensure_state(optimizer: Optimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    state = optimizer.state[parameter]
    if not state and isinstance(optimizer, torch.optim.Adam):
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where fused Adam keeps it
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
    return state


def _table_state(tables: Any, context: Context) -> Iterator[tuple[str, Any]]:
    """State of tables whose optimizer runs outside backward, sharded like the tables themselves.

    What belongs to no shard (the step count, the state of a replicated table) is the same on every rank
    that has it, so its name does not depend on the rank.
    """
    weights = tables.collection.state_dict()
    for name, parameter in tables.collection.named_parameters():
        key = name if name in weights else name.replace("module.", "")
        weight = weights.get(key)
        if isinstance(weight, ShardedTensor) and not weight.local_shards():
            continue  # the table lives on other ranks; here stands an empty parameter
        if parameter not in tables.torch_optimizer.state and not isinstance(tables.torch_optimizer, torch.optim.Adam):
            continue
        for field, value in _ensure_state(tables.torch_optimizer, parameter).items():
            if not isinstance(value, torch.Tensor):
                continue
            if isinstance(weight, ShardedTensor) and value.dim() == 2:
                shards = [Shard(value.detach(), s.metadata) for s in weight.local_shards()]
                value = ShardedTensor._init_from_local_shards_and_global_metadata(
                    shards, weight.metadata(), process_group=context.group
                )
            yield f"{key}/{field}", value


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
