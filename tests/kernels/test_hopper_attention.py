"""The prefill kernel for Hopper: compiled for it on any machine, compared with the reference where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.kernels.paged import paged_case
from trine.kernels import reference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from trine.kernels.triton import hopper_attention as module

kernel = module._hopper_prefill_kernel
group, head_dim, block_size, has_window = (int(word) for word in sys.argv[1:])
constants = {
    "has_window": bool(has_window), "block_size": block_size, "group": group, "head_dim": head_dim,
    "kv_block": module.KV_BLOCK, "stages": module.STAGES, "sequences_block": 16, "tokens_block": module.ROWS // group,
}
layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
types = {"scale": "fp32", "q_ptr": "*bf16", "out_ptr": "*bf16"}
types |= {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr") and name not in types}
types |= {name: f"tensordesc<bf16[{block_size}, {head_dim}],{layout!r}>" for name in ("k_desc", "v_desc")}
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
source = GluonASTSource(kernel, signature, {(kernel.arg_names.index(name),): constants[name] for name in constants})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert compiled.metadata.shared <= 227 * 1024
assert "wgmma" in compiled.asm["ptx"]
"""


@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "has_window"), [(4, 128, 64, 0), (7, 64, 16, 1)], ids=["llama", "qwen-window"]
)
def test_compiles(group: int, head_dim: int, block_size: int, has_window: int) -> None:
    words = [str(word) for word in (group, head_dim, block_size, has_window)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads"), [(128, 8, 2), (64, 14, 2), (128, 2, 2)])
def test_equals_the_reference(
    head_dim: int, num_heads: int, num_kv_heads: int, block_size: int, window: int | None
) -> None:
    from trine.kernels.triton.hopper_attention import hopper_prefill_attention

    case = paged_case(
        [40, 5, 100, 47, 1600, 16], [1, 1, 30, 47, 900, 2], num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    k_cache, v_cache = case.k_cache.nan_to_num(), case.v_cache.nan_to_num()
    scale = head_dim**-0.5
    expected = reference.paged_attention(case.q, k_cache, v_cache, case.batch, scale, window)
    actual = torch.full_like(expected, torch.nan)
    hopper_prefill_attention(case.q, k_cache, v_cache, case.batch, scale, window, actual)
    decodes = case.batch.num_decodes
    torch.testing.assert_close(actual[decodes:], expected[decodes:], rtol=0, atol=2e-2)
