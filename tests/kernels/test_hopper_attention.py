"""The prefill kernel for Hopper: compiled for it on any machine, compared with the reference where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.kernels.hopper_compiler import check_compiles
from tests.kernels.paged import paged_case
from trine.kernels import reference
from trine.kernels.triton.prefill_tiles import ordered_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize(
    ("group", "head_dim", "block_size", "has_window"),
    [(4, 128, 64, False), (7, 64, 16, True)],
    ids=["llama", "qwen-window"],
)
def test_compiles(group: int, head_dim: int, block_size: int, has_window: bool) -> None:
    constants = {
        "has_window": has_window, "block_size": block_size, "group": group, "head_dim": head_dim, "kv_block": 128,
        "stages": 2, "tokens_block": 128 // group,
    }  # fmt: skip
    types = {"scale": "fp32", "q_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("block_table_ptr", "tiles_ptr"), "*i32")
    types |= dict.fromkeys(("k_desc", "v_desc"), f"bf16[{block_size}, {head_dim}]")
    check_compiles("trine.kernels.triton.hopper_attention", "_hopper_prefill_kernel", constants, types)


@pytest.mark.parametrize(
    "prompts", [[(100, 30), (47, 47), (1600, 900), (16, 2)], [(9, 0), (70, 64), (9, 0), (9, 9)] * 9]
)
def test_tiles_come_by_their_keys_and_hold_every_new_token_once(prompts: list[tuple[int, int]]) -> None:
    lengths, new = ([*each] for each in zip((40, 1), (5, 1), *prompts, strict=True))
    batch = paged_case(lengths, new, num_heads=4, num_kv_heads=1, head_dim=16, device=DEVICE).batch
    tiles = ordered_tiles(batch, 32).T.tolist()
    keys = [before + min(first + 32, count) if count else 0 for _, _, count, before, first in tiles]
    assert keys == sorted(keys, reverse=True)
    seen = []
    for sequence, start, count, before, first in tiles:
        if count:
            assert (start, count, before) == (sum(new[:sequence]), new[sequence], lengths[sequence] - new[sequence])
            seen += range(start + first, start + min(first + 32, count))
    assert sorted(seen) == list(range(batch.num_decodes, sum(new)))


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
