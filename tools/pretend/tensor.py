"""A tensor that says ``cuda:0`` and keeps its numbers in a CPU tensor.

torch's own C++ takes it for a CPU tensor, as a build without CUDA has no kernels, no autograd and no guards for a
device of that name; Python (ours, TorchRec's, FBGEMM's) takes it for one on a card. What moves between the two
worlds is therefore caught here, as methods, and everything else in :mod:`tools.pretend.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tools.pretend import pinned, state
from tools.pretend.counts import note_copy, note_sync

CPU = torch.device("cpu")


class PretendTensor(torch.Tensor):
    """``inner`` holds the numbers: never with a gradient; views of this tensor have views of it."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return state.device()

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.inner.nbytes

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, PretendTensor) or value.shape != self.shape or value.dtype != self.dtype:
            raise NotImplementedError("pretend cuda: .data set to a tensor of another device, shape or type")
        self.inner = value.inner

    def get_device(self) -> int:
        return state.current()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        moved: torch.Tensor = self
        if device is not None and device.type == "meta":
            return torch.empty_like(self.inner, device="meta", dtype=dtype)
        if dtype is not None and dtype is not self.dtype:
            moved, copy = as_type(moved, dtype, layout), False
        if device is not None and device.type == "cpu":
            return to_cpu(moved, non_blocking)
        return moved.clone() if copy else moved

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to_cpu(self, False)

    def cuda(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        pass

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **kwargs)

    def tolist(self) -> Any:
        note_sync("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendTensor:
        copy = PretendTensor(self.inner.clone(), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError("pretend cuda: tensors of this device are not pickled")

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> PretendTensor:
        return PretendTensor(inner["inner"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = SPECIAL.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            return special(*args, **kwargs) if special else func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from tools.pretend.dispatch import dispatch

        return dispatch(func, args, kwargs or {})


class _Up(torch.autograd.Function):
    """Host to device; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        return to_device(x, non_blocking)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return to_cpu(gradients[0], False), None


class _Down(torch.autograd.Function):
    """Device to host; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> torch.Tensor:
        return x.inner.detach().clone()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return to_device(gradients[0], False)


def to_cpu(x: Any, non_blocking: bool) -> torch.Tensor:
    """D2H. As in torch, what is copied without waiting arrives in pinned memory."""
    note_copy("D2H", x.inner.nbytes, non_blocking, non_blocking)
    tracked = x.requires_grad and torch.is_grad_enabled()
    copy: torch.Tensor = _Down.apply(x) if tracked else x.inner.detach().clone()
    if non_blocking:
        pinned.pin(copy)
    return copy


def to_device(x: torch.Tensor, non_blocking: bool, dtype: torch.dtype | None = None) -> PretendTensor:
    """H2D, below autograd."""
    note_copy("H2D", x.nbytes, pinned.is_pinned(x), non_blocking)
    return PretendTensor(x.detach().to(dtype or x.dtype, copy=True))


def movement(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.Tensor.to`` for tensors of the host, of which some go to the device."""

    def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], PretendTensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device = kwargs.get("device", args[0] if args else None)
        if not isinstance(device, str | int | torch.device) or not state.is_cuda(device):
            return real(x, *args, **kwargs)
        kwargs.pop("copy", None)
        _, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype is not x.dtype:
            x = real(x, dtype)
        if x.requires_grad and torch.is_grad_enabled():
            return _Up.apply(x, non_blocking)  # type: ignore[no-any-return]
        return to_device(x, non_blocking)

    return to


def as_type(x: torch.Tensor, dtype: torch.dtype, layout: Any) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.to(x, dtype, memory_format=layout) if layout else torch.Tensor.to(x, dtype)


def _like(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``zeros_like`` and the like with a device named: torch would read its own for it."""

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is None or state.is_cuda(device):
            first = args[0] if args else kwargs.get("input")
            if not isinstance(first, PretendTensor):  # another argument is; this one asks for a place
                return function(*args, **kwargs)
            return function(*args, **{k: v for k, v in kwargs.items() if k != "device"})
        return function(args[0].inner, *args[1:], **kwargs)

    return made


def _to_where(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``x.to(other)`` of a tensor that is on the host, or ``torch.Tensor.to`` of one on the device."""
    if isinstance(x, PretendTensor):
        return x.to(*args, **kwargs)
    if args and isinstance(args[0], PretendTensor):
        return x.to(args[0].device, args[0].dtype, *args[1:], **kwargs)
    return x.to(*args, **kwargs)


def _one_hot(x: Any, num_classes: int = -1) -> torch.Tensor:
    # On a CPU torch looks at the values; on a card only where the number of classes is not given.
    if num_classes < 0:
        note_sync("one_hot without num_classes")
        num_classes = int(x.inner.max()) + 1
    return (x[..., None] == torch.arange(num_classes, device=x.device)).long()


def _set_data(x: Any, value: torch.Tensor) -> None:
    if not isinstance(x, PretendTensor):
        raise NotImplementedError("pretend cuda: .data of a CPU tensor set to one of the device")
    PretendTensor.data.fset(x, value)  # type: ignore[attr-defined]


_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full")
SPECIAL: dict[Any, Callable[..., Any]] = {getattr(torch, n): _like(getattr(torch, n)) for n in _LIKE}
SPECIAL |= {getattr(torch.Tensor, n): _like(getattr(torch.Tensor, n)) for n in _NEW}
SPECIAL |= {
    torch.Tensor.to: _to_where,
    torch.Tensor.cpu: lambda x, *_, **__: to_cpu(x, False),
    torch.nn.functional.one_hot: _one_hot,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
