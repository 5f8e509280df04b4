"""This process's place among the ranks, and how ranks agree on errors.

An exception on one rank alone leaves the others waiting in their next collective until it times out
(notes: TorchRec's planner does just that). Whatever can fail on one rank runs inside
:meth:`Context.together`: every rank then raises the same error within seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from embsearch_dist.config.sections import DistConfig, RunConfig
from embsearch_dist.errors import UserError
from embsearch_dist.ranks import addresses, peers
from embsearch_dist.ranks.environment import GPUS, available_cores, check_restarts, store_of_attempt

T = TypeVar("T")
SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX


@dataclass(frozen=True)
class Context:
    """Rank, world size and device of this process; a process group of that size is open."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup:
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a block that may fail on some ranks; afterwards either all ranks go on or all raise.

        The block itself must not call collectives. A rank that did not fail raises the
        ``UserError`` of the lowest rank that did.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as e:  # every kind: the other ranks must hear of it before this one leaves
            error = e
        if self.world_size > 1:
            mendable = isinstance(error, UserError)
            told = None if error is None else (f"{error}" if mendable else f"{error!r}", mendable)
            failed = [(r, *t) for r, t in enumerate(self.every(told)) if t is not None]
            if failed and error is None:
                rank, text, mendable = failed[0]
                error = UserError(f"rank {rank} failed while {doing}: {text}")
                error.repeats = mendable
        if error is not None:
            if isinstance(error, UserError):
                error.everywhere = True
            raise error

    def first(self, doing: str, make: Callable[..., T], *arguments: object) -> T | None:
        """Run ``make(*arguments)`` on rank 0 alone; all ranks wait for it and fail with it. Other ranks get None."""
        result = None
        with self.together(doing):
            if self.rank == 0:
                result = make(*arguments)
        return result

    def share(self, value: T) -> T:
        """Rank 0's JSON-able value on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def every(self, value: T) -> list[T]:
        """A value of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, SUM)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate 1-d tensors of differing lengths over ranks, in rank order, on every rank."""
        if self.world_size == 1:
            return tensor
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = tensor.numel()
        dist.all_reduce(sizes, SUM)
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=tensor.dtype, device=self.device)
        padded[: tensor.numel()] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, sizes.tolist(), strict=True)])


@contextlib.contextmanager
def start(run: RunConfig, config: DistConfig) -> Iterator[Context]:
    """Open the process group torchrun describes in the environment, or one of a single process.

    Raises:
        UserError: ``run.device=cuda``, or a job that asked for GPUs, without one; fewer GPUs than processes on this
            machine; restarts on several hosts that could not work; a host whose name leads to itself and that has
            several network cards.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_cuda = run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())
    if use_cuda and torch.cuda.device_count() < local_size:
        raise UserError(
            f"{local_size} processes on this machine need as many GPUs, {torch.cuda.device_count()} found; "
            "start fewer processes or set --run.device cpu"
        )
    if run.device == "auto" and not use_cuda and int(os.environ.get(GPUS) or 0):
        raise UserError(
            f"{os.environ[GPUS]} GPUs a node were asked for, and torch sees none here. Install a CUDA build of torch, "
            "look whether the scheduler gave them (nvidia-smi), or set --run.device cpu"
        )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    threads = run.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or available_cores() // local_size
    torch.set_num_threads(max(1, threads))
    set_products(run, device)
    problem = check_restarts()
    if problem:
        raise UserError(problem, everywhere=True)
    if world_size > local_size and addresses.VARIABLE not in os.environ:
        card = addresses.card_for(os.environ.get("MASTER_ADDR", ""))
        if card:
            os.environ[addresses.VARIABLE] = card
    timeout = datetime.timedelta(seconds=config.wait_s)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if world_size > 1 or "MASTER_ADDR" in os.environ:
        store = store_of_attempt(timeout)
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    peers.note_opened()
    try:
        peers.watch(rank, world_size, config.timeout_s)
        yield Context(rank, world_size, device)
        peers.leave()
    except BaseException as e:
        peers.leave(e)
        # A rank that leaves in error must not wait in the destructor for the others.
        sys.stdout.flush()
        raise
    finally:
        dist.destroy_process_group()


def set_products(run: RunConfig, device: torch.device) -> None:
    """Whether float32 products may be made in TF32: only on a GPU, and only if asked for.

    Where ranks are on CPUs it is off, for torch may take the wish for faster products as one for oneDNN's as well.
    """
    torch.backends.cuda.matmul.allow_tf32 = run.tf32 and device.type == "cuda"
