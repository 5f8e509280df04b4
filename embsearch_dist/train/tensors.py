"""Everything of a training that is a tensor, under names that depend neither on rank nor on sharding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.remote_device import _remote_device
from torch.optim.optimizer import Optimizer

from embsearch_dist.errors import UserError
from embsearch_dist.models.model import CTRModel
from embsearch_dist.train.signals import StoppedBySignal


def tensors_of(model: CTRModel, optimizer: Optimizer | None, optimizers: bool) -> dict[str, Any]:
    """Tables, head and the state of their optimizers, as views of live storage wherever DCP loads in place."""
    tables = model.sharded
    tensors: dict[str, Any] = {
        "tables": dict(tables.collection.state_dict()),
        "head": {k: v.detach() for k, v in model.replicated.state_dict().items()},
    }
    if not optimizers:
        return tensors
    assert optimizer is not None, "without the head's optimizer only the weights can be loaded"
    tensors["head_optimizer"] = dict(_adam_state(optimizer, dict(model.replicated.named_parameters())))
    # DCP takes an empty group for a value, which only rank 0 would write and every rank would look for.
    return tensors | {k: v for k, v in tables.optimizer_state().items() if v}


class HostMemory:
    """Pinned memory that the copies of a save on a GPU go to; the next save uses it again.

    A copy to ordinary memory goes through a small pinned buffer of the driver's, and the device waits meanwhile. To
    pin memory takes longer than to copy into it, so it is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(t.nbytes for t in self._kept.values())

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor of the device's; ``name`` is the same in every save."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
        kept.copy_(tensor, non_blocking=True)
        return kept

    def wait(self, device: torch.device) -> None:
        """Wait until what was begun is there: training is about to write these tensors."""
        torch.cuda.current_stream(device).synchronize()


def copies(tensors: Any, group: Any, memory: HostMemory | None = None) -> Any:
    """The same tensors in memory of their own, on the CPU, so that training may go on while they are written.

    Args:
        group: of the sharded tensors among them.
        memory: where copies of a GPU's tensors go; what an earlier call has put there is overwritten.
    """
    devices: set[torch.device] = set()

    def copy(tensor: torch.Tensor, name: str) -> torch.Tensor:
        tensor = tensor.detach()
        if memory is None or tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        devices.add(tensor.device)
        return memory.copy(name, tensor)

    copied = _copies(tensors, group, copy, "")
    if memory is not None:
        for device in devices:
            memory.wait(device)
    return copied


def _copies(tensors: Any, group: Any, copy: Callable[[torch.Tensor, str], torch.Tensor], name: str) -> Any:
    if isinstance(tensors, dict):
        return {k: _copies(v, group, copy, f"{name}/{k}") for k, v in tensors.items()}
    if not isinstance(tensors, ShardedTensor):
        return copy(tensors, name)
    whole = tensors.metadata()
    parts = [ShardMetadata(m.shard_offsets, m.shard_sizes, _on_cpu(m)) for m in whole.shards_metadata]
    moved = {tuple(p.shard_offsets): p for p in parts}
    shards = []
    for s in tensors.local_shards():
        place = tuple(s.metadata.shard_offsets)
        shards.append(Shard(copy(s.tensor, f"{name}{list(place)}").contiguous(), moved[place]))
    # A ShardedTensor refuses shards that are pinned where its properties say that they are not.
    pinned = any(s.tensor.is_pinned() for s in shards)
    properties = dataclasses.replace(whole.tensor_properties, pin_memory=pinned)
    metadata = ShardedTensorMetadata(parts, whole.size, properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)


def local_bytes(tensors: Any) -> int:
    """Memory that :func:`copies` takes on this rank."""
    if isinstance(tensors, dict):
        return sum(local_bytes(v) for v in tensors.values())
    if isinstance(tensors, ShardedTensor):
        return sum(s.tensor.nbytes for s in tensors.local_shards())
    return tensors.nbytes


def _on_cpu(part: ShardMetadata) -> str:
    assert isinstance(part.placement, _remote_device)
    return f"rank:{part.placement.rank()}/cpu"


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


@contextmanager
def hearing_signals() -> Iterator[None]:
    """Around calls of DCP, which makes an error of its own of everything that is raised in it.

    Raises:
        StoppedBySignal: this process, or one that DCP tells of, was told to end meanwhile.
    """
    try:
        yield
    except CheckpointException as e:
        told = [reason for reason, _ in e.failures.values() if isinstance(reason, StoppedBySignal)]
        if told:
            raise told[0] from None
        raise


def check_parts(data: Path) -> None:
    """Refuse to seal tensors of which a file is missing or short: another rank has written it where rank 0 cannot see
    it, or it has not arrived yet.

    Raises:
        UserError: naming the file.
    """
    needed: dict[str, int] = {}
    for part in dcp.FileSystemReader(data).read_metadata().storage_data.values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sorted(needed.items()):
        there = (data / name).stat().st_size if (data / name).exists() else -1
        if there < size:
            what = "is missing" if there < 0 else f"has {there:,} of {size:,} bytes"
            raise UserError(f"{data / name} {what}: the run directory has to lie on a disk that all ranks share")
