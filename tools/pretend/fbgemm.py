"""Names inside FBGEMM and TorchRec that the pretend device takes over: all that may differ between their versions."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

from tools.pretend.lookup import Lookup
from tools.pretend.tensor import PretendTensor

LOOKUP = re.compile(r"split_embedding_codegen_lookup_(\w+?)_function(_pt2)?")
TORCHREC = ("torchrec.distributed.batched_embedding_kernel", "torchrec.distributed.embedding_lookup")


def install() -> None:
    """Send look-ups with device tensors to :class:`Lookup`, and make TorchRec's slices of tables device tensors."""
    importlib.import_module("fbgemm_gpu")
    for name in torch._C._dispatch_get_all_op_names():
        found = LOOKUP.fullmatch(name.removeprefix("fbgemm::"))
        if found and name.startswith("fbgemm::"):
            setattr(torch.ops.fbgemm, found.group(0), _lookup(found.group(0), found.group(1)))
    for name in TORCHREC:
        module = importlib.import_module(name)
        own = getattr(module, "TableBatchedEmbeddingSlice", None)
        if own is not None:
            setattr(module, "TableBatchedEmbeddingSlice", _choice(own))  # noqa: B010


def _lookup(name: str, optimizer: str) -> Any:
    real = getattr(torch.ops.fbgemm, name)

    def look_up(*args: Any, **call: Any) -> Any:
        if isinstance(call.get("indices"), PretendTensor):
            return Lookup.apply(call["placeholder_autograd_tensor"], optimizer, call)
        return real(*args, **call)

    return look_up


class _Slice(PretendTensor):
    """TorchRec's ``TableBatchedEmbeddingSlice``: a parameter that is a view of a table inside FBGEMM's storage."""

    _is_param = True

    @staticmethod
    def __new__(cls, data: Any, first: int, last: int, rows: int, width: int) -> Any:
        part = data.inner.detach().reshape(-1)[first:last]
        made: Any = PretendTensor.__new__(cls, part.view(rows, width) if rows >= 0 else part, True)
        made._original_tensor, made._start_offset, made._end_offset = data, first, last
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _choice(own: Any) -> Any:
    class _Either(type):
        def __instancecheck__(cls, x: Any) -> bool:
            return isinstance(x, own | _Slice)

    class TableBatchedEmbeddingSlice(metaclass=_Either):
        def __new__(cls, data: Any, start_offset: int, end_offset: int, num_embeddings: int, embedding_dim: int) -> Any:
            kind = _Slice if isinstance(data, PretendTensor) else own
            return kind(data, start_offset, end_offset, num_embeddings, embedding_dim)

    return TableBatchedEmbeddingSlice
