"""A stack of layers in one native call against the same layers one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trine.kernels import cpu
from trine.kernels.types import DecoderLayer
from trine.llm.batch import Batch

HIDDEN, HEADS, KV_HEADS, SIZE, BLOCKS = 48, 4, 2, 16, 12


def random_layer(dtype: torch.dtype, *, inner: int, biases: bool, head_norms: bool, window: int | None) -> DecoderLayer:
    def weight(n: int, k: int) -> cpu.PackedWeight:
        return cpu.pack_weight((torch.randn(n, k) / k**0.5).to(dtype))

    def vector(n: int, wanted: bool = True) -> torch.Tensor | None:
        return torch.rand(n).to(dtype) + 0.5 if wanted else None

    qkv_size = (HEADS + 2 * KV_HEADS) * SIZE
    k_cache, v_cache = torch.zeros(2, BLOCKS, KV_HEADS, 16, SIZE, dtype=dtype).unbind()
    ones = torch.ones(HIDDEN, dtype=dtype)
    return DecoderLayer(
        qkv=weight(qkv_size, HIDDEN),
        output=weight(HIDDEN, HEADS * SIZE),
        gate_up=weight(2 * inner, HIDDEN),
        down=weight(HIDDEN, inner),
        qkv_bias=vector(qkv_size, biases),
        output_bias=vector(HIDDEN, biases),
        gate_up_bias=vector(2 * inner, biases),
        down_bias=vector(HIDDEN, biases),
        input_norm=ones,
        post_norm=ones * 0.5,
        q_norm=vector(SIZE, head_norms),
        k_norm=vector(SIZE, head_norms),
        k_cache=k_cache,
        v_cache=v_cache,
        sliding_window=window,
    )


def one_by_one(
    layers: list[DecoderLayer], final_norm: torch.Tensor, cos_sin: torch.Tensor, x: torch.Tensor, batch: Batch
) -> torch.Tensor:
    residual = x.clone()
    x = torch.zeros_like(residual)
    for layer in layers:
        normed = cpu.add_rms_norm(x, residual, layer.input_norm, 1e-6)
        qkv = cpu.linear(normed, layer.qkv, layer.qkv_bias)
        q = cpu.prepare_qkv(
            qkv,
            HEADS,
            KV_HEADS,
            SIZE,
            batch.positions,
            cos_sin,
            layer.q_norm,
            layer.k_norm,
            1e-6,
            layer.k_cache,
            layer.v_cache,
            batch.slots,
        )
        mixed = cpu.paged_attention(q, layer.k_cache, layer.v_cache, batch, 0.25, layer.sliding_window)
        x = cpu.linear(mixed, layer.output, layer.output_bias)
        normed = cpu.add_rms_norm(x, residual, layer.post_norm, 1e-6)
        x = cpu.linear(cpu.linear_silu_mul(normed, layer.gate_up, layer.gate_up_bias), layer.down, layer.down_bias)
    return cpu.add_rms_norm(x, residual, final_norm, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "biases", "head_norms"), [(32, False, True), (40, True, False)])
def test_a_stack_equals_its_layers(native: str, dtype: torch.dtype, inner: int, biases: bool, head_norms: bool) -> None:
    torch.manual_seed(0)
    windows = (None, 5, None)
    layers = [random_layer(dtype, inner=inner, biases=biases, head_norms=head_norms, window=w) for w in windows]
    final_norm, cos_sin = torch.rand(HIDDEN).to(dtype), torch.randn(64, SIZE)
    assert cpu.can_run(layers, final_norm)
    decoder = cpu.Decoder(layers, final_norm, eps=1e-6, num_heads=HEADS, scale=0.25, cos_sin=cos_sin)
    new = [1, 20, 7]  # one decode, two prompts; the first sequence has 9 tokens already, whatever they are
    starts = torch.tensor([0, 1, 21, 28], dtype=torch.int32)
    positions = torch.cat([torch.arange(9, 10), torch.arange(20), torch.arange(7)])
    table = torch.tensor([[3, 0], [5, 7], [1, 0]], dtype=torch.int32)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(new))
    batch = Batch(
        positions=positions,
        slots=table[sequence, positions // 16].long() * 16 + positions % 16,
        query_start=starts,
        seq_lens=torch.tensor([10, 20, 7], dtype=torch.int32),
        block_table=table,
        num_decodes=1,
        max_query_len=20,
        max_seq_len=20,
    )
    x = torch.randn(28, HIDDEN).to(dtype)
    expected = one_by_one(layers, final_norm, cos_sin, x, batch)
    assert torch.equal(decoder(x.clone(), batch), expected)
    for rows in ([0, 20, 27], [5], list(range(28)), []):
        batch.output_rows = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(decoder(x.clone(), batch), expected[rows])


def test_what_a_stack_needs(native: str) -> None:
    layer = random_layer(torch.float32, inner=16, biases=True, head_norms=False, window=None)
    norm = torch.ones(HIDDEN)
    assert cpu.can_run([layer], norm)
    assert not cpu.can_run([], norm)
    assert not cpu.can_run([dataclasses.replace(layer, down=torch.zeros(HIDDEN, 16))], norm)
    assert not cpu.can_run([dataclasses.replace(layer, qkv_bias=torch.zeros(128, dtype=torch.bfloat16))], norm)
