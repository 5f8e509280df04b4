"""The compiled attention against torch's, values and gradients, and what happens where it cannot be used."""

from __future__ import annotations

import importlib.machinery
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from embsearch_dist import doctor
from embsearch_dist.kernels import attention as module
from embsearch_dist.kernels.attention import attention, kernel

SHAPES = [(3, 1, 1, 1), (2, 5, 2, 1), (4, 16, 8, 2), (3, 17, 8, 2), (2, 40, 2, 3), (2, 33, 4, 4), (1, 256, 2, 8)]

# The variants of EACH_PROCESSOR in attention.c, and what of /proc/cpuinfo they need.
PROCESSORS = {
    "x86-64": "sse2",
    "x86-64-v3": "avx2 bmi2 fma movbe f16c",
    "x86-64-v4": "avx512f avx512bw avx512dq avx512vl",
}


def reference(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """In double precision, written out."""
    rows, tokens, columns = qkv.shape
    width = columns // (3 * heads)
    q, k, v = qkv.double().view(rows, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    p = torch.softmax(q @ k.transpose(2, 3) / width**0.5, 3)
    return (p @ v).transpose(1, 2).reshape(rows, tokens, heads * width)


def assert_of_the_formula(shape: tuple[int, int, int, int], size: float) -> None:
    """Values and gradients of the kernel against the formula, for numbers of about ``size``."""
    rows, tokens, heads, width = shape
    qkv = (size * torch.randn(rows, tokens, 3 * heads * width)).requires_grad_()
    weight = torch.randn(rows, tokens, heads * width)
    found = attention(qkv, heads)
    assert type(found.grad_fn).__name__ == "_AttentionBackward"
    (own,) = torch.autograd.grad((found * weight).sum(), qkv)
    expected = reference(qkv, heads)
    (other,) = torch.autograd.grad((expected * weight).sum(), qkv)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5 * size)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + 1e-6)


@pytest.fixture
def compiled() -> None:
    if shutil.which("cc") is None and kernel() is None:
        pytest.skip("no C compiler, so the kernel was not built")
    assert kernel() is not None, "the kernel is missing or of another version: run tools/setup.sh"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", [1.0, 6.0], ids=["small", "steep"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, int, int, int], size: float) -> None:
    assert_of_the_formula(shape, size)


@pytest.fixture
def alone(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel built for one processor, in place of the one that picks its variant itself."""
    needed = PROCESSORS[request.param].split()
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if shutil.which("cc") is None or not set(needed) <= set(flags):
        pytest.skip(f"no C compiler, or a processor without {request.param}")
    source, target = (
        Path(module.__file__).with_name("attention.c"),
        f"_attention{importlib.machinery.EXTENSION_SUFFIXES[0]}",
    )
    options = ["-O3", "-Wno-psabi", "-fPIC", "-shared", f"-march={request.param}", "-DEACH_PROCESSOR="]
    subprocess.run(["cc", *options, str(source), "-o", str(tmp_path / target), "-lm"], check=True)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "attention.py"))
    kernel.cache_clear()
    assert kernel() is not None
    yield
    kernel.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("alone", PROCESSORS, indirect=True)
def test_every_variant_of_the_kernel_is_the_formula(alone: None) -> None:
    for shape in SHAPES:
        for size in (1.0, 6.0):
            assert_of_the_formula(shape, size)


@pytest.mark.usefixtures("compiled")
def test_torchs_function_stands_in_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(3, 9, 48)
    own = attention(qkv, 8)
    monkeypatch.setattr(module, "kernel", lambda: None)
    torch.testing.assert_close(attention(qkv, 8), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention(qkv.double(), 8), reference(qkv, 8))


@pytest.mark.parametrize("shape", [(2, 257, 1, 2), (2, 4, 2, 16)])
def test_other_shapes_go_to_torch(shape: tuple[int, int, int, int]) -> None:
    rows, tokens, heads, width = shape
    qkv = torch.randn(rows, tokens, 3 * heads * width, requires_grad=True)
    found = attention(qkv, heads)
    assert type(found.grad_fn).__name__ != "_AttentionBackward"
    torch.testing.assert_close(found.double(), reference(qkv, heads), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_rows_may_be_shared_out_over_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(5, 18, 48, requires_grad=True)
    one = attention(qkv, 8)
    (grad,) = torch.autograd.grad(one.square().sum(), qkv)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    many = attention(qkv, 8)
    assert torch.equal(many, one)
    assert torch.equal(torch.autograd.grad(many.square().sum(), qkv)[0], grad)


@pytest.mark.usefixtures("compiled")
def test_no_rows_and_tensors_that_are_not_contiguous() -> None:
    assert attention(torch.zeros(0, 4, 48), 8).shape == (0, 4, 16)
    wide = torch.randn(48, 6, 3).transpose(0, 2).requires_grad_()
    found = attention(wide, 8)
    expanded = torch.ones(1, 1, 1).expand_as(found)  # a gradient without memory of its own
    (own,) = torch.autograd.grad(found, wide, expanded)
    (other,) = torch.autograd.grad(reference(wide, 8).sum(), wide)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    qkv = torch.randn(2, 6, 48)
    qkv[1, 2, 3] = value  # a query
    found = attention(qkv, 8)
    assert found[0].isfinite().all()
    assert found[1, 2].isnan().any()


def test_the_doctor_says_whether_it_is_compiled(tmp_path: Path) -> None:
    assert doctor.check_kernel(tmp_path).status == doctor.WARN
    (tmp_path / "kernels").mkdir()
    for name in ("_attention", "_adam"):
        assert name[1:] in doctor.check_kernel(tmp_path).detail
        (tmp_path / "kernels" / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    assert doctor.check_kernel(tmp_path).status == doctor.OK


def test_a_kernel_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERSION", -1)
    kernel.cache_clear()
    try:
        assert kernel() is None
    finally:
        kernel.cache_clear()
    q = torch.randn(1, 3, 6)
    torch.testing.assert_close(attention(q, 1).double(), reference(q, 1), rtol=1e-5, atol=1e-6)
