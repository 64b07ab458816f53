"""The decode kernels for few sequences on Hopper: compiled on any machine, compared with the reference where there is
such a GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from tests.kernels.paged import paged_case
from trine.kernels import fp8, reference
from trine.kernels.fp8 import Fp8Rows

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


POINTERS = {
    "scale": "fp32", "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16",
    **dict.fromkeys(("block_table_ptr", "table_ptr", "seq_lens_ptr", "arrivals_ptr"), "*i32"),
    **dict.fromkeys(("m_ptr", "sums_ptr", "acc_ptr", "out_scales_ptr"), "*fp32"),
}  # fmt: skip
SHAPES = pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "has_window", "settled"),
    [(4, 128, 64, False, True), (7, 64, 16, True, False)],
    ids=["llama", "qwen-window"],
)


@SHAPES
def test_one_sequence_compiles(group: int, head_dim: int, block_size: int, has_window: bool, settled: bool) -> None:
    constants = {
        "settled": settled, "has_window": has_window, "block_size": block_size, "group": group, "head_dim": head_dim,
        "group_block": 4 if group == 4 else 8, "tile": 32, "max_runs": 32, "merged": 16,
    }  # fmt: skip
    types = POINTERS | {"out_ptr": "*bf16"}
    check_compiles("trine.kernels.triton.register_decode", "_register_decode_kernel", constants, types)


@pytest.mark.parametrize(("units", "rounded"), [(8, False), (8, True), (128, False), (2048, False)])
@SHAPES
def test_compiles(
    group: int, head_dim: int, block_size: int, has_window: bool, settled: bool, units: int, rounded: bool
) -> None:
    from trine.kernels.triton.hopper_decode import tiling

    own = tiling(units, 132, block_size)
    constants = {
        "settled": settled, "has_window": has_window, "block_size": block_size, "group": group, "head_dim": head_dim,
        "group_block": 16, "kv_block": own.kv_block, "stages": own.stages, "max_runs": 16,
    }  # fmt: skip
    types = POINTERS | {"out_ptr": "*fp8e4nv" if rounded else "*bf16"}
    types |= dict.fromkeys(("k_desc", "v_desc"), f"bf16[{block_size}, {head_dim}]")
    check_compiles("trine.kernels.triton.hopper_decode", "_hopper_decode_kernel", constants, types)


@pytest.mark.parametrize(("units", "filled"), [(140, True), (396, True), (512, False), (1024, True), (1700, True)])
def test_last_round_of_programs_is_nearly_full(units: int, filled: bool) -> None:
    from trine.kernels.triton.hopper_decode import fills

    assert fills(units, 132) == filled


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), [(128, 8, 2), (64, 14, 2), (128, 2, 2)])
@pytest.mark.parametrize(
    "lengths",
    [[40, 1, 129, 1600, 384], [2500], [9000], [320, 17, 900] * 21, [700, 64, 65] * 25, [1, 63, 300] * 70],
)
def test_equals_the_reference(
    head_dim: int, num_heads: int, num_kv_heads: int, block_size: int, window: int | None, lengths: list[int]
) -> None:
    from trine.kernels.triton.hopper_decode import hopper_decode_attention
    from trine.kernels.triton.register_decode import register_decode_attention, supports

    if len(lengths) > 66 and block_size == 128:
        pytest.skip("with so many, a tile has 64 positions")
    case = paged_case(
        lengths, [1] * len(lengths), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    k_cache, v_cache = case.k_cache.nan_to_num(), case.v_cache.nan_to_num()
    scale = head_dim**-0.5
    expected = reference.paged_attention(case.q, k_cache, v_cache, case.batch, scale, window)
    for settled in (False, True, True):  # the counters are ready for the next launch
        batch = dataclasses.replace(case.batch, settled=settled)
        actual = torch.full_like(expected, torch.nan)
        hopper_decode_attention(case.q, k_cache, v_cache, batch, scale, window, actual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)
        rounded = Fp8Rows(
            torch.empty(expected.shape, dtype=fp8.DTYPE, device="cuda"),
            torch.empty((len(lengths), num_kv_heads), dtype=torch.float32, device="cuda"),
            torch.bfloat16,
        )
        hopper_decode_attention(case.q, k_cache, v_cache, batch, scale, window, rounded.values, rounded.scales)
        assert (rounded.dequantize() - expected).norm() < 4e-2 * expected.norm()
        if supports(case.q, k_cache, batch):
            register_decode_attention(case.q, k_cache, v_cache, batch, scale, window, actual.fill_(torch.nan))
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)
