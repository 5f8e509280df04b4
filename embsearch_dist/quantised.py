"""Values of embedding tables in fewer bits.

int8 and int4 are FBGEMM's row-wise formats for inference: a value is ``code * scale + shift``, scale and shift are
float16. int8 rounds to 255 steps between a row's smallest and largest value, int4 to 15; two int4 codes share a byte,
the first in the low half.
"""

from __future__ import annotations

import torch

from embsearch_dist.errors import UserError

BITS = {"int8": 8, "int4": 4}
CODES, SCALE, SHIFT = "codes", "scale", "shift"
TINY = 1e-8  # FBGEMM's guard against rows of equal values


def quantise(table: torch.Tensor, precision: str, name: str) -> dict[str, torch.Tensor]:
    """A table ``[rows, d]`` float32 at a precision.

    Args:
        name: of the field, for messages.

    Returns:
        ``""`` -> the table itself (fp32, fp16), or ``codes`` uint8 ``[rows, d]`` (int4: ``[rows, ceil(d / 2)]``) with
        ``scale`` and ``shift`` float16 ``[rows]``.

    Raises:
        UserError: values beyond what float16 holds.
    """
    if precision == "fp32":
        return {"": table.contiguous()}
    if precision == "fp16":
        found = {"": table.half().contiguous()}
    else:
        found = _int8(table) if precision == "int8" else _int4(table)
    if not all(bool(x.isfinite().all()) for x in found.values() if x.is_floating_point()):
        raise UserError(
            f"table {name!r} has values beyond float16, which {precision} needs. Export with --precision fp32"
        )
    return found


def _int8(table: torch.Tensor) -> dict[str, torch.Tensor]:
    low, high = table.aminmax(dim=1)
    span = high - low
    codes = torch.round((table - low[:, None]) * (255.0 / (span + TINY))[:, None])
    return {CODES: codes.clamp_(0, 255).to(torch.uint8), SCALE: (span / 255.0).half(), SHIFT: low.half()}


def _int4(table: torch.Tensor) -> dict[str, torch.Tensor]:
    low, high = table.aminmax(dim=1)
    shift = low.half()
    span = high - shift.float()
    scale = torch.where(span == 0, 1.0, span / 15.0).half()
    scale = torch.where((scale == 0) | scale.float().reciprocal().isinf(), torch.ones_like(scale), scale)
    codes = torch.round((table - shift.float()[:, None]) * scale.float().reciprocal()[:, None])
    codes = torch.nn.functional.pad(codes.clamp_(0, 15).to(torch.uint8), (0, table.shape[1] % 2))
    return {CODES: (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous(), SCALE: scale, SHIFT: shift}


def unpacked(codes: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """Codes ``[..., bytes]`` uint8 -> ``[..., width]`` float32. By arithmetic, which every exported form knows."""
    values = codes.float()
    if bits == 8:
        return values
    high = torch.floor(values / 16.0)
    both = torch.stack([values - 16.0 * high, high], -1).flatten(-2)
    return both[..., :width]


def rounded(table: torch.Tensor, precision: str, name: str) -> torch.Tensor:
    """A table ``[rows, d]`` float32 as it is read back after :func:`quantise`: what a served model computes with.

    Raises:
        UserError: as :func:`quantise`.
    """
    parts = quantise(table, precision, name)
    if "" in parts:
        return parts[""].float()
    values = unpacked(parts[CODES], table.shape[1], BITS[precision])
    return values * parts[SCALE].float()[:, None] + parts[SHIFT].float()[:, None]
