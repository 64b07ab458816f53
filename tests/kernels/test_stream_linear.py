"""Products of few rows for Hopper: compiled for it on any machine, compared with the reference where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from trine.kernels import reference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("after", ["store", "gate", "turn"])
def test_compiles(after: str) -> None:
    constants = {
        "n_block": 64, "k_block": 512, "rows_block": 16, "stages": 2, "has_bias": after != "gate", "after": after,
        "block_size": 64, "head_dim": 128,
    }  # fmt: skip
    types = {"parts_ptr": "*fp32", "cos_sin_ptr": "*fp32", "arrivals_ptr": "*i32"}
    types |= dict.fromkeys(("bias_ptr", "y_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16")
    types |= dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64")
    types |= {"w_desc": f"bf16[{64 if after == 'store' else 32}, 512]", "x_desc": "bf16[16, 512]"}
    check_compiles("trine.kernels.triton.stream_linear", "_stream_kernel", constants, types)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [2, 16, 31])
def test_equals_the_reference(rows: int) -> None:
    from trine.kernels.triton.stream_linear import stream_gated_linear, stream_linear

    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16) / 64
    expected = reference.linear(x.double(), weight.double())
    assert (stream_linear(x, weight).double() - expected).norm() < 5e-3 * expected.norm()
    expected = reference.silu_mul(expected)
    assert (stream_gated_linear(x, weight).double() - expected).norm() < 5e-3 * expected.norm()
