"""Self-attention of few tokens with narrow heads: a compiled kernel on CPU, torch's own everywhere else.

Heads of two columns (a token of 16 columns, 8 heads: NASRec) make products too small for the libraries behind
``scaled_dot_product_attention``. ``attention.c`` is compiled by ``setup.py`` where there is a C compiler; without one,
on a GPU, under autocast or for other shapes torch's function computes the same.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from embsearch_dist import compiled
from embsearch_dist.kernels.linear import plain_on_cpu

VERSION = 2
MAX_TOKENS, MAX_WIDTH = 256, 8
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel; None where it was not built, or was built from another version of its source."""
    found = compiled.load("attention", VERSION)
    if found is not None:
        found.attention_forward.argtypes = [_POINTER] * 3 + [_LONG] * 3 + [ctypes.c_int]
        found.attention_backward.argtypes = [_POINTER] * 5 + [_LONG] * 3 + [ctypes.c_int]
    return found


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax(q k^T / sqrt(w)) v for each head of w columns.

    Args:
        qkv: ``[B, T, 3 * heads * w]``: queries, keys and values of a token side by side, each head by head.

    Returns:
        ``[B, T, heads * w]``.
    """
    rows, tokens, columns = qkv.shape
    width = columns // (3 * heads)
    if plain_on_cpu(qkv) and tokens <= MAX_TOKENS and width <= MAX_WIDTH and kernel() is not None:
        made: torch.Tensor = _Attention.apply(qkv, heads)
        return made
    # Taken apart before it is turned: so the gradient is put together in the order that qkv has.
    q, k, v = (part.transpose(1, 2) for part in qkv.view(rows, tokens, 3, heads, width).unbind(2))
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).reshape(rows, tokens, heads * width)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        rows, tokens, columns = qkv.shape
        qkv, width = qkv.contiguous(), columns // (3 * heads)
        out, lse = qkv.new_empty(rows, tokens, columns // 3), qkv.new_empty(rows, heads, tokens)
        library = kernel()
        assert library is not None
        _over_rows(library.attention_forward, [qkv, out, lse], (tokens, heads, width))
        ctx.save_for_backward(qkv, out, lse)
        ctx.shape = (tokens, heads, width)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        qkv, out, lse = ctx.saved_tensors
        result, library = torch.empty_like(qkv), kernel()
        assert library is not None
        _over_rows(library.attention_backward, [qkv, out, lse, gradients[0].contiguous(), result], ctx.shape)
        return result, None


def _over_rows(function: Any, tensors: list[torch.Tensor], shape: tuple[int, int, int]) -> None:
    """Call a function of the kernel; its rows are shared out over torch's threads (ctypes lets go of Python's lock)."""
    rows, threads = len(tensors[0]), torch.get_num_threads()
    share = math.ceil(rows / threads)

    def part(start: int) -> None:
        count = min(share, rows - start)
        pointers = [t.data_ptr() + start * t.stride(0) * t.element_size() for t in tensors]
        function(*pointers, count, *shape)

    starts = range(0, rows, max(1, share))
    if len(starts) <= 1:
        for start in starts:
            part(start)
    else:
        list(compiled.pool(threads).map(part, starts))
