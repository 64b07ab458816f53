"""Products in parts for Hopper: they compile anywhere, and equal the reference where there is such a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from trine.kernels import fp8

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
H200 = 132  # multiprocessors


@pytest.mark.parametrize(("dtype", "second", "stages"), [("bf16", 0, 6), ("fp8e4nv", 64, 5)])
def test_compiles(dtype: str, second: int, stages: int) -> None:
    k_block = 128 if dtype == "fp8e4nv" else 64
    check_compiles(
        "trine.kernels.triton.hopper_matrix",
        "_matrix_kernel",
        {"rows": 128, "first": 128, "second": second, "k_block": k_block, "stages": stages,
         "has_scales": k_block == 128, "has_bias": True},
        {"x_desc": f"{dtype}[128, {k_block}]", "first_desc": f"{dtype}[128, {k_block}]",
         "second_desc": f"{dtype}[{second or 128}, {k_block}]", "out_desc": "bf16[64, 64]",
         "x_scales_ptr": "*fp32", "w_scales_ptr": "*fp32", "bias_ptr": "*bf16"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "inputs_bytes", "outputs", "columns", "splits"),
    [(256, 28672, 4096, 128, 2), (256, 8192, 6144, 192, 2), (100, 28672, 4096, 128, 4), (512, 8192, 4096, 128, 1)],
)
def test_programs_fill_the_multiprocessors(
    rows: int, inputs_bytes: int, outputs: int, columns: int, splits: int
) -> None:
    from trine.kernels.triton.hopper_matrix import tiling

    own = tiling(rows, inputs_bytes, outputs, H200)
    assert own is not None
    assert (own.first + own.second, own.splits) == (columns, splits)


def test_programs_are_resident_at_once_and_have_a_step_each() -> None:
    """One without a step would not wait for the kernel in front."""
    from trine.kernels.triton.hopper_matrix import tiling

    few = tiling(100, 256, 64, H200)
    assert few is not None
    assert few.splits == 2
    assert tiling(256, 8192, 28672, H200) is None


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(100, 912, 264), (256, 14336, 4096), (65, 4096, 6144)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_reference(rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    from trine.kernels.triton.hopper_matrix import linear_parts, supports

    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16) if has_bias else None
    added = 0.0 if bias is None else bias.double()
    assert supports(x, weight)
    actual = linear_parts(x, weight, bias).double().sum(0)[:rows]
    expected = x.double() @ weight.double().T + added
    assert (actual - expected).norm() < 3e-3 * expected.norm()
    rounded, packed = fp8.quantize_rows(x), fp8.pack_fp8(weight)
    assert supports(rounded, packed)
    actual = linear_parts(rounded, packed, bias).double().sum(0)[:rows]
    expected = rounded.widened().double() @ packed.dequantize().double().T + added
    assert (actual - expected).norm() < 6e-3 * expected.norm()
