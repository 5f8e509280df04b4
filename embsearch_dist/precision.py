"""The precisions that embedding tables are served at, and what a row costs.

Other sizes of this project count float32 columns. A served row is smaller and comes in steps: TorchRec's inference
tables hold an int8 row of d columns in d + 4 bytes, rounded up to 16, so that widths 2 to 12 cost the same, and 13 as
much as 28.
"""

from __future__ import annotations

PRECISIONS = ("fp32", "fp16", "int8", "int4")
MIXED = "mixed"
"""A precision of its own for each field, as an allocation says; int8 where it says none."""
ROW_ALIGNMENT = 16  # bytes: torchrec.quant.embedding_modules.DEFAULT_ROW_ALIGNMENT
SCALE_SHIFT_BYTES = 4
SERVED = tuple(f"served_{p}" for p in (*PRECISIONS, MIXED))
"""Resources: bytes of all tables as TorchRec serves them at a precision."""


def row_bytes(width: int, precision: str) -> int:
    """Bytes of a row of ``width`` columns (0 for none) as TorchRec's inference tables hold it: a multiple of 16."""
    if not width:
        return 0
    precision = "int8" if precision == MIXED else precision
    sizes = {"fp32": 4 * width, "fp16": 2 * width, "int8": width + SCALE_SHIFT_BYTES}
    plain = sizes.get(precision, (width + 1) // 2 + SCALE_SHIFT_BYTES)
    return -(-plain // ROW_ALIGNMENT) * ROW_ALIGNMENT


def served(precision: str) -> str:
    """The resource that counts bytes at a precision."""
    return f"served_{precision}"
