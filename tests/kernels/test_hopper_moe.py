"""The products of a mixture for Hopper: compiled for it on any machine. `bench/moe.py` compares them on a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles


@pytest.mark.parametrize(("silu", "row_block"), [(True, 32), (False, 16)])
def test_compiles(silu: bool, row_block: int) -> None:
    from trine.kernels.triton import hopper_moe

    tuning = hopper_moe.GATE_UP if silu else hopper_moe.DOWN
    constants = {
        "silu": silu, "choices": 8 if silu else 1, "row_block": row_block, "experts_block": 128,
        "n_block": tuning.n_block, "k_block": tuning.k_block, "stages": tuning.stages,
    }  # fmt: skip
    types = {"x_ptr": "*bf16:16", "y_ptr": "*bf16:16", "counts_ptr": "*i32", "lists_ptr": "*i32", "x_stride": "i32:16"}
    types |= {"w_desc": f"bf16[{tuning.n_block}, {tuning.k_block}]"}
    check_compiles("trine.kernels.triton.hopper_moe", "_stream_kernel", constants, types, tuning.num_warps)
