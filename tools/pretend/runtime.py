"""``torch.cuda``, streams, process groups and threads, as code meets them on a machine with a card."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.jit._builtins as _builtins
import torch.optim.optimizer as optimizers
import torch.utils._foreach_utils as foreach

from tools.pretend import fbgemm, generator, pinned, state
from tools.pretend.counts import note_sync
from tools.pretend.dispatch import Device
from tools.pretend.tensor import PretendTensor, movement, to_device

NAME, MEMORY, CAPABILITY = "pretend device", 80 << 30, (9, 0)
_modes: list[Device] = []


def install() -> None:
    """Give this process the device, for good; a second call does nothing."""
    if _modes:
        return
    for name, value in _cuda().items():
        setattr(torch.cuda, name, value)
    torch.Generator = generator.Generator  # type: ignore[assignment,misc]
    torch.Tensor.pin_memory = pinned.pin_memory  # type: ignore[assignment]
    torch.Tensor.is_pinned = lambda self, device=None: pinned.is_pinned(self)  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]
    # A card's optimizers work on lists of tensors where these types are known.
    for types in (optimizers._foreach_supported_types, foreach._foreach_supported_types):  # type: ignore[attr-defined]
        types.append(PretendTensor)
    _patch_makers()
    _patch_autocast()
    _patch_distributed()
    _patch_threads()
    fbgemm.install()
    _enter()


def installed() -> bool:
    return bool(_modes)


def _enter() -> None:
    mode = Device()
    mode.__enter__()  # for as long as this thread lives
    _modes.append(mode)


def _patch_makers() -> None:
    """What makes tensors of Python's numbers asks C++ for a device before anybody can catch it."""
    for name in ("tensor", "as_tensor", "asarray"):
        real = getattr(torch, name)

        def make(data: Any, *args: Any, device: Any = None, real: Any = real, **kwargs: Any) -> torch.Tensor:
            if isinstance(data, PretendTensor):
                return data.to(kwargs.get("dtype"), device=device) if kwargs.get("dtype") else data.to(device)
            if device is None or not state.is_cuda(device):
                return real(data, *args, device=device, **kwargs)  # type: ignore[no-any-return]
            tracked = kwargs.pop("requires_grad", False)
            kwargs.pop("pin_memory", None)
            return to_device(real(data, *args, **kwargs), False).requires_grad_(tracked)

        setattr(torch, name, make)
        _builtins._register_builtin(make, f"aten::{name}")  # TorchScript knows functions by identity
    torch.Tensor.to = movement(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda x, device=None, non_blocking=False: x.to("cuda", non_blocking=non_blocking)  # type: ignore


def _patch_threads() -> None:
    """Modes belong to a thread: every new one enters its own."""
    start = threading.Thread.start

    def started(self: threading.Thread) -> None:
        run = self.run

        def within() -> None:
            with Device():
                run()

        self.run = within  # type: ignore[method-assign]
        start(self)

    threading.Thread.start = started  # type: ignore[method-assign]


def _patch_distributed() -> None:
    opened = dist.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        opened(backend.replace("nccl", "gloo") if backend else "cpu:gloo,cuda:gloo", *args, **kwargs)

    dist.init_process_group = init_process_group


def _patch_autocast() -> None:
    """To C++ these are CPU tensors, so that is whose autocast they follow."""
    init = torch.autocast.__init__

    def made(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = made  # type: ignore[method-assign]


class Stream:
    """Everything is done at once, so a stream orders nothing; waiting for one on the host still counts."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority, self.cuda_stream = state.device(), priority, 0

    def synchronize(self) -> None:
        note_sync("stream.synchronize")

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """Times are those of the host's clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note_sync("event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1000 * (end.at - self.at)


class _DeviceGuard(Stream):
    """``torch.cuda.device(d)``, and ``torch.cuda.stream(s)``."""


def _set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    state.set_current(index or 0)


def _seed(seed: int) -> None:
    """The device's default generator is the CPU's, which torch.manual_seed has seeded already."""


def _cuda() -> dict[str, Any]:
    properties = SimpleNamespace(
        name=NAME,
        total_memory=MEMORY,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        warp_size=32,
    )
    stream = Stream()
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": state.count,
        "current_device": state.current,
        "set_device": _set_device,
        "device": _DeviceGuard,
        "synchronize": lambda device=None: note_sync("torch.cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "stream": _DeviceGuard,
        "StreamContext": _DeviceGuard,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda *_, **__: True,
        "can_device_access_peer": lambda *_: True,
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "get_rng_state": lambda device=None: torch.random.get_rng_state(),
        "set_rng_state": lambda new, device=None: torch.random.set_rng_state(new),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_stats": lambda device=None: {},
        "empty_cache": lambda: None,
        **dict.fromkeys(("reset_peak_memory_stats", "ipc_collect"), lambda *_: None),
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda *_: 0
        ),
    }
