"""What would make the host wait for a GPU, found on the CPU: operators whose result's shape or value the host needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.pretend.dispatch import WAITS

INDEXED = {"index", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """``with Waits() as waits:`` ... ``waits.found`` names such operators in the order they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in INDEXED else []
        if name in WAITS or masks:
            self.found.append(f"{name} by mask" if masks else name)
        return func(*args, **(kwargs or {}))
