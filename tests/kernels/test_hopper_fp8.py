"""The float8 products for Hopper: they compile anywhere, and equal the reference where there is such a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from trine.kernels import fp8

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
POINTERS = {
    "x_scales_ptr": "*fp32",
    "w_scales_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "y_ptr": "*bf16",
    "parts_ptr": "*fp32",
    "arrivals_ptr": "*i32",
}


def test_hundreds_of_rows_compile() -> None:
    check_compiles(
        "trine.kernels.triton.fp8_matrix",
        "_fp8_matrix_kernel",
        {"rows": 128, "columns": 128, "k_block": 256, "stages": 3, "splits": 2, "has_bias": True},
        POINTERS | {"w_desc": "fp8e4nv[128, 256]", "x_desc": "fp8e4nv[128, 256]"},
    )


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
