"""The gate and up projections with their activation: two kernels anywhere, one on Hopper."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.hopper_compiler import check_compiles
from trine.kernels import fp8, reference
from trine.kernels.triton.gated_linear import linear_silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("has_bias", [False, True])
def test_any_device(has_bias: bool) -> None:
    x, weight, bias = (torch.randn(shape, device=DEVICE) for shape in ((7, 96), (80, 96), (80,)))
    own = bias if has_bias else None
    expected = reference.linear_silu_mul(x, weight, own)
    torch.testing.assert_close(linear_silu_mul(x, weight, own), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dtype", "narrow"), [("bf16", 96), ("fp8e4nv", 0)])
def test_compiles(dtype: str, narrow: int) -> None:
    pytest.importorskip("triton.experimental.gluon")
    k_block = 128 if dtype == "fp8e4nv" else 64
    check_compiles(
        "trine.kernels.triton.hopper_gated",
        "_gated_kernel",
        {"rows": 128, "wide": 128, "narrow": narrow, "k_block": k_block, "stages": 4, "together": 16,
         "has_scales": k_block == 128},
        {"x_desc": f"{dtype}[128, {k_block}]", "wide_desc": f"{dtype}[128, {k_block}]",
         "middle_desc": f"{dtype}[64, {k_block}]", "small_desc": f"{dtype}[32, {k_block}]",
         "wide_out_desc": "bf16[64, 128]", "middle_out_desc": "bf16[64, 64]", "small_out_desc": "bf16[64, 32]",
         "x_scales_ptr": "*fp32", "weight_scales_ptr": "*fp32"},
    )  # fmt: skip


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(300, 256, 256), (2048, 4096, 1408), (128, 128, 128), (250, 128, 14336)]
)
def test_equals_the_reference(rows: int, inputs: int, outputs: int) -> None:
    from trine.kernels.triton.hopper_gated import gated_linear, supports

    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2 * outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.05
    assert supports(x, weight)
    expected = reference.silu_mul(reference.linear(x.double(), weight.double()))
    assert (gated_linear(x, weight).double() - expected).norm() < 5e-3 * expected.norm()
    rounded, packed = fp8.quantize_rows(x), fp8.pack_fp8(weight)
    assert supports(rounded, packed)
    expected = fp8.linear_silu_mul(rounded, packed).double()
    assert (gated_linear(rounded, packed).double() - expected).norm() < 1e-2 * expected.norm()
