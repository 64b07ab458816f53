"""Products of few rows for Hopper: compiled for it on any machine, compared with the reference where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from trine.kernels import fp8, reference
from trine.kernels.fp8 import Fp8Rows

POINTERS = {
    **dict.fromkeys(("parts_ptr", "cos_sin_ptr", "w_scales_ptr", "x_scales_ptr"), "*fp32"),
    **dict.fromkeys(("bias_ptr", "y_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16"),
    **dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64"),
    "arrivals_ptr": "*i32",
}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("element", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("after", ["store", "part", "gate", "turn"])
def test_compiles(after: str, element: str) -> None:
    constants = {
        "n_block": 64, "k_block": 512, "rows_block": 16, "stages": 2, "has_bias": after != "gate", "after": after,
        "scales_a_step": 1 if after == "turn" else 2, "block_size": 64, "head_dim": 128,
    }  # fmt: skip
    types = POINTERS | {
        "w_desc": f"{element}[{32 if after in ('gate', 'turn') else 64}, 512]",
        "x_desc": f"{element}[16, 512]",
    }
    check_compiles("trine.kernels.triton.stream_linear", "_stream_kernel", constants, types)


@pytest.mark.parametrize("element", ["bf16", "fp8e4nv"])
def test_a_product_of_one_step_compiles(element: str) -> None:
    """Numbers that are 1 are constants to the compiler."""
    constants = dict.fromkeys(("k_steps", "total", "outputs", "y_stride", "groups"), 1)
    constants |= {"n_block": 64, "k_block": 512, "rows_block": 8, "stages": 2, "scales_a_step": 1}
    constants |= {"has_bias": True, "after": "store", "block_size": 1, "head_dim": 0}
    types = POINTERS | {"w_desc": f"{element}[64, 512]", "x_desc": f"{element}[8, 512]"}
    check_compiles("trine.kernels.triton.stream_linear", "_stream_kernel", constants, types)


def grouped(x: torch.Tensor, groups: int) -> Fp8Rows:
    """x rounded with a scale for each of so many groups of columns."""
    parts = [fp8.quantize_rows(part) for part in x.chunk(groups, 1)]
    values, scales = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("values", "scales"))
    return Fp8Rows(values, scales, x.dtype)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [1, 2, 16, 31])
def test_equals_the_reference(rows: int) -> None:
    from trine.kernels.triton.stream_linear import stream_gated_linear, stream_linear

    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16) / 64
    expected = reference.linear(x.double(), weight.double())
    assert (stream_linear(x, weight).double() - expected).norm() < 5e-3 * expected.norm()
    expected = reference.silu_mul(expected)
    assert (stream_gated_linear(x, weight).double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups"), [(1, 4096, 6144, 4), (7, 912, 33, 1), (64, 2048, 1000, 2)]
)
def test_float8_equals_the_reference(rows: int, inputs: int, outputs: int, groups: int) -> None:
    from trine.kernels.triton.stream_linear import can_stream, can_stream_pairs, stream_gated_linear, stream_linear

    x = grouped(torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16), groups)
    weight = fp8.pack_fp8(torch.randn(outputs, inputs, device="cuda") / 64)
    assert can_stream(x, weight)
    expected = x.widened().double() @ weight.dequantize().double().T
    for _ in range(2):  # a launch leaves its counters ready for the next
        assert (stream_linear(x, weight, None, torch.float32) - expected).norm() < 5e-3 * expected.norm()
    if can_stream_pairs(weight, outputs // 2):
        expected = reference.silu_mul(expected)
        assert (stream_gated_linear(x, weight).double() - expected).norm() < 1e-2 * expected.norm()
