"""Products of one row for Hopper: compiled for it on any machine, compared where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from trine.kernels import fp8, reference
from trine.kernels.fp8 import Fp8Weight, RowToNorm

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize(
    ("element", "after", "rows", "units", "tiles", "ragged"),
    [
        ("fp8e4nv", "store", 8, 1, 1, True),
        ("fp8e4nv", "add", 16, 7, 1, False),
        ("fp8e4nv", "gate", 8, 2, 2, False),
        ("fp8e4nv", "turn", 8, 2, 1, True),
        ("bf16", "gate", 8, 4, 2, False),
        ("bf16", "add", 16, 7, 1, True),
    ],
)
def test_compiles(element: str, after: str, rows: int, units: int, tiles: int, ragged: bool) -> None:
    constants = {
        "rows": rows, "units": units, "tiles": tiles, "depth": 1, "ragged": ragged, "has_norm": after != "add",
        "has_bias": after != "gate", "after": after, "block_size": 64, "head_dim": 128,
    }  # fmt: skip
    types = dict.fromkeys(("x_ptr", "norm_ptr", "bias_ptr", "y_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16")
    types |= dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64") | {"w_ptr": f"*{element}", "eps": "fp32"}
    types |= dict.fromkeys(("scales_ptr", "cos_sin_ptr"), "*fp32") | {"inputs": "i32:16", "w_stride": "i32:16"}
    check_compiles("trine.kernels.triton.register_linear", "_register_linear_kernel", constants, types)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("eight_bits", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 28672), (14336, 4096), (912, 34), (16, 2)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_equals_the_reference(inputs: int, outputs: int, magnitude: float, eight_bits: bool) -> None:
    from trine.kernels.triton.register_linear import register_linear, register_linear_add

    x = torch.randn(1, inputs, device="cuda") * magnitude
    x[:, 5] *= 1000
    x = x.bfloat16()
    weight, wide = weights(inputs, outputs, eight_bits)
    expected = x.double() @ wide.T
    assert (register_linear(x, weight, None, torch.float32) - expected).norm() < 1e-5 * expected.norm()
    residual = torch.randn(1, outputs, device="cuda").bfloat16()
    total = residual.double() + expected
    register_linear_add(x, weight, None, residual)
    assert (residual - total).norm() < 5e-3 * total.norm()


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("eight_bits", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 28672), (14336, 4096), (912, 34)])
def test_norms_the_row(inputs: int, outputs: int, eight_bits: bool) -> None:
    from trine.kernels.triton.register_linear import register_gated_linear, register_linear

    x = torch.randn(1, inputs, device="cuda")
    x[:, 5] *= 1000
    x = x.bfloat16()
    weight, wide = weights(inputs, outputs, eight_bits)
    norm = torch.randn(inputs, device="cuda").bfloat16()
    row = RowToNorm(x, norm, 1e-6)
    normed = x.double() * (x.double().square().mean() + 1e-6).rsqrt() * norm.double()
    expected = normed @ wide.T
    allowed = 1e-3 if eight_bits else 5e-3  # the row is rounded to float16 or bfloat16
    assert (register_linear(row, weight, None, torch.float32) - expected).norm() < allowed * expected.norm()
    expected = reference.silu_mul(expected)
    assert (register_gated_linear(row, weight).double() - expected).norm() < 1e-2 * expected.norm()


def weights(inputs: int, outputs: int, eight_bits: bool) -> tuple[torch.Tensor | Fp8Weight, torch.Tensor]:
    """A weight and what it stands for, in float64."""
    plain = torch.randn(outputs, inputs, device="cuda") / inputs**0.5
    if not eight_bits:
        return plain.bfloat16(), plain.bfloat16().double()
    weight = fp8.pack_fp8(plain)
    assert isinstance(weight, Fp8Weight)
    return weight, weight.dequantize().double()
