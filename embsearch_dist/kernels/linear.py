"""The products of the dense part with backward passes of their own, for speed on CPU; exact."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

NARROW = 4096  # numbers in a weight
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# torch sends float32 products to MKL, which uses half of an AMD core's vectors of 512 bits; oneDNN uses all of them. On
# cores with vectors of 256 bits MKL is the faster one, by 5 to 25%.
ONEDNN = HAS_ONEDNN and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b.T + bias`` through oneDNN."""
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return made


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        to_x = _product(gradient, weight.T) if ctx.needs_input_grad[0] else None
        # oneDNN copies what comes transposed, which for a narrow layer takes longer than the product.
        narrow = gradient.shape[1] * x.shape[1] <= NARROW
        return to_x, gradient.T @ x if narrow else _product(gradient.T, x.T), gradient.sum(0)


def plain_on_cpu(x: torch.Tensor) -> bool:
    """Whether products of ``x`` are float32 ones on a CPU, which paths of our own may take over. Programs that are
    exported hold none of them: they must run elsewhere."""
    own = x.device.type == "cpu" and x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    return own and not torch.compiler.is_exporting()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x [B, n] @ weight [m, n].T + bias [m]``; float32 on a CPU with AVX-512 goes through oneDNN."""
    if ONEDNN and plain_on_cpu(x) and len(weight) > 1:
        made: torch.Tensor = _OneDNN.apply(x, weight, bias)
        return made
    return functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class _FM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        total = u.sum(1)
        ctx.save_for_backward(u, total)
        norm = torch.linalg.vector_norm(u.flatten(1), dim=1)  # no squares of all of u in memory
        return 0.5 * (total.square().sum(1) - norm.square())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        u, total = ctx.saved_tensors
        g = gradients[0][:, None]
        return torch.addcmul((g * total)[:, None], u, -g[:, None])


class _PairProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: torch.Tensor) -> torch.Tensor:
        total = s.sum(2)
        ctx.save_for_backward(s, total)
        norm = torch.linalg.vector_norm(s, dim=2)
        return total.square().addcmul_(norm, norm, value=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        s, total = ctx.saved_tensors
        return (total[:, :, None] - s).mul_(2 * gradients[0][:, :, None])


def pair_products(s: torch.Tensor) -> torch.Tensor:
    """``2 sum_{i<j} s_i * s_j`` over the tokens of ``s [B, width, T]``, column by column: ``[B, width]``."""
    made: torch.Tensor = _PairProducts.apply(s)
    return made


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(z)
        below, _ = _pair_places(z.shape[2], z.device)
        return torch.bmm(z.transpose(1, 2), z).flatten(1).index_select(1, below)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (z,) = ctx.saved_tensors
        n = z.shape[2]
        _, pairs = _pair_places(n, z.device)
        both_ways = functional.pad(gradients[0], (0, 1)).index_select(1, pairs)
        return torch.bmm(z, both_ways.view(-1, n, n))


@cache
def _pair_places(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a flat matrix ``[n * n]`` has its pairs, row by row below the diagonal: with fewer tokens the pairs are the
    first of those with more. And which pair each number of the matrix belongs to; the diagonal to one behind the last.
    """
    rows, columns = torch.tril_indices(n, n, -1, device=device)
    numbers = torch.full((n, n), len(rows), device=device)
    numbers[rows, columns] = numbers[columns, rows] = torch.arange(len(rows), device=device)
    return rows * n + columns, numbers.flatten()


def pairs(z: torch.Tensor) -> torch.Tensor:
    """``<z_i, z_j>`` for i > j, row by row, over the tokens of ``z [B, width, T]``: ``[B, T (T - 1) / 2]``."""
    made: torch.Tensor = _Pairs.apply(z)
    return made


def fm(u: torch.Tensor) -> torch.Tensor:
    """``sum_{f<g} <u_f, u_g>`` (Rendle 2010, Lemma 3.1): ``u [B, F, d]`` -> ``[B]``. One pass over u either way."""
    made: torch.Tensor = _FM.apply(u)
    return made
