"""Runs every operator: on the numbers behind device tensors, refusing what a card would refuse, counting the rest."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tools.pretend import generator, pinned, state
from tools.pretend.counts import note_copy, note_operator, note_sync, where
from tools.pretend.tensor import PretendTensor, to_device

# The result's shape, or the result itself, is on the host: the card must be done first.
WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique", "_unique2"),
    *("unique_consecutive", "unique_dim", "argwhere"),
}
# Of both worlds by nature: copies; and look-ups by host indices, which are copied up first.
MIXES = {"copy_", "_to_copy", "_local_scalar_dense", "index", "index_put", "index_put_", "_index_put_impl_"}
STARTS_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "detach", "alias"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size", "_local_scalar_dense"),
}
JOINS = {"cat", "stack", "_stack", "index_add", "index_add_", "index_copy_", "scatter", "scatter_add", "scatter_add_"}


class Device(TorchDispatchMode):
    """Makes what is asked for on ``cuda``, by whatever code of this thread, a :class:`PretendTensor`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            made = func(*args, **{**kwargs, "pin_memory": False})
            pinned.pin(made)
            return made
        if state.is_cuda(kwargs.get("device")) or any(isinstance(x, PretendTensor) for x in leaves(args, kwargs)):
            return dispatch(func, args, kwargs)
        if kwargs.get("generator") is not None:
            check_generator(func, kwargs, on_device=False)
        return func(*args, **kwargs)


def leaves(args: Any, kwargs: Any) -> list[Any]:
    """Everything in the arguments of an operator; lists are one deep."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            found.extend(value)
        else:
            found.append(value)
    return found


def inner(x: Any) -> Any:
    """Arguments with the numbers in place of device tensors."""
    if isinstance(x, PretendTensor):
        return x.inner
    if isinstance(x, list | tuple):
        return type(x)(map(inner, x))
    return x


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator with a device tensor among its arguments, or that makes one.

    Raises:
        RuntimeError: it mixes tensors of host and device; names the operator and the line of the project.
    """
    name, given = base_name(func), leaves(args, kwargs)
    mine = [x for x in given if isinstance(x, PretendTensor)]
    host = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor)]
    if name == "_to_copy" and not mine:
        return to_device(args[0], bool(kwargs.get("non_blocking")), kwargs.get("dtype"))
    if mine and host:
        check_places(func, name, args, host)
    check_generator(func, kwargs, on_device=True)
    note(func, name, args, kwargs, host)
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "meta":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func.namespace == "fbgemm" and not runs_on_cpu(func._schema.name):
        raise NotImplementedError(f"pretend cuda: {func} has a CUDA kernel alone, and nobody has written it again")
    found = func(*inner(args), **{k: inner(v) for k, v in kwargs.items()})
    if device is not None and torch.device(device).type == "meta":
        return found
    if is_view(func) and mine:
        wrapped = pytree.tree_map_only(torch.Tensor, PretendTensor, found)
        if all(type(x) is PretendTensor for x in mine):
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return wrapped
    return give_back(found, mine, host)


def give_back(found: Any, mine: list[PretendTensor], host: list[torch.Tensor]) -> Any:
    """The result on the device; an argument that was written in place comes back as itself."""
    known = {id(x.inner): x for x in mine} | {id(x): x for x in host}

    def wrap(x: torch.Tensor) -> torch.Tensor:
        same = known.get(id(x))
        if same is None:
            return PretendTensor(x)
        if isinstance(same, PretendTensor) and same.shape != x.shape:
            raise NotImplementedError(f"pretend cuda: a tensor was resized in place at {where()}")
        return same

    return pytree.tree_map_only(torch.Tensor, wrap, found)


def check_places(func: Any, name: str, args: Any, host: list[torch.Tensor]) -> None:
    """Raise as a card would, unless the host's part is a number (no dimensions) or a copy is the point."""
    if func.namespace == "c10d" or (func.namespace == "fbgemm" and all(x.numel() == 0 for x in host)):
        return
    if name in MIXES:
        if name.startswith(("index", "_index")) and not isinstance(args[0], PretendTensor):
            refuse(func, "a CPU tensor is indexed by one on cuda")
        if name.startswith(("index_put", "_index_put")) and not isinstance(args[2], PretendTensor) and args[2].dim():
            refuse(func, "values on the CPU")
        return
    scalars_on_host = name.startswith("_foreach_addc")  # a list of numbers may come as one CPU tensor
    wrong = [x for x in host if (x.dim() > 0 and not scalars_on_host) or name in JOINS]
    if wrong and torch._C._current_graph_task_id() != -1:
        # Zeros that autograd's C++ makes for outputs without a gradient; on a card they are made there.
        wrong = [x for x in wrong if bool(x.any())]
    if wrong:
        refuse(func, f"{[tuple(x.shape) for x in wrong]} on the CPU")


def refuse(func: Any, why: str) -> None:
    expected = "expected all tensors to be on the same device, found cuda:0 and cpu"
    raise RuntimeError(f"pretend cuda: {expected}: {func}, {why}, at {where()}")


def check_generator(func: Any, kwargs: Any, on_device: bool) -> None:
    found = kwargs.get("generator")
    if found is not None and generator.on_device(found) is not on_device:
        places = ("cuda", "cpu") if on_device else ("cpu", "cuda")
        raise RuntimeError(f"pretend cuda: {func} on {places[0]} with a generator of {places[1]}, at {where()}")


def note(func: Any, name: str, args: Any, kwargs: Any, host: list[torch.Tensor]) -> None:
    """Count this call: an operator, its kernel, a wait, a copy."""
    if func.namespace == "c10d":
        note_operator(f"c10d.{name}", 1)
        return
    note_operator(f"{func.namespace}.{name}", 0 if name in STARTS_NOTHING or is_view(func) else 1)
    if name in WAITS:
        note_sync("item" if name == "_local_scalar_dense" else name)
    elif name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
        note_sync("repeat_interleave without output_size")
    elif name == "copy_" and host:
        note_copy_(args)
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        for i in args[1]:
            if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) and not fills(name, args):
                note_sync(f"{name} by a boolean mask")
            elif isinstance(i, torch.Tensor) and not isinstance(i, PretendTensor):
                note_copy("H2D", i.nbytes, False, False)


def note_copy_(args: Any) -> None:
    target, source, *more = args
    pair = target if isinstance(source, PretendTensor) else source
    if isinstance(target, PretendTensor) and source.dim() == 0:
        return  # a number, passed along with the kernel
    non_blocking = bool(more and more[0])
    direction = "H2D" if isinstance(target, PretendTensor) else "D2H"
    note_copy(direction, source.numel() * source.element_size(), pinned.is_pinned(pair), non_blocking)


def fills(name: str, args: Any) -> bool:
    """``x[mask] = number`` is one kernel, and no wait for the number of True."""
    return name != "index" and len(args[1]) == 1 and args[2].numel() == 1


@cache
def base_name(func: Any) -> str:
    return func._schema.name.split("::")[1]  # type: ignore[no-any-return]


@cache
def is_view(func: Any) -> bool:
    """Whether results share memory with arguments that are not written (or only change their shape)."""
    if torch.Tag.inplace_view in func.tags:
        return base_name(func) not in ("resize_", "set_")
    alias = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in alias)


@cache
def runs_on_cpu(name: str) -> bool:
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)
