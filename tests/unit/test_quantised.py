"""Rows in fewer bits are those of TorchRec's inference tables, to the bit."""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401 (registers the operators)
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.precision import row_bytes
from embsearch_dist.quantised import quantise, unpacked
from tests.factories import small_schema

KINDS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8, "int4": SparseType.INT4}


def rows(columns: int) -> torch.Tensor:
    """Ordinary rows, and rows that are constant, zero, tiny and large."""
    table = torch.randn(200, columns)
    table[3], table[4] = 0.5, 0.0
    table[5] *= 1e-6
    table[6] *= 1e-9
    table[7] *= 1e3
    return table


@pytest.mark.parametrize("columns", [4, 12])
def test_codes_scale_and_shift_are_those_of_fbgemm(columns: int) -> None:
    table = rows(columns)
    fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(table)
    tail = fused[:, -8:].contiguous().view(torch.float32).half()
    ours = quantise(table, "int8", "t")
    assert torch.equal(ours["codes"], fused[:, :-8])
    assert torch.equal(torch.stack([ours["scale"], ours["shift"]], 1), tail)
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(table, 4)
    tail = fused[:, -4:].contiguous().view(torch.float16)
    ours = quantise(table, "int4", "t")
    assert torch.equal(ours["codes"], fused[:, :-4])
    assert torch.equal(torch.stack([ours["scale"], ours["shift"]], 1), tail)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_values_come_back_within_half_a_step(precision: str, bits: int) -> None:
    table = torch.rand(50, 7)
    ours = quantise(table, precision, "t")
    back = unpacked(ours["codes"], 7, bits) * ours["scale"].float()[:, None] + ours["shift"].float()[:, None]
    step = (table.amax(1) - table.amin(1)) / (2**bits - 1)
    assert bool(((back - table).abs() <= 0.51 * step[:, None] + 2e-3).all())  # and what float16 loses of the shift


@pytest.mark.parametrize("precision", KINDS)
def test_bytes_of_a_row_are_those_that_torchrec_allocates(precision: str) -> None:
    for width in (1, 2, 4, 7, 8, 12, 13, 16, 28, 32, 33, 60, 64):
        assert row_bytes(width, precision) == rounded_row_size_in_bytes(width, KINDS[precision], 16)


def test_served_bytes_count_rows_and_first_order_weights() -> None:
    allocation = Allocation(small_schema(10, 20, 30), {"f0": 12, "f1": 0, "f2": 28})
    assert allocation.total("served_int8") == 10 * 16 + 30 * 32
    assert allocation.counted(1).total("served_int8") == 10 * 32 + 30 * 48
    assert allocation.total("served_fp32") == 10 * 48 + 30 * 112


def test_values_beyond_float16_are_refused() -> None:
    with pytest.raises(UserError, match="table 'price' has values beyond float16"):
        quantise(torch.full((2, 4), 1e6), "fp16", "price")
