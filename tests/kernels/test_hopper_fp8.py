"""The float8 products for Hopper: they compile anywhere, and equal the reference where there is such a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from trine.kernels import fp8
from trine.kernels.fp8 import Fp8Rows

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
POINTERS = {
    "x_scales_ptr": "*fp32",
    "w_scales_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "y_ptr": "*bf16",
    "parts_ptr": "*fp32",
    "arrivals_ptr": "*i32",
}


@pytest.mark.parametrize(("rows", "k_block", "stages"), [(16, 1024, 2), (64, 512, 3)])
def test_few_rows_compile(rows: int, k_block: int, stages: int) -> None:
    check_compiles(
        "trine.kernels.triton.fp8_stream",
        "_fp8_stream_kernel",
        {"n_block": 64, "k_block": k_block, "rows_block": rows, "stages": stages, "has_bias": True},
        POINTERS | {"w_desc": f"fp8e4nv[64, {k_block}]", "x_desc": f"fp8e4nv[{rows}, {k_block}]"},
    )


def test_hundreds_of_rows_compile() -> None:
    check_compiles(
        "trine.kernels.triton.fp8_matrix",
        "_fp8_matrix_kernel",
        {"rows": 128, "columns": 128, "k_block": 256, "stages": 3, "splits": 2, "has_bias": True},
        POINTERS | {"w_desc": "fp8e4nv[128, 256]", "x_desc": "fp8e4nv[128, 256]"},
    )


def grouped(x: torch.Tensor, groups: int) -> Fp8Rows:
    """x rounded with a scale for each of so many groups of columns."""
    parts = [fp8.quantize_rows(part) for part in x.chunk(groups, 1)]
    values, scales = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("values", "scales"))
    return Fp8Rows(values, scales, x.dtype)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups"), [(1, 4096, 6144, 4), (7, 912, 33, 1), (64, 2048, 1000, 2)]
)
def test_few_rows(rows: int, inputs: int, outputs: int, groups: int) -> None:
    from trine.kernels.triton.fp8_stream import can_stream, fp8_stream

    x = grouped(torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16), groups)
    weight = fp8.pack_fp8(torch.randn(outputs, inputs, device="cuda"))
    assert can_stream(x, weight)
    expected = x.widened().double() @ weight.dequantize().double().T
    for _ in range(2):  # a launch leaves its counters ready for the next
        assert (fp8_stream(x, weight, None, torch.float32) - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize(("inputs", "shared"), [(256, False), (1024, True)])
def test_a_tile_is_shared_by_no_more_programs_than_it_has_steps(inputs: int, shared: bool) -> None:
    """One without a step would not wait for the kernel in front."""
    from trine.kernels.triton.fp8_matrix import supports

    x = fp8.quantize_rows(torch.randn(100, inputs, dtype=torch.bfloat16))
    assert supports(x, fp8.pack_fp8(torch.randn(64, inputs))) == shared


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(100, 912, 264), (256, 14336, 4096), (65, 4096, 6144)])
def test_hundreds_of_rows(rows: int, inputs: int, outputs: int) -> None:
    from trine.kernels.triton.fp8_matrix import fp8_matrix, supports

    x = fp8.quantize_rows(torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16))
    weight = fp8.pack_fp8(torch.randn(outputs, inputs, device="cuda"))
    bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16)
    assert supports(x, weight)
    expected = x.widened().double() @ weight.dequantize().double().T + bias.double()
    for _ in range(2):
        assert (fp8_matrix(x, weight, bias) - expected).norm() < 6e-3 * expected.norm()
